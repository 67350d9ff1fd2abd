"""SSD in plain JAX: chunked linear attention for sequences, the recurrence itself for one token."""

import jax
import jax.numpy as jnp
from jax import Array

from ssm_jax.ops.linear_attention import linear_attention
from ssm_jax.ops.ssd.inputs import Inputs, step_size


def forward(
    inputs: Inputs, *, dt_softplus: bool, dt_limit: tuple[float, float], chunk_size: int, core: str = "xla"
) -> tuple[Array, Array]:
    """y_BLHP and the last state_BHNP; ``core`` is the implementation of the chunks."""
    x, state = inputs.x_BLHP, inputs.state_BHNP
    dt = step_size(inputs, softplus=dt_softplus, limit=dt_limit)
    log_decay = dt * inputs.A_H
    if x.shape[1] == 1:
        y, state = _one_token(inputs, dt, log_decay)
        if inputs.D_H is not None:
            y = y + inputs.D_H[:, None] * x
        return y.astype(x.dtype), state
    return linear_attention(
        inputs.C_BLGN,
        inputs.B_BLGN,
        x,
        dt,
        log_decay,
        state,
        inputs.reset_BL,
        skip_H=inputs.D_H,
        chunk_size=chunk_size,
        implementation=core,
    )


def backward(
    inputs: Inputs,
    dy_BLHP: Array,
    dstate_BHNP: Array,
    *,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int,
    core: str = "xla",
) -> Inputs:
    """The gradients of the inputs; None for the masks. What remains of the forward pass in it is not used, and not run."""

    def run(arrays: Inputs) -> tuple[Array, Array]:
        whole = arrays._replace(reset_BL=inputs.reset_BL, lengths_B=inputs.lengths_B)
        return forward(whole, dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_size=chunk_size, core=core)

    _, pullback = jax.vjp(run, inputs._replace(reset_BL=None, lengths_B=None))
    return pullback((dy_BLHP, dstate_BHNP))[0]


def _one_token(inputs: Inputs, dt_B1H: Array, log_decay_B1H: Array) -> tuple[Array, Array]:
    state, dtype = inputs.state_BHNP, inputs.state_BHNP.dtype
    heads, groups = state.shape[1], inputs.B_BLGN.shape[2]
    B_BHN, C_BHN = (jnp.repeat(v[:, 0].astype(dtype), heads // groups, axis=1) for v in (inputs.B_BLGN, inputs.C_BLGN))
    if inputs.reset_BL is not None:
        state = jnp.where(inputs.reset_BL[:, 0, None, None, None], 0, state)
    input_BHP = inputs.x_BLHP[:, 0] * dt_B1H[:, 0, :, None]
    state = state * jnp.exp(log_decay_B1H)[:, 0, :, None, None] + B_BHN[..., :, None] * input_BHP[..., None, :]
    return jnp.einsum("bhn,bhnp->bhp", C_BHN, state)[:, None], state
