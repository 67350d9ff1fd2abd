"""RetNet: the promises of every model in its exact form, published sizes, initialisation, what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import RetNetConfig
from ssm_jax.nn.mixers.retention import log_decays
from tests.conformance.model import ModelConformance

TINY: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_value": 24, "d_mlp": 24}
# Two tables; per layer q, k: D x D, v, g, out and the three of the perceptron: D x V, two norms; the norms at both ends.
PARAMETERS = {
    "retnet-base": 512 * 50257 * 2 + 6 * (2 * 512**2 + 6 * 512 * 864 + 2 * 512) + 2 * 512,
    "retnet-xl": 2048 * 50257 * 2 + 24 * (2 * 2048**2 + 6 * 2048 * 3456 + 2 * 2048) + 2 * 2048,
}


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
    # A norm per head takes the size of keys and values out again, but for its epsilon.
    tolerance = 5e-5


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes(name: str, parameters: int) -> None:
    assert ssm_jax.count_parameters(ssm_jax.build(name).config) == parameters


@pytest.mark.parametrize("size", ["base", "300m", "medium", "xl", "3b", "7b", "13b", "65b"])
def test_every_size_can_be_built(size: str) -> None:
    model = ssm_jax.build(f"retnet-{size}")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert shapes["params"]["layers"]["mixer"]["q_proj"]["kernel"].shape[-1] == (160 if size == "300m" else 256)


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
        ({"score_normaliser": "sum"}, r"model.score_normaliser"),
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
    exact = ssm_jax.build("retnet", **TINY)
    assert exact.apply(variables, tokens, state=state)[0].shape == (1, 4, 64)
