"""Mamba-2's state space duality (SSD): a recurrence with one decay per head, which is also masked attention.

Dao & Gu 2024, arXiv:2405.21060. ``reference`` is the sequential oracle, ``xla`` runs everywhere. A kernel registers a forward
under "ssd" and a backward under "ssd_backward"; both see the same ``Inputs``, and nothing else is kept between them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.ops import dispatch, triton_call
from ssm_jax.ops.linear_attention import default_chunk_size
from ssm_jax.ops.resets import clear
from ssm_jax.ops.ssd import xla
from ssm_jax.ops.ssd.inputs import Inputs
from ssm_jax.ops.ssd.reference import reference
from ssm_jax.typing import Lengths, Reset

dispatch.register("ssd", "reference", reference)
dispatch.register("ssd", "xla", xla.forward)
dispatch.register("ssd_backward", "xla", xla.backward)
for _name, _function in (("ssd", xla.forward), ("ssd_backward", xla.backward)):
    if _reason := triton_call.missing():
        dispatch.register_unavailable(_name, "triton", _reason)
    else:
        dispatch.register(_name, "triton", functools.partial(_function, core="triton"))

_Static = tuple[bool, tuple[float, float], int]


def ssd(
    x_BLHP: Float[Array, "B L H P"],
    dt_BLH: Float[Array, "B L H"],
    A_H: Float[Array, "H"],
    B_BLGN: Float[Array, "B L G N"],
    C_BLGN: Float[Array, "B L G N"],
    D_H: Float[Array, "H"] | None = None,
    dt_bias_H: Float[Array, "H"] | None = None,
    state: Float[Array, "B H N P"] | None = None,
    reset: Reset | None = None,
    *,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    lengths: Lengths | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H N P"]]:
    """Runs Mamba-2's recurrence over axis 1, per head:

        dt_t = clip(softplus(dt_t + dt_bias), *dt_limit)
        h_t  = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T
        y_t  = C_t^T h_t + D x_t

    Args:
        A_H: one negative rate per head.
        B_BLGN, C_BLGN: shared by the heads of a group: head h uses group h // (H / G).
        D_H, dt_bias_H: left out where None.
        state: h before the first token; zeros if None.
        reset: True at the first token of a document: there h_t is its second term alone, whatever finite values stand before it;
            at the first token of a call, whatever the state holds.
        dt_softplus: whether ``dt_BLH + dt_bias_H`` goes through softplus, or straight to the clip.
        dt_limit: applied at every token, also where there is only one (the published single-token steps leave it out).
        lengths: present tokens per row; later ones leave the state alone (dt_t = 0) and their outputs mean nothing.
        implementation: None for the best one of the platform, or a name.
        chunk_size: the most tokens in a chunk. A matter of speed and memory only.

    Returns:
        y in x's dtype, and the state after the last present token. Everything between is float32 (float64 for float64 x), but that
        kernels for GPUs round to bfloat16 what they multiply where x, B and C are bfloat16; states and sums stay float32.

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
        ValueError: the groups do not divide the heads.
    """
    wide = jnp.promote_types(x_BLHP.dtype, jnp.float32)
    batch, length, heads, values = x_BLHP.shape
    groups, keys = B_BLGN.shape[2:]
    if heads % groups:
        raise ValueError(f"ssd: {groups} groups do not divide {heads} heads.")
    if reset is not None and lengths is not None:
        reset = reset & (jnp.arange(length) < lengths[:, None])
    state = jnp.zeros((batch, heads, keys, values), wide) if state is None else state.astype(wide)
    inputs = Inputs(
        x_BLHP,
        dt_BLH,
        A_H.astype(wide),
        B_BLGN,
        C_BLGN,
        None if D_H is None else D_H.astype(wide),
        None if dt_bias_H is None else dt_bias_H.astype(wide),
        clear(state, None if reset is None else reset[:, 0]),
        reset,
        lengths,
    )
    chunk_size = min(chunk_size or default_chunk_size(keys, values), length)
    if implementation == "reference":
        return reference(inputs, dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_size=chunk_size)
    return _differentiable((dt_softplus, dt_limit, chunk_size), implementation, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(static: _Static, implementation: str | None, inputs: Inputs) -> tuple[Array, Array]:
    return dispatch.call("ssd", implementation, inputs, **_keywords(static))


def _forward(static: _Static, implementation: str | None, inputs: Inputs) -> tuple[tuple[Array, Array], Inputs]:
    return _differentiable(static, implementation, inputs), inputs


def _backward(
    static: _Static, implementation: str | None, inputs: Inputs, cotangents: tuple[Array, Array]
) -> tuple[Inputs]:
    return (dispatch.call("ssd_backward", implementation, inputs, *cotangents, **_keywords(static)),)


def _keywords(static: _Static) -> dict[str, object]:
    return dict(zip(("dt_softplus", "dt_limit", "chunk_size"), static, strict=True))


_differentiable.defvjp(_forward, _backward)
