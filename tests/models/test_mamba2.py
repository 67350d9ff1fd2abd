"""Mamba-2: the promises of every model, published sizes, published initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import Mamba2Config
from tests.conformance.model import ModelConformance

PARAMETERS = {
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
}


class TestMamba2(ModelConformance):
    configs = {
        "one_group": Mamba2Config(vocab_size=61, d_model=16, n_layers=2, d_state=8, headdim=8, chunk_size=16),
        "two_groups": Mamba2Config(
            vocab_size=48,
            d_model=16,
            n_layers=2,
            d_state=6,
            d_conv=3,
            headdim=8,
            ngroups=2,
            bias=True,
            conv_bias=False,
            tie_embeddings=False,
        ),
    }
    layouts = ("transformers", "mamba_ssm")


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert ssm_jax.count_parameters(ssm_jax.build(name).config) == parameters


def test_initialisation_is_the_published_one() -> None:
    model = ssm_jax.build("mamba2", vocab_size=64, d_model=64, n_layers=16, headdim=8)
    mixer = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["layers"]["mixer"]
    decay = np.exp(mixer["A_log"])
    assert decay.min() >= 1
    assert decay.max() <= 16
    assert abs(decay.mean() - 8.5) < 1
    dt = np.asarray(jax.nn.softplus(mixer["dt_bias"]))
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    np.testing.assert_array_equal(mixer["D"], 1.0)
    np.testing.assert_array_equal(mixer["norm"]["scale"], 1.0)


def test_step_size_limits_hold_in_every_mode() -> None:
    limits = {"dt_limit": (0.02, 0.3)}
    model = ssm_jax.build("mamba2", vocab_size=32, d_model=16, n_layers=2, d_state=8, headdim=8, **limits)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
    variables = model.init(jax.random.key(0), tokens)
    whole, _ = model.apply(variables, tokens)
    free, _ = ssm_jax.build(model.config, dt_limit=(0.0, float("inf"))).apply(variables, tokens)
    assert float(jnp.abs(whole - free).max()) > 1e-3
    state, outputs = None, []
    for step in range(9):
        logits, state = model.apply(variables, tokens[:, step : step + 1], state=state)
        outputs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"headdim": 48}, "headdim 48 does not divide expand . d_model = 128"),
        ({"headdim": 64, "ngroups": 3}, "ngroups 3 does not divide the 2 heads"),
        ({"dt_limit": [0.1]}, "'model.dt_limit' is .*it must be a list of 2 values"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_jax.build("mamba2", **{"vocab_size": 8, "d_model": 64, "n_layers": 1, **fields})
