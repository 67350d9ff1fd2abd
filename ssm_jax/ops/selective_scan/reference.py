"""The selective scan one token after the other, as the paper writes it: the oracle. Float64 in, float64 throughout."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ssm_jax.ops.selective_scan.inputs import Inputs


def reference(inputs: Inputs, *, dt_softplus: bool, chunk_size: int) -> tuple[Array, Array, None]:
    """y_BLE, the last state_BNE, and no chunk states: it is differentiated as it stands, whatever that stores."""
    del chunk_size
    dtype = inputs.state_BNE.dtype
    x, dt, B, C = (v.astype(dtype) for v in (inputs.x_BLE, inputs.dt_BLE, inputs.B_BLN, inputs.C_BLN))
    if inputs.dt_bias_E is not None:
        dt = dt + inputs.dt_bias_E
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    if inputs.lengths_B is not None:
        dt = jnp.where(jnp.arange(dt.shape[1])[:, None] < inputs.lengths_B[:, None, None], dt, 0.0)
    reset = jnp.zeros(x.shape[:2], bool) if inputs.reset_BL is None else inputs.reset_BL

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_BE, dt_BE, B_BN, C_BN, reset_B = token
        h = jnp.where(reset_B[:, None, None], 0.0, h)
        h = jnp.exp(dt_BE[:, None, :] * inputs.A_NE) * h + B_BN[:, :, None] * (dt_BE * x_BE)[:, None, :]
        return h, jnp.sum(C_BN[:, :, None] * h, axis=1)

    tokens = tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, B, C, reset))
    state, y = lax.scan(step, inputs.state_BNE, tokens)
    y = jnp.moveaxis(y, 0, 1)
    if inputs.D_E is not None:
        y = y + inputs.D_E * x
    if inputs.z_BLE is not None:
        y = y * jax.nn.silu(inputs.z_BLE.astype(dtype))
    return y.astype(inputs.x_BLE.dtype), state, None
