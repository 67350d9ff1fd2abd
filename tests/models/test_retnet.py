"""RetNet: the promises of every model in its exact form, published sizes, initialisation, what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError, GenerationError
from ssm_jax.models import RetNetConfig, flops_per_token
from ssm_jax.nn.mixers.retention import log_decays
from tests.conformance.model import ModelConformance

TINY: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_value": 24, "d_mlp": 24}
SIZES = {
    "base": (512, 864, 6, 2),
    "300m": (1280, 2560, 12, 8),
    "medium": (1024, 1728, 16, 4),
    "xl": (2048, 3456, 24, 8),
    "3b": (2560, 4280, 32, 10),
    "7b": (4096, 6912, 32, 16),
    "13b": (5120, 8560, 40, 20),
    "65b": (8192, 13824, 64, 32),
}
"""Published size -> width, that of values and perceptron, layers, heads."""


class TestRetNet(ModelConformance):
    configs = {
        "published": RetNetConfig(**TINY, embedding_scale=True, embedding_norm=True),
        "plain_post_norm_deepnorm_tied": RetNetConfig(
            **TINY,
            mlp="plain",
            activation="gelu",
            decay="log_spaced",
            post_norm=True,
            deepnorm=True,
            tie_embeddings=True,
        ),
        "halves_with_scale": RetNetConfig(**TINY, rotary="halves", norm_scale=True, chunk_size=8),
    }


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    """Two tables; per layer q, k: D x D, v, g, out and the three of the perceptron: D x V, two norms; the norms at both ends."""
    D, V, layers, heads = SIZES[size]
    config = ssm_jax.build(f"retnet-{size}").config
    parameters = 2 * D * 50257 + layers * (2 * D * D + 6 * D * V + 2 * D) + 2 * D
    assert ssm_jax.count_parameters(config) == parameters
    assert (config.n_heads, config.embedding_scale, config.embedding_norm) == (heads, True, True)
    # Every matrix once per token, and per head an update and a read-out of keys x values.
    memories = layers * 2 * D * V // heads
    assert flops_per_token(config, 77) == 2 * (parameters - 2 * D * (layers + 1) - D * 50257 + memories)


def test_decays_of_both_rules() -> None:
    np.testing.assert_allclose(np.exp(log_decays("powers", 3)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], rtol=1e-15)
    np.testing.assert_allclose(np.exp(log_decays("log_spaced", 3)), [1 - 1 / 32, 1 - 1 / 128, 1 - 1 / 512], rtol=1e-14)


def test_initialisation_is_the_published_one() -> None:
    fields = {**TINY, "d_model": 64, "d_value": 128, "d_mlp": 96, "n_layers": 8}
    model = ssm_jax.build("retnet", **fields, deepnorm=True, post_norm=True)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer, mlp, beta = params["layers"]["mixer"], params["layers"]["mlp"], 64**-0.25

    def bound(kernel: Any) -> float:
        return float(np.abs(kernel).max())

    for name, expected in (
        ("q_proj", 2**-2.5 * (6 / 128) ** 0.5),
        ("k_proj", 2**-2.5 * (6 / 128) ** 0.5),
        ("v_proj", 2**-2.5 * (6 / 192) ** 0.5 * beta),
        ("g_proj", 2**-2.5 * (6 / 192) ** 0.5),
        ("out_proj", 2**-1 * (6 / 192) ** 0.5 * beta),
    ):
        assert 0.98 < bound(mixer[name]["kernel"]) / expected <= 1.0, name
    for name, expected in (("gate_proj", 64**-0.5 * beta), ("up_proj", 64**-0.5), ("down_proj", 96**-0.5 * beta)):
        assert 0.98 < bound(mlp[name]["kernel"]) / expected <= 1.0, name
    for table in (params["embed"]["embedding"], params["head"]["kernel"]):
        assert abs(float(np.std(table)) * 8 - 1) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, r"n_heads 3 does not divide d_model = 16"),
        ({"n_heads": 16, "d_value": 32}, r"d_model / n_heads = 16 / 16 = 1 is odd; retention turns keys in pairs"),
        ({"d_value": 25}, r"n_heads 2 does not divide d_value = 25"),
        ({"decay": "slow"}, r"model.decay"),
        (
            {"score_normaliser": "sum"},
            r"'model.score_normaliser' is 'sum' \(str\); it must be 'abs_sum' or 'sum_abs' or null",
        ),
        ({"score_normaliser": "sum_abs", "score_scale": False}, r"of scaled scores; set score_scale to True"),
        ({"chunk_size": 0}, r"chunk_size is 0; it must be at least 1, or null"),
        ({"norm_eps": -1.0}, r"norm_eps is -1.0; it must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ssm_jax.build("retnet", **{**TINY, **fields})


def test_whole_sequence_forms_take_no_state() -> None:
    model = ssm_jax.build("retnet", **TINY, score_normaliser="sum_abs")
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    _, state = model.apply(variables, tokens)
    with pytest.raises(ValueError, match="use score_normaliser=None"):
        model.apply(variables, tokens, state=state)
    with pytest.raises(GenerationError, match="score_normaliser=None, the exact form; the weights are the same"):
        ssm_jax.generate(model, variables["params"], [[1, 2]], 3)
    exact = ssm_jax.build("retnet", **TINY)
    assert exact.apply(variables, tokens, state=state)[0].shape == (1, 4, 64)
