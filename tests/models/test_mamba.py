"""Mamba-1: the promises of every model, published sizes, published initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import MambaConfig
from tests.conformance.model import ModelConformance

PARAMETERS = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}


class TestMamba(ModelConformance):
    configs = {
        "tied": MambaConfig(vocab_size=61, d_model=16, n_layers=2, d_state=4),
        "untied_biases": MambaConfig(
            vocab_size=48,
            d_model=16,
            n_layers=2,
            d_state=6,
            d_conv=3,
            dt_rank=5,
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
    model = ssm_jax.build("mamba", vocab_size=64, d_model=64, n_layers=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer = params["layers"]["mixer"]
    np.testing.assert_allclose(np.exp(mixer["A_log"]), np.broadcast_to(np.arange(1, 17), (4, 128, 16)), rtol=1e-6)
    np.testing.assert_array_equal(mixer["D"], 1.0)
    dt = np.asarray(jax.nn.softplus(mixer["dt_bias"]))
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert 0.3 < np.mean(np.log(dt) < np.log(1e-2)) < 0.7, "log-uniform: half below the geometric mean"
    for kernel, bound in (
        (mixer["in_proj"]["kernel"], 64**-0.5),
        (mixer["dt_down"]["kernel"], 128**-0.5),
        (mixer["dt_up"]["kernel"], 4**-0.5),
        (mixer["out_proj"]["kernel"], 128**-0.5 / 2),
        (mixer["conv"]["kernel"], 0.5),
        (mixer["conv"]["bias"], 0.5),
    ):
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        assert abs(float(np.std(kernel)) / (bound / 3**0.5) - 1) < 0.15
    assert abs(float(jnp.std(params["embed"]["embedding"])) - 0.02) < 0.001
    assert not np.array_equal(mixer["in_proj"]["kernel"][0], mixer["in_proj"]["kernel"][1]), "layers draw apart"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_mode": 4}, "'model.d_mode' is unknown; did you mean 'd_model'"),
        ({"d_model": 8.5}, "'model.d_model' is 8.5 .float.; it must be int"),
        ({"d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"dt_rank": "automatic"}, "'model.dt_rank'"),
        ({"dtype": "float16"}, "'model.dtype' is 'float16'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_jax.build("mamba", **{"vocab_size": 8, "d_model": 8, "n_layers": 1, **fields})


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mamba-130m'"):
        ssm_jax.build("mamba-130")
