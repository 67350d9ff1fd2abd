"""GPT-2: the promises of every model, published sizes and initialisation, the limit of its context."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError, GenerationError
from ssm_jax.models import GPT2Config, config_from_dict, flops_per_token
from tests.conformance.model import LENGTH, ModelConformance

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


class TestGPT2(ModelConformance):
    configs = {
        "tied": GPT2Config(vocab_size=61, d_model=16, n_layers=2, n_heads=4, n_positions=64, pad_vocab_size_multiple=8),
        "untied_exactly_full": GPT2Config(
            vocab_size=48,
            d_model=16,
            n_layers=2,
            n_heads=2,
            n_positions=LENGTH,
            d_mlp=24,
            activation="gelu",
            tie_embeddings=False,
        ),
    }
    layouts = ("transformers",)
    ineffective = ("k_proj/bias",)  # adds q . b to every score of a query, which its softmax does not see


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert ssm_jax.count_parameters(ssm_jax.build(name).config) == parameters


def test_initialisation_is_the_published_one() -> None:
    model = ssm_jax.build("gpt2", vocab_size=64, d_model=64, n_layers=8, n_heads=4, n_positions=256)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer, mlp = params["layers"]["mixer"], params["layers"]["mlp"]
    for kernel, std in (
        (params["embed"]["embedding"], 0.02),
        (params["embed_position"]["embedding"], 0.02),
        *((mixer[name]["kernel"], 0.02) for name in ("q_proj", "k_proj", "v_proj")),
        (mixer["out_proj"]["kernel"], 0.02 / 4),
        (mlp["up_proj"]["kernel"], 0.02),
        (mlp["down_proj"]["kernel"], 0.02 / 4),
    ):
        assert abs(float(np.std(kernel)) / std - 1) < 0.05
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"))


def test_operations_are_those_of_the_weights_and_of_the_keys_in_reach() -> None:
    config = ssm_jax.build("gpt2").config
    no_tables = PARAMETERS["gpt2"] - 1024 * 768  # the tied table counts once, as the head
    weights = no_tables - sum(  # less biases and norms
        (12 * (3 * 768 + 768 + 4 * 768 + 768 + 4 * 768), 2 * 768)
    )
    assert flops_per_token(config, 1) == 2 * (weights + 12 * 2 * 768)
    assert flops_per_token(config, 1024) - flops_per_token(config, 1) == 2 * 12 * 2 * 768 * 1023 / 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, "n_heads 3 does not divide d_model = 8"),
        ({"n_positions": 0}, "n_positions is 0; it must be at least 1"),
        ({"d_mlp": 0}, "d_mlp is 0; it must be at least 1"),
        ({"activation": "gelu_new"}, "'model.activation' is 'gelu_new'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_jax.build("gpt2", **{"vocab_size": 8, "d_model": 8, "n_layers": 1, "n_heads": 2, **fields})


def test_the_name_of_the_family_is_a_published_size_too() -> None:
    assert ssm_jax.build("gpt2").config == config_from_dict({"preset": "gpt2"})
    assert ssm_jax.build("gpt2", d_model=24, n_layers=1).config.n_heads == 12
    with pytest.raises(ConfigError, match=r"'model\.n_layers'.* required"):
        config_from_dict({"family": "gpt2", "vocab_size": 257, "d_model": 24})


@pytest.fixture(scope="module")
def short() -> Any:
    """A model of twelve positions, and its parameters."""
    model = ssm_jax.build("gpt2", vocab_size=16, d_model=8, n_layers=1, n_heads=2, n_positions=12)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_longer_documents_are_refused_where_values_can_be_read(short: Any) -> None:
    model, variables = short
    message = "A document of 13 tokens is longer than the 12 positions of this model"
    with pytest.raises(ValueError, match=message):
        jax.jit(model.apply)(variables, jnp.zeros((1, 13), jnp.int32))
    _, state = model.apply(variables, jnp.zeros((2, 8), jnp.int32))
    model.apply(variables, jnp.zeros((2, 4), jnp.int32), state)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.zeros((2, 5), jnp.int32), state)
    packed = jnp.concatenate([jnp.arange(12), jnp.arange(12)])[None]
    model.apply(variables, jnp.zeros_like(packed), positions=packed)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.zeros((1, 13), jnp.int32), positions=jnp.arange(13)[None])


def test_documents_that_a_state_has_no_room_for_are_refused_where_values_can_be_read(short: Any) -> None:
    model, variables = short
    state = model.init_state(1, capacity=9)
    assert state.layers.k.shape[-2] == 9
    message = (
        r"A document of 10 tokens does not fit into a state made by init_state\(capacity=9\); .* capacity=10 or more"
    )
    for apply in (model.apply, jax.jit(model.apply)):
        with pytest.raises(ValueError, match=message):
            apply(variables, jnp.zeros((1, 10), jnp.int32), state)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.zeros((1, 10), jnp.int32), state, jnp.arange(10)[None])
    _, full = model.apply(variables, jnp.zeros((1, 9), jnp.int32), state)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.zeros((1, 1), jnp.int32), full)
    beyond, _ = jax.jit(model.apply)(variables, jnp.zeros((1, 1), jnp.int32), full)
    assert bool(jnp.isnan(beyond).all())
    longer = model.init_state(1, capacity=1000)
    assert longer.layers.k.shape[-2] == 12, "no more than the model reads"


def test_longer_documents_are_not_a_number_inside_jit_and_the_next_one_is_whole(short: Any) -> None:
    model, variables = short
    apply = jax.jit(model.apply)
    tokens = jax.random.randint(jax.random.key(1), (1, 20), 0, 16)
    positions = jnp.concatenate([jnp.arange(14), jnp.arange(6)])[None]
    logits, _ = apply(variables, tokens, positions=positions)
    assert bool(jnp.isfinite(logits[:, :12]).all())
    assert bool(jnp.isnan(logits[:, 12:14]).all())
    np.testing.assert_allclose(logits[:, 14:], apply(variables, tokens[:, 14:])[0], atol=1e-5)
    _, full = apply(variables, tokens[:, :12])
    beyond, broken = apply(variables, tokens[:, 12:13], full)
    assert bool(jnp.isnan(beyond).all())
    again, _ = apply(variables, tokens[:, :5], broken, jnp.arange(5)[None])
    np.testing.assert_allclose(again, apply(variables, tokens[:, :5])[0], atol=1e-6)


def test_generation_beyond_the_context_is_refused_before_anything_runs(short: Any) -> None:
    model, variables = short
    assert ssm_jax.generate(model, variables["params"], [[1] * 5, [2]], 7).shape == (2, 7)
    assert sum(map(len, ssm_jax.stream(model, variables["params"], [1] * 5, 7))) == 7
    message = "prompt of 5 tokens and max_new_tokens = 8 exceed the 12 positions .* ask for at most 7 tokens"
    for call in (
        lambda: ssm_jax.generate(model, variables["params"], [[2], [1] * 5], 8),
        lambda: ssm_jax.stream(model, variables["params"], [1] * 5, 8),
    ):
        with pytest.raises(GenerationError, match=message):
            call()
