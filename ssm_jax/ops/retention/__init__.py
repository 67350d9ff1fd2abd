"""Retention: attention whose memory decays by one constant per head (Sun et al. 2023, arXiv:2307.08621).

``reference`` is the sequential oracle, ``xla`` runs everywhere. A kernel registers a forward under "retention" and a backward
under "retention_backward"; both see the same ``Inputs``, and nothing else is kept between them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssm_jax.ops import dispatch, triton_call
from ssm_jax.ops.linear_attention import default_chunk_size
from ssm_jax.ops.resets import clear
from ssm_jax.ops.retention import xla
from ssm_jax.ops.retention.inputs import Inputs, Memory
from ssm_jax.ops.retention.reference import reference
from ssm_jax.ops.retention.whole import Normaliser, whole
from ssm_jax.typing import Lengths, Reset

dispatch.register("retention", "reference", reference)
dispatch.register("retention", "xla", xla.forward)
dispatch.register("retention_backward", "xla", xla.backward)
for _name, _function in (("retention", xla.forward), ("retention_backward", xla.backward)):
    if _reason := triton_call.missing():
        dispatch.register_unavailable(_name, "triton", _reason)
    else:
        dispatch.register(_name, "triton", functools.partial(_function, core="triton"))


def retention(
    q_BLHN: Float[Array, "B L H N"],
    k_BLHN: Float[Array, "B L H N"],
    v_BLHP: Float[Array, "B L H P"],
    log_decay_H: Float[Array | np.ndarray, "H"],
    state: Memory | None = None,
    reset: Reset | None = None,
    *,
    lengths: Lengths | None = None,
    score_normaliser: Normaliser | None = None,
    score_scale: bool = True,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B L H P"], Memory]:
    """Runs retention over axis 1, per head, with gamma = exp(log_decay):

        R_n = gamma R_{n-1} + k_n v_n^T
        y_n = q_n^T R_n / sqrt(S_n),   S_n = 1 + gamma + ... + gamma^n,   n the token's place in its document

    The state is not normalised and the scale belongs to the place in the document, so that parallel, chunkwise and recurrent
    forms are one function: a chunk as long as the sequence is the parallel form, a call with one token the recurrent one. (The
    published forms scale states and chunks differently, and disagree.) Queries and keys come scaled and rotated.

    Args:
        log_decay_H: at most 0; a constant, for which there is no gradient.
        state: the memory before the first token; an empty one if None.
        reset: True at the first token of a document: nothing before it, in the call or in the state, has any influence.
        lengths: present tokens per row; later ones leave the state alone and their outputs mean nothing.
        score_normaliser: None; or "abs_sum" or "sum_abs", which divide by sums over a whole sequence (``retention.whole``).
        score_scale: whether y is divided by sqrt(S_n); flash-linear-attention leaves it out.
        implementation: None for the best one of the platform, or a name.
        chunk_size: the most tokens in a chunk. A matter of speed and memory only.

    Returns:
        y in v's dtype, and the memory after the last present token. Everything between is float32 (float64 for float64 v), but that
        kernels for GPUs round to bfloat16 what they multiply where q, k and v are bfloat16; states and sums stay float32.
        The memory is the same with every ``score_normaliser``.

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
        ValueError: shapes that do not fit together; a chunk without a token; a score normaliser together with a state or without
            the scale, or an unknown one.
    """
    _check_shapes(q_BLHN, k_BLHN, v_BLHP, log_decay_H, state)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None for the best one")
    if score_normaliser is not None:
        _check_whole(score_normaliser, score_scale, state)
    wide = jnp.promote_types(v_BLHP.dtype, jnp.float32)
    batch, length, heads, values = v_BLHP.shape
    keys = q_BLHN.shape[-1]
    if state is None:
        memory = Memory(jnp.zeros((batch, heads, keys, values), wide), jnp.zeros((batch,), jnp.int32))
    else:
        memory = Memory(state.kv_BHNP.astype(wide), state.tokens_B)
    if length == 0:
        return jnp.zeros_like(v_BLHP), memory
    if reset is not None:
        if lengths is not None:
            reset = reset & (jnp.arange(length) < lengths[:, None])
        memory = Memory(*(clear(x, reset[:, 0]) for x in memory))
    inputs = Inputs(q_BLHN, k_BLHN, v_BLHP, jnp.asarray(log_decay_H, wide), memory, reset, lengths)
    chunk_size = min(chunk_size or default_chunk_size(keys, values), length)
    if implementation == "reference":
        y, memory = reference(inputs, chunk_size=chunk_size, score_scale=score_scale)
    else:
        y, memory = _differentiable(chunk_size, score_scale, implementation, inputs)
    return (y if score_normaliser is None else whole(inputs, score_normaliser)), memory


def _check_shapes(q: Array, k: Array, v: Array, log_decay: Array | np.ndarray, state: Memory | None) -> None:
    if jnp.ndim(q) != 4 or jnp.shape(k) != jnp.shape(q) or jnp.shape(v)[:3] != jnp.shape(q)[:3] or jnp.ndim(v) != 4:
        raise ValueError(
            f"q, k and v have the shapes {jnp.shape(q)}, {jnp.shape(k)} and {jnp.shape(v)}; they must be [batch, length, heads, N] "
            "twice and [batch, length, heads, P]"
        )
    batch, _, heads, keys = jnp.shape(q)
    if jnp.shape(log_decay) != (heads,):
        raise ValueError(
            f"log_decay_H has the shape {jnp.shape(log_decay)}; there must be one for each of {heads} heads"
        )
    if not isinstance(log_decay, jax.core.Tracer) and np.any(np.asarray(log_decay) > 0):
        raise ValueError(f"log_decay_H is {np.asarray(log_decay).tolist()}; logarithms of decays are at most 0")
    wanted = (batch, heads, keys, jnp.shape(v)[-1])
    if state is not None and (not isinstance(state, Memory) or jnp.shape(state.kv_BHNP) != wanted):
        got = jnp.shape(state.kv_BHNP) if isinstance(state, Memory) else type(state).__name__
        raise ValueError(
            f"state is {got}; it must be a Memory with kv_BHNP of the shape {wanted}, of as many lanes as q"
        )


def _check_whole(score_normaliser: str, score_scale: bool, state: Memory | None) -> None:
    if score_normaliser not in ("abs_sum", "sum_abs"):
        raise ValueError(f"score_normaliser is {score_normaliser!r}; it must be None, 'abs_sum' or 'sum_abs'")
    if not score_scale:
        raise ValueError(f"score_normaliser {score_normaliser!r} is of scaled scores; use it with score_scale=True")
    if state is not None:
        raise ValueError(
            f"score_normaliser {score_normaliser!r} divides by a sum over the whole sequence and cannot go on from a state; "
            "use score_normaliser=None, the exact form"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(
    chunk_size: int, score_scale: bool, implementation: str | None, inputs: Inputs
) -> tuple[Array, Memory]:
    return dispatch.call("retention", implementation, inputs, chunk_size=chunk_size, score_scale=score_scale)


def _forward(
    chunk_size: int, score_scale: bool, implementation: str | None, inputs: Inputs
) -> tuple[tuple[Array, Memory], Inputs]:
    return _differentiable(chunk_size, score_scale, implementation, inputs), inputs


def _backward(
    chunk_size: int, score_scale: bool, implementation: str | None, inputs: Inputs, cotangents: tuple[Array, Memory]
) -> tuple[Any]:
    dy_BLHP, dmemory = cotangents
    how = {"chunk_size": chunk_size, "score_scale": score_scale}
    gradients = dispatch.call("retention_backward", implementation, inputs, dy_BLHP, dmemory.kv_BHNP, **how)
    dq, dk, dv, dkv = gradients
    dmemory = Memory(dkv, None)  # type: ignore[arg-type]  # a count of tokens has no gradient
    return (Inputs(dq, dk, dv, jnp.zeros_like(inputs.log_decay_H), dmemory, None, None),)


_differentiable.defvjp(_forward, _backward)

__all__ = ["Memory", "retention"]
