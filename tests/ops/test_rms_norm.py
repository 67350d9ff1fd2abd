"""The root-mean-square norm against its formula in float64, gradients included, and what it keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.nn.norm import RMSNorm
from ssm_jax.ops.rms_norm import rms_norm
from tests.conformance.compare import assert_close, assert_trees_close
from tests.conformance.residuals import kept


def _formula(x: jax.Array, scale: jax.Array | None, epsilon: float) -> jax.Array:
    normalised = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)
    return normalised if scale is None else normalised * scale


@pytest.mark.parametrize("scaled", [True, False], ids=["scale", "no scale"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_values_and_gradients_equal_the_formula(scaled: bool, size: float) -> None:
    rng = np.random.default_rng(0)
    x, scale, weight = rng.normal(size=(2, 5, 12)) * size, rng.normal(size=12), rng.normal(size=(2, 5, 12))

    def both(function: Callable[..., Any], dtype: type) -> Any:
        arrays = (jnp.asarray(x, dtype), jnp.asarray(scale, dtype) if scaled else None)
        return jax.value_and_grad(lambda arrays: jnp.sum(function(*arrays, 1e-5) * weight.astype(dtype)))(arrays)

    with jax.enable_x64(True):
        expected = jax.tree.map(lambda x: np.asarray(x, np.float32), both(_formula, np.float64))
    assert_trees_close(jax.tree.map(np.asarray, both(rms_norm, np.float32)), expected, 3e-6, relative=True)


def test_kept_are_the_input_and_a_number_per_row() -> None:
    x, scale = jnp.ones((2, 5, 12)), jnp.ones(12)
    assert kept(lambda x, scale: rms_norm(x, scale, 1e-5), x, scale) == [(2, 5, 1), (2, 5, 12), (12,)]


def test_statistics_are_float32_and_the_result_is_rounded_once() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)) * 3, jnp.bfloat16)
    wide = _formula(x.astype(jnp.float32), None, 1e-6)
    assert_close(rms_norm(x, None, 1e-6, jnp.float32), wide, 1e-6)
    np.testing.assert_array_equal(rms_norm(x), rms_norm(x, None, 1e-6, jnp.float32).astype(jnp.bfloat16))
    assert jax.grad(lambda x: rms_norm(x).sum())(x).dtype == jnp.bfloat16


def test_several_axes_are_normalised_together_and_scaled_by_one_array_of_their_shape() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 4)), jnp.float32)
    norm = RMSNorm(1e-5, axes=2)
    scale = jnp.arange(12.0).reshape(3, 4) / 12
    assert jax.tree.map(jnp.shape, norm.init(jax.random.key(0), x)) == {"params": {"scale": (3, 4)}}
    got = norm.apply({"params": {"scale": scale}}, x)
    assert_close(got.reshape(2, 5, 12), _formula(x.reshape(2, 5, 12), scale.reshape(12), 1e-5), 1e-6)
    assert not RMSNorm(use_scale=False).init(jax.random.key(0), x)
