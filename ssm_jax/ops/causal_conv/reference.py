"""The causal convolution one token after the other, the window sliding along: the oracle."""

import jax.numpy as jnp
from jax import Array, lax

from ssm_jax.ops.causal_conv.inputs import Inputs, activate


def reference(inputs: Inputs, *, activation: str | None) -> tuple[Array, Array]:
    """y_BLD and the new window."""
    x, kernel, bias, window, reset, lengths = inputs
    batch, length, _ = x.shape
    kernel, bias = kernel.astype(window.dtype), bias.astype(window.dtype)
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    lengths = jnp.full((batch,), length) if lengths is None else lengths

    def step(window: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x_t, reset_t, present_t = inputs
        kept = jnp.where(reset_t[:, None, None], 0, window)
        taps = jnp.concatenate([kept, x_t[:, None].astype(window.dtype)], axis=1)
        y_t = activate(jnp.sum(taps * kernel, axis=1) + bias, activation)
        return jnp.where(present_t[:, None, None], taps[:, 1:], window), y_t

    present = jnp.arange(length) < lengths[:, None]
    window, y = lax.scan(step, window, (jnp.moveaxis(x, 1, 0), reset.T, present.T))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), window
