"""DenseMamba: the promises of every model, an oracle that goes state by state and token by token, and its relation to Mamba."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import DenseMambaConfig
from tests.conformance.compare import assert_close
from tests.conformance.jaxpr import array_sizes
from tests.conformance.model import ModelConformance

TINY: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "n_layers": 4, "d_state": 4, "gate_ratio": 4}


class TestDenseMamba(ModelConformance):
    configs = {
        "published_choices": DenseMambaConfig(**{**TINY, "n_layers": 3}),
        "state_gate_linear_untied": DenseMambaConfig(
            **{**TINY, "n_layers": 2}, dense_layers=1, gate="state", projection="linear", tie_embeddings=False
        ),
    }


def drawn(model: Any, seed: int = 0) -> Any:
    """Parameters of size one half everywhere, so that every part has an effect."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return treedef.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def oracle(config: DenseMambaConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of one row from the formulas: token after token, layer after layer, every hidden state [E, N] at hand. float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers, mixer = p["layers"], p["layers"]["mixer"]
    E, N, K, m = config.d_inner, config.d_state, config.d_conv, config.dense_layers
    hidden = np.zeros((config.n_layers, E, N))
    windows = np.zeros((config.n_layers, K, E))

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale

    logits = []
    for token in tokens:
        stream = p["embed"]["embedding"][token]
        for layer in range(config.n_layers):
            w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], mixer)
            u = norm(stream, layers["norm"]["scale"][layer])
            x, z = np.einsum("d,dke->ke", u, w["in_proj"]["kernel"])
            windows[layer] = np.concatenate([windows[layer][1:], x[None]])
            x = silu(np.sum(windows[layer] * w["conv"]["kernel"], axis=0) + w["conv"]["bias"])
            dt = np.log1p(np.exp(x @ w["dt_down"]["kernel"] @ w["dt_up"]["kernel"] + w["dt_bias"]))
            B, C = x @ w["B_proj"]["kernel"], x @ w["C_proj"]["kernel"]
            A = -np.exp(w["A_log"])
            hidden[layer] = np.exp(dt[:, None] * A) * hidden[layer] + (dt * x)[:, None] * B
            gate = np.ones(E if config.gate == "channel" else N)
            if config.gate is not None:
                gate = silu(silu(u @ w["gate"]["down"]["kernel"]) @ w["gate"]["up"]["kernel"])
            fused = hidden[layer].copy()
            for i in range(min(m, layer)):
                source = hidden[layer - 1 - i]
                if config.projection == "linear":
                    source = source @ w[f"source_{i}"]["kernel"].T
                fused += source * (gate[:, None] if config.gate == "channel" else gate)
            y = (fused @ C + w["D"] * x) * silu(z)
            stream = stream + y @ w["out_proj"]["kernel"]
        features = norm(stream, p["norm_f"]["scale"])
        logits.append(features @ (p["embed"]["embedding"].T if config.tie_embeddings else p["head"]["kernel"]))
    return np.stack(logits)


@pytest.mark.parametrize(
    ("dense_layers", "gate", "projection"),
    [
        (0, None, "identity"),
        (1, "state", "linear"),
        (2, "channel", "identity"),
        (5, "channel", "linear"),
        (2, None, "identity"),
    ],
)
def test_logits_are_those_of_the_oracle(dense_layers: int, gate: Any, projection: Any) -> None:
    model = ssm_jax.build("dense_mamba", **TINY, dense_layers=dense_layers, gate=gate, projection=projection)
    params = drawn(model)
    tokens = np.random.default_rng(0).integers(0, 64, 40)
    with jax.default_matmul_precision("highest"):
        logits, state = model.apply({"params": params}, jnp.asarray(tokens[None, :30], jnp.int32))
        more = []
        for token in tokens[30:]:
            step, state = model.apply({"params": params}, jnp.asarray([[token]], jnp.int32), state=state)
            more.append(step)
    expected = oracle(model.config, params, tokens)
    size = np.abs(expected).max()
    assert_close(jnp.concatenate([logits, *more], axis=1)[0] / size, expected / size, 2e-5)
    if dense_layers:
        mamba = oracle(ssm_jax.build(model.config, dense_layers=0).config, params, tokens)
        assert np.abs(mamba - expected).max() > 0.05 * size


@pytest.mark.parametrize("length", [1, 20])
def test_without_sources_it_is_mamba_bit_for_bit(length: int) -> None:
    fields = {key: value for key, value in TINY.items() if key != "gate_ratio"}
    dense, plain = ssm_jax.build("dense_mamba", **TINY, dense_layers=0), ssm_jax.build("mamba", **fields)
    params, tokens = drawn(plain), jnp.arange(length, dtype=jnp.int32)[None]
    results = [
        jax.jit(lambda params, model=model: model.apply({"params": params}, tokens))(params) for model in (dense, plain)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_closed_gates_leave_mamba() -> None:
    fields = {key: value for key, value in TINY.items() if key != "gate_ratio"}
    dense, plain = ssm_jax.build("dense_mamba", **TINY), ssm_jax.build("mamba", **fields)
    params, tokens = drawn(dense), jnp.arange(20, dtype=jnp.int32)[None]
    gate = params["layers"]["mixer"]["gate"]
    gate["up"]["kernel"] = jnp.zeros_like(gate["up"]["kernel"])
    without = jax.tree.map(lambda leaf: leaf, params)
    del without["layers"]["mixer"]["gate"]
    results = [
        jax.jit(lambda params, model=model: model.apply({"params": params}, tokens)[0])(p)
        for model, p in ((dense, params), (plain, without))
    ]
    assert_close(results[0], results[1], 1e-6 * float(jnp.abs(results[1]).max()))


def test_no_array_holds_a_hidden_state_per_token() -> None:
    config = DenseMambaConfig(vocab_size=64, d_model=32, n_layers=3, d_state=16)
    model = ssm_jax.build(config)
    tokens = jnp.zeros((1, 512), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    largest, *_ = array_sizes(jax.grad(lambda params: model.apply({"params": params}, tokens)[0].sum()), params)
    per_layer = 512 * config.d_inner * config.d_state
    assert largest[0] < per_layer, largest


def test_decoding_needs_no_more_state_than_mamba() -> None:
    fields = {key: value for key, value in TINY.items() if key != "gate_ratio"}
    models = ssm_jax.build("dense_mamba", **TINY, dense_layers=3), ssm_jax.build("mamba", **fields)
    dense, plain = (jax.tree.map(jnp.shape, model.init_state(2)) for model in models)
    assert dense == plain


@pytest.mark.parametrize(("name", "parameters"), [("dense-mamba-360m", 360e6), ("dense-mamba-1.3b", 1.3e9)])
def test_sizes_are_near_those_that_the_paper_names(name: str, parameters: float) -> None:
    assert abs(ssm_jax.count_parameters(ssm_jax.build(name).config) / parameters - 1) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_layers": -1}, r"dense_layers is -1"),
        ({"gate_ratio": 17}, r"gate_ratio 17 leaves no feature of d_model = 16"),
        ({"gate": "head"}, r"model.gate"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ssm_jax.build("dense_mamba", **{**TINY, **fields})
