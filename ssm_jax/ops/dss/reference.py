"""The recurrence, one token after the other."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ssm_jax.ops.dss.inputs import Inputs


def reference(inputs: Inputs) -> tuple[Float[Array, "B L H"], Float[Array, "B H 2 N"]]:
    """X_t = a X_{t-1} + s_t, y_t = Re(sum_n c_n X_t) + D s_t, with a = exp(-rate + i frequency)."""
    s, modes, c = inputs.s_BLH, inputs.modes, inputs.c_H2N
    batch, length, _ = s.shape
    frequency = jnp.exp(modes.frequency_N) if modes.log_frequency else modes.frequency_N
    a_re, a_im = jnp.exp(-modes.rate_N) * jnp.cos(frequency), jnp.exp(-modes.rate_N) * jnp.sin(frequency)
    start = jnp.zeros((batch, *c.shape), s.dtype) if inputs.state is None else inputs.state
    resets = jnp.zeros((batch, length), bool) if inputs.reset is None else inputs.reset
    absent = jnp.zeros((batch, length), bool)
    if inputs.lengths is not None:
        absent = jnp.arange(length) >= inputs.lengths[:, None]

    def step(X: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        s_t, reset, none = token
        re, im = X[:, :, 0], X[:, :, 1]
        turned = jnp.stack([a_re * re - a_im * im, a_re * im + a_im * re], axis=2)
        new = jnp.where(reset[:, None, None, None], 0, turned)
        new = new.at[:, :, 0].add(s_t[:, :, None])
        y_t = jnp.sum(c[:, 0] * new[:, :, 0] - c[:, 1] * new[:, :, 1], axis=-1) + inputs.D_H * s_t
        return jnp.where(none[:, None, None, None], X, new), y_t

    X, y = lax.scan(step, start, (jnp.moveaxis(s, 1, 0), resets.T, absent.T))
    return jnp.moveaxis(y, 0, 1), X
