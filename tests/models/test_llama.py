"""LLaMA: the promises of every model, published sizes and initialisation, the limit of its context."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError, GenerationError
from ssm_jax.models import LlamaConfig, flops_per_token
from tests.conformance.compare import assert_close
from tests.conformance.model import LENGTH, ModelConformance

PARAMETERS = {
    "llama-9m": 9_021_568,
    "llama-60m": 58_176_000,
    "llama-130m": 134_259_456,
    "llama-250m": 247_524_096,
    "llama-350m": 368_174_080,
    "llama-1b": 1_339_492_352,
    "llama-3b": 2_686_343_680,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
}


class TestLlama(ModelConformance):
    configs = {
        "grouped": LlamaConfig(
            vocab_size=61,
            d_model=16,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_mlp=24,
            n_positions=64,
            pad_vocab_size_multiple=8,
        ),
        "tied_biases_wide_heads_exactly_full": LlamaConfig(
            vocab_size=48,
            d_model=16,
            n_layers=2,
            n_heads=2,
            head_dim=12,
            d_mlp=20,
            n_positions=LENGTH,
            rope_base=100.0,
            attention_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
            norm_eps=1e-3,
        ),
    }
    layouts = ("transformers",)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert ssm_jax.count_parameters(ssm_jax.build(name).config) == parameters


@pytest.mark.parametrize(
    ("name", "width"), [("llama-7b", 11008), ("llama-13b", 13824), ("llama-30b", 17920), ("llama-65b", 22016)]
)
def test_widths_of_the_perceptron_are_the_published_ones(name: str, width: int) -> None:
    assert ssm_jax.build(name).config.d_mlp_resolved == width


def test_initialisation_is_that_of_transformers() -> None:
    model = ssm_jax.build("llama", vocab_size=64, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            assert abs(float(np.std(leaf)) / 0.02 - 1) < 0.05


def test_operations_are_those_of_the_weights_and_of_the_keys_in_reach() -> None:
    config = ssm_jax.build("llama-60m", n_kv_heads=2, head_dim=80).config
    weights = ssm_jax.count_parameters(config) - 32100 * 512 - (2 * 8 + 1) * 512  # less the token table and norms
    assert flops_per_token(config, 1) == 2 * (weights + 8 * 2 * 8 * 80)
    assert flops_per_token(config, 1024) - flops_per_token(config, 1) == 2 * 8 * 2 * 8 * 80 * 1023 / 2
    assert flops_per_token(config, 5000) == flops_per_token(config, 1024)


def test_names_of_transformers_are_accepted() -> None:
    ours = LlamaConfig(50, 24, 3, 4, n_kv_heads=2, d_mlp=36, n_positions=99, rope_base=500.0, norm_eps=1e-5)
    theirs = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs |= {"num_key_value_heads": 2, "intermediate_size": 36, "max_position_embeddings": 99}
    theirs |= {"rope_theta": 500.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    assert ssm_jax.build("llama", **theirs).config == ours
    with pytest.raises(ConfigError, match=r"'model\.d_model' and its other name are both set"):
        ssm_jax.build("llama", **theirs, d_model=24)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, "n_heads 3 does not divide d_model = 8; choose one that does, or set head_dim"),
        ({"n_kv_heads": 3, "n_heads": 4}, "n_kv_heads 3 does not divide n_heads = 4"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0; it must be at least 1"),
        ({"head_dim": 3}, "head_dim is 3; rotary positions turn pairs"),
        ({"n_heads": 8}, "head_dim is 1; rotary positions turn pairs"),
        ({"d_mlp": 0}, "d_mlp is 0; it must be at least 1"),
        ({"n_positions": 0}, "n_positions is 0; it must be at least 1"),
        ({"rope_base": 1.0}, r"rope_base is 1\.0; it must be above 1"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_jax.build("llama", **{"vocab_size": 8, "d_model": 8, "n_layers": 1, "n_heads": 2, **fields})


@pytest.fixture(scope="module")
def short() -> Any:
    """A model of twelve positions, and its parameters."""
    model = ssm_jax.build("llama", vocab_size=16, d_model=8, n_layers=2, n_heads=2, d_mlp=12, n_positions=12)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_longer_documents_are_refused_where_values_can_be_read(short: Any) -> None:
    model, variables = short
    message = "A document of 13 tokens is longer than the 12 positions of this model"
    with pytest.raises(ValueError, match=message):
        jax.jit(model.apply)(variables, jnp.zeros((1, 13), jnp.int32))
    _, full = model.apply(variables, jnp.zeros((1, 12), jnp.int32))
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.zeros((1, 1), jnp.int32), full)
    with pytest.raises(GenerationError, match="exceed the 12 positions"):
        ssm_jax.generate(model, variables["params"], [[1] * 5], 8)
    assert ssm_jax.generate(model, variables["params"], [[1] * 5, [2]], 7).shape == (2, 7)


def test_longer_documents_are_not_a_number_inside_jit_and_the_next_one_is_whole(short: Any) -> None:
    """There is no table of positions to leave, and attention by blocks would begin anew."""
    model, variables = short
    apply = jax.jit(model.apply)
    tokens = jax.random.randint(jax.random.key(1), (1, 34), 0, 16)
    positions = jnp.concatenate([jnp.arange(28), jnp.arange(6)])[None]
    logits, state = apply(variables, tokens, positions=positions)
    assert bool(jnp.isfinite(logits[:, :12]).all())
    assert bool(jnp.isnan(logits[:, 12:28]).all())
    alone, alone_state = apply(variables, tokens[:, 28:])
    assert_close(logits[:, 28:], alone, 1e-5)
    going_on, _ = apply(variables, tokens[:, :3], state)
    assert_close(going_on, apply(variables, tokens[:, :3], alone_state)[0], 1e-5)
    _, full = apply(variables, tokens[:, :12])
    beyond, broken = apply(variables, tokens[:, 12:13], full)
    assert bool(jnp.isnan(beyond).all())
    again, _ = apply(variables, tokens[:, :5], broken, jnp.arange(5)[None])
    assert_close(again, apply(variables, tokens[:, :5])[0], 1e-6)


def test_a_longer_context_is_the_same_model(short: Any) -> None:
    """Angles are those of the position, whatever the number of positions."""
    model, variables = short
    longer, tokens = ssm_jax.build(model.config, n_positions=40), jnp.arange(12)[None]
    np.testing.assert_array_equal(longer.apply(variables, tokens)[0], model.apply(variables, tokens)[0])
