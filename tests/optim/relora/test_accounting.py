"""Memory and operations: the published sizes, and what compiled steps take."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.interpreters import partial_eval

import ssm_jax
from ssm_jax.models.registry import make_config
from ssm_jax.optim import relora
from tests.optim.relora import goldens

SIZES = goldens.settings("accounting_llama_sizes")["rows"]
PUBLISHED = {"60m": (25.3, 10.0, 42.9), "130m": (84.9, 22.4, 71.7), "250m": (198.2, 49.5, 98.9), "350m": (302.4, 59.8, 125.6),
             "1b": (1207.9, 119.5, 251.1)}  # fmt: skip


@functools.lru_cache
def shapes_of(preset: str) -> tuple[Any, dict]:
    config = make_config(preset)
    model = ssm_jax.build(config)
    return config, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def account(preset: str, rank: int) -> relora.Account:
    config, shapes = shapes_of(preset)
    return relora.account(shapes, relora.plan(shapes, relora.defaults(config), rank))


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_s_accounting(size: str) -> None:
    """Counts and bytes of the reference's LLaMA sizes, which it wraps as we do by default."""
    row, checked = SIZES[size], 0
    for rank in (128, 256, 512):
        if rank > row["hidden"]:
            continue
        found, wanted = account(f"llama-{size}", rank), row[f"r{rank}"]
        assert (found.wrapped, found.total) == (row["wrapped"], row["total"])
        assert found.other == row["embedding_and_head"] + row["norms"]
        assert (found.adapters, found.trainable) == (wanted["lora"], wanted["trainable"])
        assert found.wrapped + found.trainable == wanted["total_with_lora"]
        assert found.full_rank_bytes(2, 2, 2) == wanted["bytes_full_bf16_adam"]
        assert found.full_rank_bytes() == wanted["bytes_full_f32_adam"]
        assert found.bytes(2, 2, 2, 2) == wanted["bytes_relora_bf16_adam"]
        assert found.bytes() == wanted["bytes_relora_f32_adam"]
        assert found.bytes(frozen=2) == wanted["bytes_relora_bf16frozen_f32train"]
        assert found.bytes(frozen=1) == wanted["bytes_relora_int8frozen_f32train"]
        checked += 1
    assert checked


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    found = account(f"llama-{size}", relora.RANK)
    millions = [round(n / 1e6, 1) for n in (found.wrapped, found.adapters, found.trainable)]
    assert tuple(millions) == PUBLISHED[size]


def test_at_what_width_it_pays() -> None:
    """Operations of the blocks over full rank's: 2/3 + P_l / P_w; rank 128 cannot speed up a model of 60M."""
    ratios = [
        round(2 / 3 + found.adapters / found.wrapped, 2) for found in (account(f"llama-{s}", 128) for s in PUBLISHED)
    ]
    assert ratios == [1.06, 0.93, 0.92, 0.86, 0.77]


WIDE: dict[str, Any] = {"vocab_size": 32, "d_model": 128, "n_layers": 6, "n_heads": 4, "d_mlp": 320, "n_positions": 64}
RANK = 2


@functools.lru_cache
def step() -> tuple:
    """(jitted step, its arguments as shapes, spec, parameters' shapes, model) of a small Llama."""
    model = ssm_jax.build("llama", **WIDE)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": jax.ShapeDtypeStruct((2, 8), jnp.float32)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    spec = relora.plan(shapes, relora.defaults(model.config), RANK, 4.0)
    frozen, trainable = jax.eval_shape(functools.partial(relora.init, spec=spec), shapes)
    wrapped, optimizer = relora.wrap(model, spec), relora.adamw(spec, 1e-3)
    state = jax.eval_shape(optimizer.init, trainable)

    def loss(trainable: dict, frozen: dict, batch: dict) -> jax.Array:
        logits, _ = wrapped.apply({"params": relora.combine(trainable, frozen)}, batch["tokens"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])

    def update(trainable: dict, state: Any, frozen: dict, batch: dict) -> tuple:
        value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
        changes, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state, value

    return jax.jit(update, donate_argnums=(0, 1)), (trainable, state, frozen, batch), spec, shapes, model


