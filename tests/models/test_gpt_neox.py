"""GPT-NeoX: the promises of every model, the sizes of Pythia, initialisation, bad fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import GPTNeoXConfig, flops_per_token
from tests.conformance.model import LENGTH, ModelConformance

BODIES = {
    "pythia-14m": 1_189_888,
    "pythia-31m": 4_739_072,
    "pythia-70m": 18_915_328,
    "pythia-160m": 85_056_000,
    "pythia-410m": 302_311_424,
    "pythia-1b": 805_736_448,
    "pythia-1.4b": 1_208_602_624,
    "pythia-2.8b": 2_517_652_480,
    "pythia-6.9b": 6_444_163_072,
    "pythia-12b": 11_327_027_200,
}
"""Published numbers of parameters without the two vocabulary matrices."""
ROWS = {"pythia-6.9b": 50432, "pythia-12b": 50688}
"""Of these matrices, where they are not 50304."""


class TestGPTNeoX(ModelConformance):
    configs = {
        "parallel": GPTNeoXConfig(
            vocab_size=61, d_model=16, n_layers=2, n_heads=2, n_positions=64, pad_vocab_size_multiple=8
        ),
        "one_after_the_other_tied_exactly_full": GPTNeoXConfig(
            vocab_size=48,
            d_model=16,
            n_layers=2,
            n_heads=4,
            d_mlp=24,
            n_positions=LENGTH,
            rotary_fraction=1.0,
            rope_base=100.0,
            parallel_residual=False,
            activation="gelu_tanh",
            attention_bias=False,
            tie_embeddings=True,
            norm_eps=1e-3,
        ),
    }
    layouts = ("transformers",)


@pytest.mark.parametrize(("name", "body"), BODIES.items())
def test_published_sizes_have_the_published_number_of_parameters(name: str, body: int) -> None:
    config = ssm_jax.build(name).config
    rows = ROWS.get(name, 50304)
    assert (config.padded_vocab_size, config.n_positions) == (rows, 2048)
    assert ssm_jax.count_parameters(config) == body + 2 * rows * config.d_model


def test_pythia_70m_is_the_published_model() -> None:
    config = ssm_jax.build("pythia-70m").config
    assert ssm_jax.count_parameters(config) == 70_426_624
    assert (config.n_layers, config.d_model, config.n_heads, config.d_mlp_resolved) == (6, 512, 8, 2048)
    assert (config.head_dim, config.rotary_width, config.parallel_residual) == (64, 16, True)


def test_initialisation_is_the_published_one() -> None:
    model = ssm_jax.build("gpt_neox", vocab_size=256, d_model=64, n_layers=8, n_heads=4)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    small, wang = (2 / (5 * 64)) ** 0.5, 2 / 8 / 64**0.5
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"))
        else:
            std = wang if path[-2].key in ("out_proj", "down_proj") else small
            assert abs(float(np.std(leaf)) / std - 1) < 0.05


def test_operations_are_those_of_the_weights_and_of_the_keys_in_reach() -> None:
    config = ssm_jax.build("pythia-70m").config
    vectors = 6 * (3 * 512 + 512 + 2048 + 512 + 4 * 512) + 2 * 512  # biases and norms
    weights = ssm_jax.count_parameters(config) - 50304 * 512 - vectors
    assert flops_per_token(config, 1) == 2 * (weights + 6 * 2 * 512)
    assert flops_per_token(config, 2048) - flops_per_token(config, 1) == 2 * 6 * 2 * 512 * 2047 / 2
    assert flops_per_token(config, 5000) == flops_per_token(config, 2048)


def test_names_of_transformers_are_accepted() -> None:
    ours = GPTNeoXConfig(50, 32, 3, 4, d_mlp=36, n_positions=99, rotary_fraction=0.5, parallel_residual=False)
    theirs = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs |= {"intermediate_size": 36, "max_position_embeddings": 99, "rotary_pct": 0.5, "rotary_emb_base": 10_000.0}
    theirs |= {"use_parallel_residual": False, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "hidden_dropout": 0.0}
    assert ssm_jax.build("gpt_neox", **theirs).config == ours


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, "n_heads 3 does not divide d_model = 16; choose one that does"),
        ({"d_mlp": 0}, "d_mlp is 0; it must be at least 1"),
        ({"n_positions": 0}, "n_positions is 0; it must be at least 1"),
        ({"rope_base": 1.0}, r"rope_base is 1\.0; it must be above 1"),
        ({"rotary_fraction": 0.0}, r"rotary_fraction is 0\.0; it must be above 0 and at most 1"),
        ({"rotary_fraction": 1.5}, r"rotary_fraction is 1\.5; it must be above 0 and at most 1"),
        ({"rotary_fraction": 0.4}, r"rotary_fraction 0\.4 of heads of width 8 is 3; rotary positions turn pairs"),
        ({"n_heads": 8}, r"rotary_fraction 0\.25 of heads of width 2 is 0; .* even and at least 2"),
        ({"activation": "gelu_new"}, "'model.activation' is 'gelu_new'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_jax.build("gpt_neox", **{"vocab_size": 8, "d_model": 16, "n_layers": 1, "n_heads": 2, **fields})


def test_longer_documents_are_refused() -> None:
    model = ssm_jax.build("gpt_neox", vocab_size=16, d_model=16, n_layers=1, n_heads=2, n_positions=12)
    with pytest.raises(ValueError, match="A document of 13 tokens is longer than the 12 positions of this model"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
