"""Elephants against their closed form in float64, at every size of input, and what they keep for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.elephant import elephant, gated_elephant
from tests.conformance.residuals import kept

SHAPES = [(1.0, 8.0), (0.7, 3.5), (2.0, 1.0), (1.0, 2.0)]
X = np.concatenate([[0.0], *(sign * np.logspace(-6, 12, 400) for sign in (1, -1))])


def _closed_form(width: float, power: float) -> tuple[np.ndarray, np.ndarray]:
    """E and E' with powers of at most 1, so that nothing overflows in float64."""
    r = np.abs(X) / width
    small, large = np.minimum(r, 1), 1 / np.maximum(r, 1)
    value = np.where(r <= 1, 1 / (1 + small**power), large**power / (1 + large**power))
    steep = np.where(
        r <= 1, small ** (power - 1) / (1 + small**power) ** 2, large ** (power + 1) / (1 + large**power) ** 2
    )
    return value, -power / width * np.sign(X) * steep


@pytest.mark.parametrize(("width", "power"), SHAPES)
def test_value_and_slope_are_the_closed_form(width: float, power: float) -> None:
    value, slope = _closed_form(width, power)
    x = jnp.asarray(X, jnp.float32)
    got = jax.jit(lambda x: elephant(x, width, power))(x)
    got_slope = jax.jit(jax.vmap(jax.grad(lambda x: elephant(x, width, power))))(x)
    np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-37)
    np.testing.assert_allclose(got_slope, slope, rtol=5e-5, atol=1e-37)


def test_products_have_the_gradients_of_the_plain_formula() -> None:
    y, gate = (jax.random.normal(jax.random.key(i), (3, 50)) * 1.5 for i in (0, 1))

    def plain(y: jax.Array, gate: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(y / (1 + jnp.abs(gate / 0.9) ** 6)))

    def ours(y: jax.Array, gate: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(gated_elephant(y, gate, 0.9, 6.0)))

    expected, got = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(y, gate) for f in (plain, ours))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_types_are_kept() -> None:
    x = jnp.asarray([0.5, -1.0, 3.0])
    assert elephant(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        exact = elephant(jnp.asarray(X, jnp.float64))
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, _closed_form(1.0, 8.0)[0], rtol=1e-14, atol=1e-300)
        slope = jax.vmap(jax.grad(elephant))(jnp.asarray(X, jnp.float64))
        np.testing.assert_allclose(slope, _closed_form(1.0, 8.0)[1], rtol=1e-13, atol=1e-300)


def test_nothing_but_the_inputs_is_kept() -> None:
    shape = (5, 7)
    y, gate = jnp.ones(shape), jnp.full(shape, 2.0)
    assert kept(gated_elephant, y, gate) == [shape, shape]
    assert kept(elephant, y) == [shape]
