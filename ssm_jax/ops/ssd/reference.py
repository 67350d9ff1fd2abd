"""SSD one token after the other, as section 2 of the paper writes it: the oracle. Float64 in, float64 throughout."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ssm_jax.ops.ssd.inputs import Inputs


def reference(
    inputs: Inputs, *, dt_softplus: bool, dt_limit: tuple[float, float], chunk_size: int
) -> tuple[Array, Array]:
    """y_BLHP and the last state_BHNP. It is differentiated as it stands, whatever that stores."""
    del chunk_size
    dtype = inputs.state_BHNP.dtype
    heads, groups = inputs.x_BLHP.shape[2], inputs.B_BLGN.shape[2]
    x, dt = inputs.x_BLHP.astype(dtype), inputs.dt_BLH.astype(dtype)
    B, C = (jnp.repeat(v.astype(dtype), heads // groups, axis=2) for v in (inputs.B_BLGN, inputs.C_BLGN))
    if inputs.dt_bias_H is not None:
        dt = dt + inputs.dt_bias_H
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    dt = jnp.minimum(jnp.maximum(dt, dt_limit[0]), dt_limit[1])
    if inputs.lengths_B is not None:
        dt = jnp.where(jnp.arange(dt.shape[1])[:, None] < inputs.lengths_B[:, None, None], dt, 0.0)
    reset = jnp.zeros(x.shape[:2], bool) if inputs.reset_BL is None else inputs.reset_BL

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_BHP, dt_BH, B_BHN, C_BHN, reset_B = token
        h = jnp.where(reset_B[:, None, None, None], 0.0, h)
        h = (
            jnp.exp(dt_BH * inputs.A_H)[..., None, None] * h
            + B_BHN[..., :, None] * (dt_BH[..., None] * x_BHP)[..., None, :]
        )
        return h, jnp.sum(C_BHN[..., :, None] * h, axis=2)

    tokens = tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, B, C, reset))
    state, y = lax.scan(step, inputs.state_BHNP, tokens)
    y = jnp.moveaxis(y, 0, 1)
    if inputs.D_H is not None:
        y = y + inputs.D_H[:, None] * x
    return y.astype(inputs.x_BLHP.dtype), state