def test_arguments_of_the_compiled_step() -> None:
    """b_f P_w + (b_p + 2 b_s) (P_o + P_l), a batch and some counters go in; what comes out lies where its predecessor lay."""
    jitted, arguments, spec, shapes, _ = step()
    memory = jitted.lower(*arguments).compile().memory_analysis()
    found = relora.account(shapes, spec)
    wanted = found.argument_bytes() + relora.nbytes(arguments[-1])
    assert memory.argument_size_in_bytes == pytest.approx(wanted, rel=1e-3)
    assert memory.alias_size_in_bytes == pytest.approx(12 * found.trainable, rel=1e-3)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000
    assert memory.temp_size_in_bytes < 0.5 * 4 * found.wrapped, "slices of a layer, but no second frozen tree"


def equations(jaxpr: Any, times: float = 1) -> Iterator[tuple[Any, float]]:
    """Every equation, and how often it runs."""
    for eqn in jaxpr.eqns:
        inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        found = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)
        bodies = [getattr(value, "jaxpr", value) for value in found if _is_program(value)]
        if not bodies:
            yield eqn, times
        for body in bodies:
            yield from equations(body, inner)


def needed(function: Any, *arguments: Any) -> Any:
    """The jaxpr without what no result depends on, as ``jit`` compiles it."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


VIEWS = {"reshape", "squeeze", "transpose", "dynamic_slice", "broadcast_in_dim", "copy"}


def kernel_sized(jaxpr: Any, spec: relora.Spec) -> list[str]:
    """Equations, views of the kernels aside, that make an array as large as a kernel or as one layer of it, and in its shape."""
    sizes = set()
    for leaf in spec.leaves:
        layer = tuple(n for i, n in enumerate(leaf.shape) if i not in leaf.batch)
        flat = (leaf.width_in, leaf.width_out)
        sizes |= {leaf.shape, layer, flat, flat[::-1], layer[::-1], (leaf.shape[0], *flat)}
    made = []
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name not in VIEWS:
            made += [
                f"{eqn.primitive.name} {var.aval.shape}"
                for var in eqn.outvars
                if getattr(var.aval, "shape", None) in sizes
            ]
    return made


def test_nothing_of_a_kernel_s_size_is_made_in_a_step() -> None:
    """No gradient of a kernel, no product A B, no copy; with a single tree, the check finds them."""
    jitted, arguments, spec, shapes, model = step()
    assert kernel_sized(needed(jitted, *arguments), spec) == []

    def one_tree(params: dict, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)[0].sum()

    full = needed(jax.grad(one_tree), shapes, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    assert len(kernel_sized(full, spec)) >= 7


def product_flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn, times in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
            total += times * 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    return total


def test_operations_of_a_step() -> None:
    """Within 2 % of 4 P_w + 6 P_l + 6 x (head) and attention per token."""
    jitted, arguments, spec, _, model = step()
    tokens, context = 16, 8
    found = product_flops(needed(jitted, *arguments)) / tokens
    sums = relora.train_flops_per_token(model.config, spec, context)
    wrapped = sum(math.prod(leaf.shape) for leaf in spec.leaves)
    assert found == pytest.approx(sums, rel=0.02)
    adapters = sum(math.prod(leaf.a_shape(RANK)) + math.prod(leaf.b_shape(RANK)) for leaf in spec.leaves)
    assert found == pytest.approx(4 * wrapped + 6 * adapters + 6 * 32 * 128, rel=0.02), "attention is small here"
    full = 3 * ssm_jax.models.flops_per_token(model.config, context)
    assert sums < 0.78 * full, "the check would notice gradients of the kernels"
