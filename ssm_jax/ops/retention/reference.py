"""Retention one token after the other (paper, section 2.2): the oracle. Float64 in, float64 throughout."""

import jax.numpy as jnp
from jax import Array, lax

from ssm_jax.ops.retention.inputs import Inputs, Memory


def reference(inputs: Inputs, *, chunk_size: int, score_scale: bool) -> tuple[Array, Memory]:
    """y_BLHP and the last memory. It is differentiated as it stands, whatever that stores."""
    del chunk_size
    dtype = inputs.memory.kv_BHNP.dtype
    q, k, v = (x.astype(dtype) for x in (inputs.q_BLHN, inputs.k_BLHN, inputs.v_BLHP))
    gamma_H = jnp.exp(inputs.log_decay_H)
    batch, length = q.shape[:2]
    reset = jnp.zeros((batch, length), bool) if inputs.reset_BL is None else inputs.reset_BL
    lengths_B = jnp.full((batch,), length) if inputs.lengths_B is None else inputs.lengths_B
    present = jnp.arange(length) < lengths_B[:, None]

    def step(memory: Memory, token: tuple[Array, ...]) -> tuple[Memory, Array]:
        q_BHN, k_BHN, v_BHP, reset_B, present_B = token
        kv = jnp.where(reset_B[:, None, None, None], 0.0, memory.kv_BHNP)
        tokens_B = jnp.where(reset_B, 0, memory.tokens_B)
        kv = gamma_H[:, None, None] * kv + k_BHN[..., :, None] * v_BHP[..., None, :]
        count_B1 = (tokens_B[:, None] + 1).astype(dtype)
        geometric_BH = jnp.expm1(count_B1 * inputs.log_decay_H) / jnp.expm1(inputs.log_decay_H)
        sum_BH = jnp.where(inputs.log_decay_H == 0, count_B1, geometric_BH)
        y_BHP = jnp.sum(q_BHN[..., :, None] * kv, axis=2)
        if score_scale:
            y_BHP = y_BHP / jnp.sqrt(sum_BH)[..., None]
        kv = jnp.where(present_B[:, None, None, None], kv, memory.kv_BHNP)
        return Memory(kv, jnp.where(present_B, tokens_B + 1, memory.tokens_B)), y_BHP

    memory, y = lax.scan(step, inputs.memory, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, reset, present)))
    return jnp.moveaxis(y, 0, 1).astype(inputs.v_BLHP.dtype), memory
