"""DenseRetNet: the promises of every model, published sizes, and what fusion is and is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import DenseRetNetConfig, flops_per_token
from tests.conformance.compare import assert_close
from tests.conformance.model import ModelConformance

TINY: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "n_layers": 4, "n_heads": 2}
GATES = {"key_gate_ratio": 8, "value_gate_ratio": 4}
PARAMETERS = {
    "dense-retnet-350m": 367_965_696,
    "dense-retnet-1.3b": 1_334_018_560,
    "dense-retnet-350m-hub": 373_277_184,
    "dense-retnet-1.3b-hub": 1_387_783_680,
}


class TestDenseRetNet(ModelConformance):
    configs = {
        "two_sources": DenseRetNetConfig(**TINY, **GATES, dense_layers=2),
        "linear_sources_no_gate_tied": DenseRetNetConfig(
            **{**TINY, "n_layers": 3}, **GATES, gate=False, projection="linear", tie_embeddings=True
        ),
    }


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert ssm_jax.count_parameters(ssm_jax.build(name).config) == parameters


@pytest.mark.parametrize("fields", [{}, {"gate": False, "projection": "linear"}], ids=["gated", "linear"])
def test_operations_are_those_of_the_matrices_and_of_the_memory(fields: dict[str, Any]) -> None:
    model = ssm_jax.build("dense_retnet", **TINY, **GATES, dense_layers=2, **fields)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    kernels = [leaf.size for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
    memories = 4 * 2 * 8 * 32 // 2
    assert flops_per_token(model.config, 77) == 2 * (sum(kernels) + memories)


def logits_of(model: Any, params: Any, tokens: jax.Array) -> jax.Array:
    return jax.jit(lambda params: model.apply({"params": params}, tokens)[0])(params)


def test_layers_reach_as_far_down_as_they_say() -> None:
    """A layer's own keys change the layers up to m above it directly: with the stream cut off, none beyond."""
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    model = ssm_jax.build("dense_retnet", **TINY, **GATES, dense_layers=1)
    params = model.init(jax.random.key(0), tokens)["params"]
    mute = jax.tree.map(jnp.array, params)
    # Layers 0 to 2 add nothing to the stream, so that all they do is hand features upward.
    mute["layers"]["mixer"]["out_proj"]["kernel"] = params["layers"]["mixer"]["out_proj"]["kernel"].at[:3].set(0)
    expected = logits_of(model, mute, tokens)
    for changed_layer, differs in ((1, False), (2, True)):
        kernel = mute["layers"]["mixer"]["k_proj"]["kernel"]
        changed = jax.tree.map(lambda leaf: leaf, mute)
        changed["layers"]["mixer"]["k_proj"]["kernel"] = kernel.at[changed_layer].mul(2)
        difference = float(jnp.abs(logits_of(model, changed, tokens) - expected).max())
        assert (difference > 1e-6) == differs, (changed_layer, difference)


def test_sources_are_not_fused_values() -> None:
    """What layer 1 adds to its keys does not reach layer 2, which sees layer 1's own keys."""
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    model = ssm_jax.build("dense_retnet", **TINY, **GATES, dense_layers=1)
    params = model.init(jax.random.key(0), tokens)["params"]
    params["layers"]["mixer"]["out_proj"]["kernel"] = params["layers"]["mixer"]["out_proj"]["kernel"].at[:3].set(0)
    expected = logits_of(model, params, tokens)
    for layer, differs in ((2, False), (3, True)):
        changed = jax.tree.map(jnp.array, params)
        norm = changed["layers"]["mixer"]["v_fusion"]["norm"]
        norm["scale"] = norm["scale"].at[layer, :, 0].add(1.0)
        difference = float(jnp.abs(logits_of(model, changed, tokens) - expected).max())
        assert (difference > 1e-6) == differs, (layer, difference)


def test_the_first_layer_neither_fuses_nor_norms() -> None:
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    model = ssm_jax.build("dense_retnet", **{**TINY, "n_layers": 1}, **GATES, dense_layers=2)
    plain = ssm_jax.build("dense_retnet", **{**TINY, "n_layers": 1}, dense_layers=0)
    params = model.init(jax.random.key(0), tokens)["params"]
    without = jax.tree.map(jnp.array, params)
    for name in ("k_fusion", "v_fusion"):
        del without["layers"]["mixer"][name]
    assert_close(logits_of(model, params, tokens), logits_of(plain, without, tokens), 0.0)
    gradient = jax.grad(lambda params: logits_of(model, params, tokens).sum())(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["layers"]["mixer"]["k_fusion"]))


def test_decoding_needs_no_more_state_than_without_fusion() -> None:
    dense, plain = (
        ssm_jax.build("dense_retnet", **TINY, dense_layers=m, key_gate_ratio=4, value_gate_ratio=4) for m in (3, 0)
    )
    shapes = [jax.tree.map(jnp.shape, model.init_state(2)) for model in (dense, plain)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 8}, r"d_key / n_heads = 8 / 8 = 1 is odd"),
        ({"d_value": 33}, r"n_heads 2 does not divide d_value = 33"),
        ({"dense_layers": -1}, r"dense_layers is -1"),
        ({"key_gate_ratio": 32}, r"gate ratios 32 and 4 leave no feature of d_model = 16"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ssm_jax.build("dense_retnet", **{**TINY, **GATES, **fields})
