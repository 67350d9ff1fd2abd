"""Elephant activations (Lan & Mahmood 2023, arXiv:2310.01365): a bump that is about 1 within ``width`` of zero and about 0 outside.

    E(x) = 1 / (1 + |x / a|^d),    E'(x) = -(d / a) sign(x) |x / a|^(d - 1) E(x)^2

a is the width of the bump and d the steepness of its edges. Gradients are reverse-mode and keep the inputs alone: differentiated
by JAX, every power on the way to the d-th would be kept.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def elephant(x: Float[Array, "*shape"], width: float = 1.0, power: float = 8.0) -> Float[Array, "*shape"]:
    """1 / (1 + |x / width|^power), in x's dtype; computed in float32 or x's own precision, whichever is wider."""
    return _value(x, width, power).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gated_elephant(
    y: Float[Array, "*shape"], gate: Float[Array, "*shape"], width: float = 1.0, power: float = 8.0
) -> Float[Array, "*shape"]:
    """y times ``elephant(gate)``: a gated linear unit with a bump for its gate."""
    return y * elephant(gate, width, power)


def _folded(x: Array, width: float) -> tuple[Array, Array]:
    """min(r, 1 / r) with r = |x / width|, and whether that is r: powers of it never overflow."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    r = jnp.abs(x.astype(wide)) / width
    inside = r <= 1
    return jnp.where(inside, r, 1 / jnp.where(inside, 1, r)), inside


def _power(x: Array, power: float) -> Array:
    """x^power; whole powers by squaring, which XLA does faster and more exactly than through logarithms."""
    return jax.lax.integer_pow(x, int(power)) if float(power).is_integer() else x**power


def _value(x: Array, width: float, power: float) -> Array:
    folded, inside = _folded(x, width)
    high = _power(folded, power)
    return jnp.where(inside, 1, high) / (1 + high)


def _slope(x: Array, width: float, power: float) -> Array:
    """E'. Written without E: 1 - E would round to nothing near zero."""
    folded, inside = _folded(x, width)
    steep = jnp.where(inside, _power(folded, power - 1), _power(folded, power + 1))
    return -(power / width) * jnp.sign(x).astype(steep.dtype) * steep / jnp.square(1 + _power(folded, power))


def _backward(width: float, power: float, x: Array, d_out: Array) -> tuple[Array]:
    return ((_slope(x, width, power) * d_out).astype(x.dtype),)


def _gated_backward(width: float, power: float, inputs: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    y, gate = inputs
    d_y = d_out * elephant(gate, width, power)
    return d_y, (_slope(gate, width, power) * d_out * y).astype(gate.dtype)


elephant.defvjp(lambda x, width, power: (elephant(x, width, power), x), _backward)
gated_elephant.defvjp(lambda y, gate, width, power: (gated_elephant(y, gate, width, power), (y, gate)), _gated_backward)
