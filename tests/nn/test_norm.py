"""The gated norm against its formula in float64, gradients included, and at gates where exp overflows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.nn.norm import GatedRMSNorm, gated_rms_norm
from tests.conformance.compare import assert_trees_close


def _formula(y: jax.Array, z: jax.Array, scale: jax.Array, groups: int, epsilon: float) -> jax.Array:
    v = (y * jax.nn.silu(z)).reshape(*y.shape[:-1], groups, -1)
    normalised = v / jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True) + epsilon)
    return normalised.reshape(y.shape) * scale


def _inputs(spread: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    y, z, weight = (rng.normal(size=(2, 5, 12)) for _ in range(3))
    return y, z * spread, rng.normal(size=12), weight


@pytest.mark.parametrize("groups", [1, 3])
def test_values_and_gradients_equal_the_formula(groups: int) -> None:
    *inputs, weight = _inputs()

    def value_and_gradients(function: Callable[..., jax.Array], dtype: type) -> tuple[jax.Array, ...]:
        def loss(*arrays: jax.Array) -> jax.Array:
            return jnp.sum(function(*arrays, groups, 1e-3) * weight.astype(dtype))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*(jnp.asarray(x, dtype) for x in inputs))

    with jax.enable_x64(True):
        expected = jax.tree.map(lambda x: np.asarray(x, np.float32), value_and_gradients(_formula, np.float64))
    got = jax.tree.map(np.asarray, value_and_gradients(gated_rms_norm, np.float32))
    assert_trees_close(got, expected, 2e-6, relative=True)


def test_gates_beyond_the_range_of_exp_stay_finite() -> None:
    y, z, scale, weight = (jnp.asarray(x, jnp.float32) for x in _inputs(spread=200.0))
    gradients = jax.grad(lambda *x: jnp.sum(gated_rms_norm(*x, 1, 1e-5) * weight), argnums=(0, 1, 2))(y, z, scale)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradients)
    np.testing.assert_allclose(
        gated_rms_norm(y, z, scale, 1, 1e-5), _formula(y, z, scale, 1, 1e-5), rtol=1e-5, atol=1e-6
    )


def test_bfloat16_statistics_are_float32() -> None:
    y, z, _, _ = (jnp.asarray(x, jnp.bfloat16) for x in _inputs())
    module = GatedRMSNorm(groups=3)
    variables = module.init(jax.random.key(0), y, z)
    out = module.apply(variables, y, z)
    assert out.dtype == jnp.bfloat16
    wide = _formula(y.astype(jnp.float32), z.astype(jnp.float32), variables["params"]["scale"], 3, 1e-5)
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
