"""What every implementation of the causal convolution is given, and its activation."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Inputs(NamedTuple):
    """The arguments of one call after normalisation. ``window`` has the dtype of the arithmetic; reset and lengths may be None."""

    x_BLD: Array
    kernel_KD: Array
    bias_D: Array
    window: Array
    reset: Array | None
    lengths: Array | None


def activate(y: Array, activation: str | None) -> Array:
    return y / (1 + jnp.exp(-y)) if activation == "silu" else y


def activation_slope(y: Array, activation: str | None) -> Array | float:
    if activation is None:
        return 1.0
    sigmoid = 1 / (1 + jnp.exp(-y))
    return sigmoid * (1 + y * (1 - sigmoid))
