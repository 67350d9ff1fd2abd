"""silu and its gate against their formulas in float64, and what they keep for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.silu import gated_silu, silu
from tests.conformance.compare import assert_trees_close
from tests.conformance.residuals import kept

FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "alone": (silu, lambda x: x / (1 + jnp.exp(-x)), 1),
    "gate": (gated_silu, lambda y, x: y * x / (1 + jnp.exp(-x)), 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_equal_the_formula(name: str) -> None:
    function, formula, count = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    inputs, weight = [rng.normal(size=(3, 7)) * 4 for _ in range(count)], rng.normal(size=(3, 7))

    def both(function: Callable[..., Any], dtype: type) -> Any:
        arrays = tuple(jnp.asarray(x, dtype) for x in inputs)
        return jax.value_and_grad(lambda x: jnp.sum(function(*x) * weight.astype(dtype)))(arrays)

    with jax.enable_x64(True):
        expected = jax.tree.map(lambda x: np.asarray(x, np.float32), both(formula, np.float64))
    assert_trees_close(jax.tree.map(np.asarray, both(function, np.float32)), expected, 1e-6, relative=True)


def test_nothing_overflows() -> None:
    x = jnp.asarray([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    np.testing.assert_allclose(silu(x), jnp.maximum(x, 0), atol=1e-30)
    np.testing.assert_allclose(jax.vmap(jax.grad(silu))(x), [0, 0, 0, 0.5, 1, 1, 1], atol=1e-30)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_inputs_are_kept(name: str) -> None:
    function, _, count = FUNCTIONS[name]
    inputs = [jnp.full((3, 7), 0.5 + i) for i in range(count)]
    assert kept(function, *inputs) == [(3, 7)] * count
