"""The low-rank path of unmodified models: what interception computes is the model with W + scale A B in place of W."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError
from ssm_jax.models import FAMILIES
from ssm_jax.optim import relora
from ssm_jax.optim.relora.defaults import KERNELS, WHY

TINY = {"vocab_size": 48, "d_model": 32, "n_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"headdim": 8, "d_state": 8},
    "dense_mamba": {"d_state": 8},
    "gss": {"dim_expansion_factor": 2.0, "dss_kernel_N": 8, "dss_kernel_H": 16},
    "retnet": {"n_heads": 2, "d_value": 64, "d_mlp": 48},
    "dense_retnet": {"n_heads": 2, "projection": "linear", "n_layers": 3},
    "baka": {
        "n_heads": 2,
        "n_ctx": 8,
        "n_pauses": 2,
        "n_rmt_tokens": 2,
        "d_state": 4,
        "step": "nstep4",
        "gate": "sigmoid",
    },
    "gpt2": {"n_heads": 4, "n_positions": 16},
    "gpt_neox": {"n_heads": 4, "n_positions": 16},
    "llama": {"n_heads": 4, "n_kv_heads": 2, "n_positions": 16},
}


def with_b(trainable: dict, spec: relora.Spec) -> dict:
    """B as after some training."""
    leaves = relora.trees.flat(trainable)
    for i, leaf in enumerate(spec.leaves):
        b = leaves[leaf.b_path]
        leaves[leaf.b_path] = (0.2 * jax.random.normal(jax.random.key(i), b.shape)).astype(b.dtype)
    return relora.trees.nested(leaves)


def both_ways(model: nn.Module, select: Any, *inputs: jax.Array, rank: int = 3, **how: Any) -> tuple:
    """(outputs by interception, with W + scale A B, with W alone), their gradients of the adapters for the first two, and what was
    by hand."""
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    frozen, trainable, spec = relora.split(params, select, rank, 6.0, key=jax.random.key(1))
    trainable = with_b(trainable, spec)
    wrapped = relora.wrap(model, spec)
    by_hand = wrapped.by_hand({"params": relora.combine(trainable, frozen)}, *inputs, **how)

    def first(out: Any) -> jax.Array:
        return out[0] if isinstance(out, tuple) else out

    def intercepted(trainable: dict, frozen: dict) -> jax.Array:
        return first(wrapped.apply({"params": relora.combine(trainable, frozen)}, *inputs, **how))

    def materialised(trainable: dict, frozen: dict) -> jax.Array:
        return first(
            model.apply({"params": relora.materialise(relora.combine(trainable, frozen), spec)}, *inputs, **how)
        )

    @jax.jit
    def run(trainable: dict, frozen: dict) -> tuple:
        ways = []
        for way in (intercepted, materialised):
            out, pull = jax.vjp(way, trainable, frozen)
            ways.append((out, pull(jnp.cos(out))[0]))
        return ways, first(model.apply({"params": params}, *inputs, **how))

    ways, plain = run(trainable, frozen)
    return ways, plain, by_hand, spec


def require_equal(ways: list, plain: jax.Array, tolerance: float = 2e-5) -> None:
    (out, grads), (wanted, wanted_grads) = ways
    assert np.isfinite(out).all()
    assert np.abs(np.asarray(out - plain)).max() > 1e-2, "the adapters change something"
    np.testing.assert_allclose(out, wanted, rtol=tolerance, atol=tolerance * float(jnp.abs(wanted).max()))
    every = max(float(jnp.abs(grad).max()) for grad in jax.tree.leaves(wanted_grads))
    for path, grad in relora.trees.flat(wanted_grads).items():
        found = relora.trees.flat(grads)[path]
        scale = 1e-4 * float(jnp.abs(grad).max()) + 1e-6 * every  # some gradients are zero but for rounding
        np.testing.assert_allclose(found, grad, atol=scale, rtol=1e-3, err_msg=path)
        if path.endswith((":a", ":b")):
            assert np.any(grad != 0), path


def test_every_family_has_defaults() -> None:
    assert set(KERNELS) == set(WHY) == set(FAMILIES) == set(MODELS)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("mamba", "llama") else pytest.mark.slow) for f in MODELS]
)
def test_every_family(family: str) -> None:
    """Stacked and scanned layers: outputs and gradients, all kernels reached."""
    model = ssm_jax.build(family, **{**TINY, **MODELS[family]})
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, 48, jnp.int32)
    ways, plain, by_hand, spec = both_ways(model, relora.defaults(model.config), tokens)
    assert by_hand == ()
    assert all(leaf.batch == (0,) for leaf in spec.leaves)
    require_equal(ways, plain)


@pytest.mark.parametrize("family", MODELS)
def test_defaults_declare_the_axes_that_modules_contract(family: str) -> None:
    """By what the modules do themselves; and nothing large is forgotten."""
    model = ssm_jax.build(family, **{**TINY, **MODELS[family]})
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    planned = {leaf.path: leaf for leaf in relora.plan(shapes, relora.defaults(model.config), 2, 4.0).leaves}
    seen = {leaf.path: leaf for leaf in relora.plan(shapes, relora.kernels(model, tokens), 1, 2.0).leaves}
    assert planned.items() <= seen.items()
    left = {path.split("/")[-2] for path in seen.keys() - planned.keys()}
    narrow = {"head", "dt_down", "dt_proj", "B_proj", "C_proj", "down", "up", *(f"source_{i}" for i in range(3))}
    assert left <= narrow, left


def test_a_gss_hybrid() -> None:
    fields = {**TINY, **MODELS["gss"], "attention_every": 2, "attention_heads": 2, "attention_chunk": 8}
    shapes = jax.eval_shape(ssm_jax.build("gss", **fields).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[
        "params"
    ]
    spec = relora.plan(shapes, relora.defaults(ssm_jax.build("gss", **fields).config), 4)
    assert len(spec.leaves) == 4 + 4 + 2


def test_a_head_with_a_low_rank_path() -> None:
    """It is reached where the model applies it, and materialised where the loss multiplies with it by hand."""
    model = ssm_jax.build("llama", **TINY, **MODELS["llama"])
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, 48, jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    frozen, trainable, spec = relora.split(params, "^head/kernel$", 3, 6.0)
    wrapped, variables = relora.wrap(model, spec), {"params": relora.combine(with_b(trainable, spec), frozen)}
    assert wrapped.config is model.config

    @jax.jit
    def three_ways(variables: dict) -> tuple:
        features, _ = wrapped.apply(variables, tokens, method="features")
        logits, _ = wrapped.apply(variables, tokens)
        return logits, features @ wrapped.readout(variables["params"]), model.apply({"params": params}, tokens)[0]

    logits, by_hand, plain = three_ways(variables)
    np.testing.assert_allclose(logits, by_hand, atol=1e-5)
    assert np.abs(np.asarray(logits - plain)).max() > 1e-2
    assert wrapped.by_hand(variables, tokens) == ()
    assert wrapped.by_hand(variables, tokens, logits="none") == ("head/kernel",)


class Zoo(nn.Module):
    """Every module that is intercepted, a subclass, a layer over two axes with a stack of its own, and a weight used by hand."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.DenseGeneral((3, 4), name="split")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="join")(jnp.tanh(x))
        x = nn.Einsum((5, 2, 6), "btd,dhe->bthe", name="heads")(x)
        x = nn.Einsum((2, 7, 6), "bthe,hfe->bthf", name="per_head", use_bias=False)(x)
        x = nn.DenseGeneral(6, axis=-1, batch_dims=(0,), name="per_lane")(x)
        x = Doubled(8, name="doubled")(x.reshape(*x.shape[:2], -1))
        x = nn.DenseGeneral(7, axis=1, name="over_time")(x)
        return x @ self.param("by_hand", nn.initializers.lecun_normal(), (7, 6))


