"""gelu(x) = x Phi(x) with the error function, alone and as a gate, keeping nothing but its inputs for the backward pass.

Differentiated by JAX it keeps three arrays of x's size; writing and reading them costs more than the function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x)."""
    return x * _normal_cdf(x)


def _gelu_backward(x: Array, d_y: Array) -> tuple[Array]:
    return (d_y * _derivative(x),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def gated_gelu(gate: Float[Array, "*shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """gate * x Phi(x)."""
    return gate * gelu(x)


def _gated_backward(inputs: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    gate, x = inputs
    return d_y * gelu(x), d_y * gate * _derivative(x)


gated_gelu.defvjp(lambda gate, x: (gated_gelu(gate, x), (gate, x)), _gated_backward)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _derivative(x: Array) -> Array:
    return _normal_cdf(x) + x * jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
