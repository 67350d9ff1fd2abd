"""What a training loop takes from here: the configured optimizer, placement on a mesh, the change from full rank to adapters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssm_jax
from ssm_jax import optim, sharding
from ssm_jax.errors import ConfigError
from ssm_jax.models import FAMILIES
from ssm_jax.optim import relora
from tests.optim.relora import toy
from tests.optim.relora.test_intercept import MODELS, TINY


def shapes_of(family: str) -> tuple[dict, relora.Spec]:
    model = ssm_jax.build(family, **{**TINY, **MODELS[family]})
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return params, relora.plan(params, relora.defaults(model.config), 3, 6.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_moments_lie_like_their_kernels(family: str) -> None:
    """Every leaf of trainable tree and optimizer state is placed; A as the inputs, B as the outputs, the rank whole."""
    params, spec = shapes_of(family)
    frozen, trainable = jax.eval_shape(functools.partial(relora.init, spec=spec), params)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.shardings(trainable, mesh, relora.logical_axes(trainable, spec))
    kernels = relora.trees.flat(sharding.shardings(frozen, mesh, relora.logical_axes(frozen, spec)))
    leaves = relora.trees.flat(placed)
    for leaf in spec.leaves:
        entries = kernels[leaf.path].spec
        a_spec, b_spec = relora.merge.factor_specs(leaf, tuple(entries))
        assert leaves[leaf.a_path].spec == a_spec
        assert leaves[leaf.b_path].spec == b_spec
    optimizer = relora.make_optimizer(optim.OptimConfig(), spec)
    state = jax.eval_shape(optimizer.init, trainable)
    axes = relora.optimizer_axes(state, trainable, spec)
    moments = sharding.shardings(state, mesh, axes)
    for slot in relora.slots.slots(state, relora.trees.flat(trainable)):
        assert jax.tree.leaves(moments)[slot.index].spec == leaves[slot.param].spec


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_configured_optimizers_reset(name: str) -> None:
    """Of every configured direction the adapters' part can be reset alone, with a counter where there is one."""
    params = toy.MODEL.init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
    _, trainable, spec = relora.split(params, toy.WRAPPED, 3, 6.0)
    optimizer = relora.make_optimizer(optim.OptimConfig(name=name, lr=0.01, weight_decay=0.1), spec)

    @jax.jit
    def states(trainable: dict) -> tuple:
        grads = jax.tree.map(lambda p: jnp.cos(37.0 * p), trainable)
        changes, state = optimizer.update(grads, optimizer.init(trainable), trainable, learning_rate=jnp.float32(0.01))
        reset = relora.reset_state(state, spec)
        return changes, state, reset, relora.reset.zeroed(reset, spec)

    changes, state, reset, share = states(trainable)
    assert jax.tree.structure(state) == jax.tree.structure(reset)
    assert int(relora.applied_updates(reset)) == 1
    assert float(share) == 1.0
    others = {path: None for path in relora.trees.flat(trainable) if path not in spec.adapters}
    for slot in relora.slots.slots(state, others):
        np.testing.assert_array_equal(jax.tree.leaves(state)[slot.index], jax.tree.leaves(reset)[slot.index])
    assert all(np.any(change != 0) for change in jax.tree.leaves(changes))


def test_the_configured_optimizer_is_the_one_of_full_rank_training() -> None:
    """Separate counters change nothing until something is reset."""
    params = toy.MODEL.init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
    _, trainable, spec = relora.split(params, toy.WRAPPED, 3, 6.0)
    config = optim.OptimConfig(lr=0.01, weight_decay=0.1, clip_norm=0.3)

    @functools.partial(jax.jit, static_argnums=0)
    def three(of_adapters: bool) -> dict:
        optimizer = relora.make_optimizer(config, spec) if of_adapters else optim.make_optimizer(config)
        tree, state = trainable, optimizer.init(trainable)
        for _ in range(3):
            grads = jax.tree.map(jnp.sin, tree)
            changes, state = optimizer.update(grads, state, tree, learning_rate=jnp.float32(0.01))
            tree = optax.apply_updates(tree, changes)
        return tree

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), three(True), three(False))


@pytest.mark.parametrize("ours", ["chain", "config"])
def test_moments_of_the_other_leaves_may_be_carried_over(ours: str) -> None:
    """Norms, head and biases go on with what full-rank training knew of them; adapters start afresh."""
    params = toy.MODEL.init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
    config = optim.OptimConfig(beta1=0.9, beta2=0.999)
    full = optim.make_optimizer(config)

    @jax.jit
    def trained(params: dict) -> Any:
        state = full.init(params)
        for _ in range(4):
            _, state = full.update(jax.tree.map(jnp.cos, params), state, params, learning_rate=jnp.float32(0.1))
        return state

    old = trained(params)
    _, trainable, spec = relora.from_full_rank(params, toy.WRAPPED, 3, 6.0)
    optimizer = relora.adamw(spec, 0.1) if ours == "chain" else relora.make_optimizer(config, spec)
    new = relora.carry_moments(optimizer.init(trainable), old, trainable, spec)
    leaves, old_leaves = jax.tree.leaves(new), jax.tree.leaves(old)
    others = {path: None for path in relora.trees.flat(trainable) if path not in spec.adapters}
    moved = relora.slots.slots(new, others)
    assert len(moved) == 2 * len(others)
    sources = {(slot.field, slot.param): old_leaves[slot.index] for slot in relora.slots.slots(old, others)}
    for slot in moved:
        np.testing.assert_array_equal(leaves[slot.index], sources[slot.field, slot.param])
    assert float(relora.reset.zeroed(new, spec)) == 1.0
    counts = {
        name: int(leaf) for name, leaf in zip(relora.slots.names(new), leaves, strict=True) if name.endswith("count")
    }
    inner = {name.split("inner_states/")[1].split("/")[0]: n for name, n in counts.items() if "inner_states" in name}
    assert inner == {"adapters": 0, "other": 4}
    assert int(relora.applied_updates(new)) == 0
    with pytest.raises(ConfigError, match="no mu of"):
        relora.carry_moments(new, optax.sgd(0.1, momentum=0.9).init(params), trainable, spec)


def test_frozen_kernels_are_no_part_of_the_clipped_norm() -> None:
    """Of the trainable tree alone, whatever its size beside the kernels."""
    params = {"kernel": jnp.full((8, 8), 5.0), "bias": jnp.zeros((8,))}
    _, trainable, spec = relora.split(params, "kernel", 2, 2.0)
    optimizer = relora.chain(spec, optax.identity(), 1.0, clip_norm=1.0)
    grads = {"kernel:a": jnp.zeros((8, 2)), "kernel:b": jnp.zeros((2, 8)), "bias": jnp.full((8,), 2.0)}
    changes, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    np.testing.assert_allclose(changes["bias"], -1 / np.sqrt(8), rtol=1e-6)
    reference = relora.chain(spec, optax.identity(), 1.0, clip_norm=1.0, compat="reference")
    changes, _ = reference.update(grads, reference.init(trainable), trainable)
    np.testing.assert_allclose(changes["bias"], -2 / (np.sqrt(32) + 1e-6), rtol=1e-6)
