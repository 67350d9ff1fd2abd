"""silu(x) = x sigmoid(x), alone and as a gate, keeping nothing but its inputs for the backward pass.

Differentiated by JAX it keeps the sigmoid too, and a product both factors; writing and reading them costs more than the function.
"""

import jax
from jaxtyping import Array, Float


@jax.custom_vjp
def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x)."""
    return jax.nn.silu(x)


def _derivative(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


silu.defvjp(lambda x: (silu(x), x), lambda x, d_y: (d_y * _derivative(x),))


@jax.custom_vjp
def gated_silu(y: Float[Array, "*shape"], gate: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """y silu(gate)."""
    return y * jax.nn.silu(gate)


def _gated_backward(inputs: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    y, gate = inputs
    return d_out * jax.nn.silu(gate), d_out * y * _derivative(gate)


gated_silu.defvjp(lambda y, gate: (gated_silu(y, gate), (y, gate)), _gated_backward)
