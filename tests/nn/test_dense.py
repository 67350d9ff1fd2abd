"""Dense connections by themselves: fusion against its formula, dropout of the block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.nn.dense import Fusion
from tests.conformance.compare import assert_close

B, L, D, H, P = 2, 5, 6, 2, 3


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bottleneck", [None, 4])
@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_fusion_is_its_formula(linear: bool, bottleneck: int | None, epsilon: float | None) -> None:
    """In float64, every parameter random, each source with a matrix of its own."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, one, other = (jnp.asarray(rng.normal(size=(B, L, H, P))) for _ in range(3))
        u = jnp.asarray(rng.normal(size=(B, L, D)))
        fusion = Fusion(bottleneck, linear, epsilon, dtype=jnp.float64, param_dtype=jnp.float64)
        arguments = (x, u, (one, other), jnp.asarray(False))
        variables = fusion.init(jax.random.key(0), *arguments)
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), variables.get("params", {}))
        got = fusion.apply({"params": params}, *arguments)
        first = fusion.apply({"params": params}, *arguments[:3], jnp.asarray(True))
        params = jax.tree.map(np.asarray, params)

    sources = [np.asarray(one), np.asarray(other)]
    if linear:
        sources = [
            np.einsum("blhp,hpgq->blgq", source, params[f"source_{i}"]["kernel"]) for i, source in enumerate(sources)
        ]
    added = sources[0] + sources[1]
    if bottleneck is not None:
        hidden = silu(np.asarray(u) @ params["gate"]["down"]["kernel"])
        added = silu(np.einsum("blk,khp->blhp", hidden, params["gate"]["up"]["kernel"])) * added
    expected = np.asarray(x) + added
    if epsilon is not None:
        size = np.mean(np.square(expected), axis=(2, 3), keepdims=True)
        expected = expected / np.sqrt(size + epsilon) * params["norm"]["scale"]
    assert_close(got, expected, 1e-12)
    np.testing.assert_array_equal(first, x)


@pytest.mark.parametrize("family", ["dense_retnet", "dense_mamba"])
def test_dropout_is_of_training_alone(family: str) -> None:
    more = {"n_heads": 2, "key_gate_ratio": 4, "value_gate_ratio": 4} if family == "dense_retnet" else {"gate_ratio": 4}
    sizes: dict[str, Any] = {"vocab_size": 16, "d_model": 8, "n_layers": 2, **more}
    model, without = (ssm_jax.build(family, **sizes, dropout=rate) for rate in (0.5, 0.0))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    variables = model.init(jax.random.key(0), tokens)

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        return model.apply(variables, tokens, deterministic=False, rngs={"dropout": key})[0]

    one, again, other = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(model.apply(variables, tokens)[0], without.apply(variables, tokens)[0])
