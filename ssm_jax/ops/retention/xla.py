"""Retention in plain JAX: chunked linear attention for sequences, the recurrence itself for one token."""

import jax
import jax.numpy as jnp
from jax import Array

from ssm_jax.ops.linear_attention import linear_attention
from ssm_jax.ops.retention.inputs import Inputs, Memory, places, scale, tokens_after


def forward(inputs: Inputs, *, chunk_size: int, score_scale: bool, core: str = "xla") -> tuple[Array, Memory]:
    """y_BLHP and the last memory; ``core`` is the implementation of the chunks."""
    v, state = inputs.v_BLHP, inputs.memory.kv_BHNP
    places_BL = places(inputs)
    scale_BLH = scale(places_BL, inputs.log_decay_H).astype(state.dtype) if score_scale else None
    y, kv = _one_token(inputs, scale_BLH) if v.shape[1] == 1 else _chunks(inputs, scale_BLH, chunk_size, core)
    return y.astype(v.dtype), Memory(kv, tokens_after(inputs, places_BL))


def backward(
    inputs: Inputs, dy_BLHP: Array, dkv_BHNP: Array, *, chunk_size: int, score_scale: bool, core: str = "xla"
) -> tuple[Array, Array, Array, Array]:
    """The gradients of q, k, v and the state."""

    def run(q: Array, k: Array, v: Array, kv: Array) -> tuple[Array, Array]:
        memory = inputs.memory._replace(kv_BHNP=kv)
        arrays = inputs._replace(q_BLHN=q, k_BLHN=k, v_BLHP=v, memory=memory)
        y, last = forward(arrays, chunk_size=chunk_size, score_scale=score_scale, core=core)
        return y, last.kv_BHNP

    _, pullback = jax.vjp(run, inputs.q_BLHN, inputs.k_BLHN, inputs.v_BLHP, inputs.memory.kv_BHNP)
    return pullback((dy_BLHP, dkv_BHNP))


def _chunks(inputs: Inputs, scale_BLH: Array | None, chunk_size: int, core: str) -> tuple[Array, Array]:
    dtype = inputs.memory.kv_BHNP.dtype
    batch, length, heads, _ = inputs.v_BLHP.shape
    gain, log_decay = None, inputs.log_decay_H
    if inputs.lengths_B is not None:
        present_BL = jnp.arange(length) < inputs.lengths_B[:, None]
        gain = jnp.broadcast_to(present_BL[..., None], (batch, length, heads)).astype(dtype)
        log_decay = gain * log_decay
    return linear_attention(
        inputs.q_BLHN,
        inputs.k_BLHN,
        inputs.v_BLHP,
        gain,
        log_decay,
        inputs.memory.kv_BHNP,
        inputs.reset_BL,
        scale_BLH=scale_BLH,
        chunk_size=chunk_size,
        implementation=core,
    )


def _one_token(inputs: Inputs, scale_BLH: Array | None) -> tuple[Array, Array]:
    kv = inputs.memory.kv_BHNP
    q, k, v = (x[:, 0].astype(kv.dtype) for x in (inputs.q_BLHN, inputs.k_BLHN, inputs.v_BLHP))
    after = jnp.exp(inputs.log_decay_H)[:, None, None] * kv + k[..., :, None] * v[..., None, :]
    if inputs.lengths_B is not None:
        after = jnp.where((inputs.lengths_B > 0)[:, None, None, None], after, kv)
    y = jnp.einsum("bhn,bhnp->bhp", q, after)[:, None]
    return y if scale_BLH is None else y * scale_BLH[..., None], after
