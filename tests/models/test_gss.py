"""Gated state spaces: the promises of every model, goldens, and what depends on parameters alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssm_jax
from ssm_jax import ops, optim
from ssm_jax.errors import ConfigError
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import GSSConfig, config_from_dict
from ssm_jax.models.registry import family_of
from ssm_jax.nn.block import Block
from ssm_jax.training.losses import seen
from ssm_jax.training.state import create
from ssm_jax.training.step import make_step
from tests.conformance.compare import assert_close, assert_trees_close
from tests.conformance.golden import GOLDENS, apply, load_golden
from tests.conformance.model import ModelConformance

SMALL: dict[str, Any] = {"vocab_size": 48, "d_model": 16, "n_layers": 2, "dss_kernel_N": 12, "dss_kernel_H": 8}
FOLDERS = ("gss/s1_even16", "gss/s2_odd37_patched", "gss/s3_len1_patched_noexp")
LOGITS, GRADIENTS = 2e-5, 1e-4


class TestGSS(ModelConformance):
    configs = {
        "as_the_package": GSSConfig(**SMALL, chunk_size=8),
        "slow_accurate_noexp_tied_patched": GSSConfig(
            **SMALL,
            dim_expansion_factor=2.0,
            dss_kernel_lambda_imag_exp=False,
            final_norm=True,
            tie_embeddings=True,
            init="slow",
            memory=16,  # states of size 1, as the tolerance takes them to be
            accurate=True,
        ),
    }
    layouts = ("gated_state_spaces", "naxalpha")


class TestHybrid(ModelConformance):
    """One layer in two attends within chunks of 5 tokens."""

    configs = {
        "hybrid": GSSConfig(
            **{**SMALL, "n_layers": 4}, attention_every=2, attention_heads=2, attention_chunk=5, init="slow", memory=16
        )
    }
    layouts = ("ssm_jax",)


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_logits_in_every_form(folder: str) -> None:
    """One call, chunks, and one token after the other."""
    model, params, io = load_golden(folder)
    tokens, expected = io["input_ids"], io["logits"]
    assert_close(apply(model, params, tokens)[0], expected, LOGITS)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    chunked = ssm_jax.build(model.config, chunk_size=5)
    assert_close(apply(chunked, params, tokens, None, positions)[0], expected, LOGITS)
    state, logits = model.init_state(tokens.shape[0]), []
    for t in range(tokens.shape[1]):
        one, state = apply(model, params, tokens[:, t : t + 1], state)
        logits.append(one)
    assert_close(np.concatenate(logits, axis=1), expected, LOGITS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_loss_and_every_gradient(folder: str) -> None:
    model, params, io = load_golden(folder)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        features, _ = model.apply({"params": params}, jnp.asarray(io["input_ids"]), method="features")
        labels = jnp.asarray(io["labels"])
        total, weight = ops.linear_cross_entropy(
            features, model.readout(params), labels, jnp.ones(labels.shape, jnp.float32)
        )
        return total / weight

    value, gradients = jax.value_and_grad(loss)(params)
    assert_close(value, io["loss"], 1e-5)
    layout = open_folder(GOLDENS / folder).layout
    published = {
        layout.spelling(model.config, name): tensor.load()
        for name, tensor in to_tensors(layout.tensors, gradients).items()
    }
    expected = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
    assert set(published) == set(expected)
    for name, value in expected.items():
        assert_close(published[name], value, GRADIENTS * float(np.abs(value).max()))


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_kernels_and_layers(folder: str) -> None:
    model, params, io = load_golden(folder)
    config, length = model.config, io["input_ids"].shape[1]
    derived = family_of(config).derive(config, params, length, False)["layers"]["mixer"]["kernel"]
    layer = family_of(config).layer(config)
    h = params["embed"]["embedding"][io["input_ids"]]
    for i in range(config.n_layers):
        assert_close(derived[i], io[f"kernel_{i}"], 2e-5)
        h, _ = layer.apply({"params": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])}, h, None, None)
        assert_close(h, io[f"block_{i}_out"], 2e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_reversed_block(folder: str) -> None:
    """A block that runs from the last token to the first is the block between two flips."""
    model, params, io = load_golden(folder)
    layer = family_of(model.config).layer(model.config)
    assert isinstance(layer, Block)
    h = params["embed"]["embedding"][io["input_ids"]]
    first = {"params": jax.tree.map(lambda leaf: leaf[0], params["layers"])}
    flipped, _ = layer.apply(first, h[:, ::-1], None, None)
    assert_close(flipped[:, ::-1], io["reverse_block_0_out"], 2e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_greedy_tokens(folder: str) -> None:
    model, params, io = load_golden(folder)
    prompt, expected = io["greedy_prompt"], io["greedy_tokens"]
    tokens = ssm_jax.generate(model, params, prompt, max_new_tokens=expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)


def test_golden_tokens_past_the_window_of_the_original() -> None:
    """It sees the last 24 tokens only; a carried state does not forget, and writes something else."""
    model, params, io = load_golden("gss/s2_odd37_patched")
    prompt, expected = io["greedy_prompt"], io["greedy_window_tokens"]
    count = expected.shape[1]
    assert prompt.shape[1] + count > 24
    np.testing.assert_array_equal(ssm_jax.generate(model, params, prompt, max_new_tokens=count, window=24), expected)
    assert (ssm_jax.generate(model, params, prompt, max_new_tokens=count) != expected).any()


def test_parameter_count_of_the_published_size() -> None:
    config = ssm_jax.build("gss-708m").config
    assert ssm_jax.count_parameters(config) == 707_947_264
    layers = jax.eval_shape(ssm_jax.build(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    block = sum(leaf.size for leaf in jax.tree.leaves(layers["params"]["layers"])) // config.n_layers
    assert block == 22_796_736


def test_names_of_the_package_are_accepted() -> None:
    theirs = ssm_jax.build("gss", num_tokens=48, dim=16, depth=2, dss_kernel_N=12, dss_kernel_H=8)
    assert theirs.config == GSSConfig(**SMALL)
    assert config_from_dict({"family": "gss", "num_tokens": 48, "dim": 16, "depth": 2}).n_layers == 2
    assert ssm_jax.build("gss-708m", depth=2).config.n_layers == 2
    assert ssm_jax.build(theirs.config, depth=5).config == dataclasses.replace(theirs.config, n_layers=5)
    with pytest.raises(ConfigError, match=r"'model\.d_model' and its other name are both set"):
        ssm_jax.build("gss", num_tokens=48, dim=16, d_model=16, depth=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dss_kernel_n": 4}, "'model.dss_kernel_n' is unknown; did you mean 'dss_kernel_N'"),
        ({"dim_expansion_factor": 0.01}, "d_inner is 0; it must be at least 1"),
        ({"init": "hippo"}, "'model.init' is 'hippo'"),
        ({"memory": 1}, "memory is 1; it must be at least 3 tokens"),
        ({"attention_every": 1}, r"attention_every is 1; it must be 0 \(no attention\) or at least 2"),
        ({"attention_every": 4}, "n_layers is 2; with attention every 4 layers it must be a multiple"),
        ({"attention_every": 2, "attention_heads": 3}, "with attention_heads = 3 it must be a multiple of 6"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssm_jax.build("gss", **{**SMALL, **fields})


@pytest.mark.parametrize(("factor", "width", "inner"), [(1.7, 32, 54), (0.29, 100, 28), (4.0, 16, 64)])
def test_the_inner_width_is_truncated(factor: float, width: int, inner: int) -> None:
    assert GSSConfig(vocab_size=8, d_model=width, n_layers=1, dim_expansion_factor=factor).d_inner == inner


def test_initialisation_is_the_packages() -> None:
    model = ssm_jax.build("gss", vocab_size=300, d_model=64, n_layers=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer = params["layers"]["mixer"]
    for drawn in (
        *(mixer[name] for name in ("C_real", "C_imag", "Lambda_real", "Lambda_imag")),
        params["embed"]["embedding"],
    ):
        assert abs(float(jnp.std(drawn)) - 1) < 0.05
    bounds = {"u_proj": 64, "v_proj": 64, "gate_proj": 256, "out_proj": 256}
    uniform = [(mixer[name]["kernel"], fan_in**-0.5) for name, fan_in in bounds.items()]
    for leaf, bound in (*uniform, (mixer["out_proj"]["bias"], 256**-0.5), (params["head"]["kernel"], 64**-0.5)):
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        assert abs(float(np.std(leaf)) / (bound / 3**0.5) - 1) < 0.15
    assert not np.array_equal(mixer["C_real"][0], mixer["C_real"][1]), "layers draw apart"


def test_slow_modes_remember_and_keep_the_signal_at_unit_size() -> None:
    """White noise keeps its variance, and a token still has influence after a thousand others; by default it has none."""
    shares = {}
    for init in ("reference", "slow"):
        config = GSSConfig(vocab_size=8, d_model=32, n_layers=1, init=init, memory=4096, chunk_size=8192)
        params = ssm_jax.build(config).init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
        kernel = family_of(config).derive(dataclasses.replace(config, chunk_size=8192), params, 8192, False)["layers"][
            "mixer"
        ]["kernel"][0]
        energy = jnp.square(kernel)
        shares[init] = float(energy[1024:].sum() / energy.sum())
        if init == "slow":
            assert abs(float(jnp.mean(jnp.sum(energy, axis=0))) - 1) < 0.1
    assert shares["reference"] < 1e-6
    assert shares["slow"] > 0.03


def test_what_follows_from_parameters_alone_may_be_computed_once() -> None:
    """The same logits and, pulled back, the same gradients; the kernel and coefficients given are those that are used."""
    config = GSSConfig(**SMALL)
    model, family = ssm_jax.build(config), family_of(config)
    tokens = jax.random.randint(jax.random.key(2), (2, 20), 0, 48)
    params = jax.jit(model.init)(jax.random.key(3), tokens)["params"]

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.square(model.apply({"params": params}, tokens)[0]))

    derived, pullback = jax.vjp(lambda params: family.derive(config, params, 20, False), params)
    value, gradients = jax.value_and_grad(loss)(params)
    once, d_derived = jax.value_and_grad(loss)(derived)
    np.testing.assert_allclose(once, value, rtol=1e-5)
    assert_trees_close(pullback(d_derived)[0], gradients, 1e-4, relative=True)
    unused = d_derived["layers"]["mixer"]
    assert not any(unused[name].any() for name in ("C_real", "C_imag"))


def test_the_slowest_layer_of_a_hybrid_looks_no_further_than_its_chunk() -> None:
    """Operations grow with the context up to the chunk; parameters are those of 3 gated layers and a transformer block."""
    config = GSSConfig(vocab_size=64, d_model=32, n_layers=8, attention_every=4, attention_heads=2, attention_chunk=64)
    short, chunk, long = (ssm_jax.models.flops_per_token(config, context) for context in (1, 64, 4096))
    assert short < chunk == long
    plain = GSSConfig(vocab_size=64, d_model=32, n_layers=8)
    assert ssm_jax.models.flops_per_token(plain, 1) == ssm_jax.models.flops_per_token(plain, 4096)
    params = jax.eval_shape(ssm_jax.build(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert sorted(params["layers"]) == ["members_0", "members_1", "members_2", "members_3"]
    assert {"mlp", "mlp_norm"} <= set(params["layers"]["members_3"])


@pytest.mark.parametrize("frozen", [(), (r"Lambda", r"C_real")], ids=["all_trained", "modes_frozen"])
@pytest.mark.parametrize("joined", [False, True])
def test_microbatches_change_nothing(frozen: tuple[str, ...], joined: bool) -> None:
    """One update with the kernels computed once and used twice is the update of the whole batch."""
    config, optim_config = GSSConfig(**SMALL, final_norm=True), optim.OptimConfig(freeze=frozen, schedule="constant")
    model = ssm_jax.build(config)
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, 48, (4, 24)).astype(np.int32)
    row = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.tile(np.r_[np.arange(10), np.arange(14)].astype(np.int32), (4, 1)),
        "weights": rng.random((4, 24)).astype(np.float32),
    }
    batch = jax.tree.map(jnp.asarray, seen(row, joined))
    state, fixed = create(jax.random.key(7), jnp.int32(10), model=model, config=optim_config)
    updates = [jax.jit(make_step(model, optim_config, parts))(state, fixed, batch) for parts in (1, 2)]
    (whole, metrics), (halves, same) = updates
    assert_close(same["loss"], metrics["loss"], 1e-5)
    assert_close(same["grad_norm"], metrics["grad_norm"], 1e-5 * float(metrics["grad_norm"]))
    moments = [optax.tree.get(each.opt_state, "mu") for each in (whole, halves)]
    assert_trees_close(moments[1], moments[0], 1e-5, relative=True)


def test_bfloat16_keeps_the_state_space_in_float32() -> None:
    config = GSSConfig(**SMALL, dtype="bfloat16")
    model = ssm_jax.build(config)
    tokens = jnp.arange(30, dtype=jnp.int32)[None]
    params = model.init(jax.random.key(4), tokens)["params"]
    low, state = model.apply({"params": params}, tokens)
    full, _ = ssm_jax.build(config, dtype="float32").apply({"params": params}, tokens)
    assert state.layers.ssm.dtype == jnp.float32
    assert float(jnp.abs(low - full).max()) < 0.05 * float(jnp.abs(full).max())