class Doubled(nn.Dense):
    """A subclass that uses what Dense computes."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs)


def test_every_kind_of_module() -> None:
    model, x = Zoo(), jax.random.normal(jax.random.key(0), (2, 5, 6))
    kernels = relora.kernels(model, x)
    assert len(kernels) == 7
    ways, plain, by_hand, spec = both_ways(model, (*kernels, relora.Kernel("by_hand")), x, rank=2)
    assert by_hand == ("by_hand",)
    axes = {leaf.path.split("/")[0]: (leaf.batch, leaf.inputs, leaf.outputs) for leaf in spec.leaves}
    assert axes["per_head"] == ((0,), (2,), (1,))
    assert axes["per_lane"] == ((0,), (1,), (2,))
    assert axes["join"] == ((), (0, 1), (2,))
    require_equal(ways, plain)


class Stacked(nn.Module):
    """A foreign model with ``nn.scan`` and rematerialisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def body(module: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + jnp.tanh(module(x)), None

        scan = nn.scan(
            nn.remat(body), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3
        )
        return scan(nn.Dense(8, name="layer"), x, None)[0]


def test_foreign_stacks() -> None:
    model, x = Stacked(), jax.random.normal(jax.random.key(0), (4, 8))
    (kernel,) = relora.kernels(model, x)
    assert (kernel.batch, kernel.inputs, kernel.outputs) == ((0,), (1,), (2,))
    ways, plain, by_hand, _ = both_ways(model, kernel, x)
    assert by_hand == ()
    require_equal(ways, plain)


def test_dropout_is_on_the_adapters_input_alone_and_only_with_a_key() -> None:
    model, x = Stacked(), jax.random.normal(jax.random.key(0), (4, 8))
    params = model.init(jax.random.key(0), x)["params"]
    frozen, trainable, spec = relora.split(params, relora.kernels(model, x), 4, 6.0)
    changed = {"params": relora.combine(with_b(trainable, spec), frozen)}
    plain, dropping = (relora.wrap(model, spec, dropout=rate) for rate in (0.0, 0.5))
    apply = jax.jit(lambda variables, key: dropping.apply(variables, x, rngs={"dropout": key}))
    np.testing.assert_array_equal(dropping.apply(changed, x), plain.apply(changed, x))
    first, second = (apply(changed, jax.random.key(i)) for i in (1, 2))
    assert np.abs(np.asarray(first - second)).max() > 1e-3
    np.testing.assert_allclose(
        apply({"params": relora.combine(trainable, frozen)}, jax.random.key(1)),
        model.apply({"params": params}, x),
        atol=1e-6,
    )
    with pytest.raises(ConfigError, match=r"dropout of the adapters' input is 1\.0"):
        relora.wrap(model, spec, dropout=1.0)


def test_computes_in_the_module_s_type() -> None:
    model, x = nn.Dense(6, dtype=jnp.bfloat16), jax.random.normal(jax.random.key(0), (3, 8))
    params = model.init(jax.random.key(0), x)["params"]
    frozen, trainable, spec = relora.split(params, "kernel", 2, 2.0, frozen_dtype="bfloat16")
    assert trainable["kernel:a"].dtype == jnp.float32
    wrapped = relora.wrap(model, spec)
    call = functools.partial(wrapped.apply, {"params": relora.combine(with_b(trainable, spec), frozen)})
    assert jax.eval_shape(call, x).dtype == jnp.bfloat16
    kinds = {eqn.outvars[0].aval.dtype for eqn in jax.make_jaxpr(call)(x).eqns if eqn.primitive.name == "dot_general"}
    assert kinds == {jnp.dtype(jnp.bfloat16)}


def test_axes_that_are_declared_wrongly_are_named() -> None:
    model, x = nn.DenseGeneral((3, 4)), jnp.ones((2, 5))
    params = model.init(jax.random.key(0), x)["params"]
    frozen, trainable, spec = relora.split(params, relora.Kernel("kernel", inputs=(0, 1), outputs=(2,)), 2)
    with pytest.raises(ConfigError, match=r"sums over axes \(0,\) of \(5, 3, 4\).*relora\.kernels"):
        relora.wrap(model, spec).apply({"params": relora.combine(trainable, frozen)}, x)
