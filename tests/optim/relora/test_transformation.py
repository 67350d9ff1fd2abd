"""The recipe as one transformation: equal to the two trees; and forty runs that do not explode where the reference's forty do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssm_jax.errors import ConfigError
from ssm_jax.optim import relora
from tests.optim.relora import toy

CYCLE, UPDATES = 16, 64
RATE = relora.jagged_cosine(0.02, UPDATES, CYCLE, warmup=2, rewarmup=2)


def batches(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Inputs, and what a random network of one layer makes of them."""
    first, second, third = jax.random.split(key, 3)
    x = jax.random.normal(first, (count, 8, 6))
    y = jnp.tanh(x @ (0.5 * jax.random.normal(second, (6, 10)))) @ (0.3 * jax.random.normal(third, (10, 3)))
    return x, y


def start(key: jax.Array) -> tuple[dict, dict, relora.Spec]:
    params = toy.MODEL.init(key, jnp.zeros((1, 6)))["params"]
    return relora.split(params, toy.WRAPPED, 3, 6.0, key=key)


def gradients(wrapped: relora.Wrapped, params: dict, spec: relora.Spec, batch: tuple) -> tuple[jax.Array, dict]:
    """As a loop that knows of one tree only takes them; the kernels are kept from being differentiated."""

    def loss(params: dict) -> jax.Array:
        frozen, trainable = relora.partition(params, spec)
        return toy.loss(wrapped, trainable, jax.lax.stop_gradient(frozen), *batch)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("method", ["zero", "random"])
def test_one_transformation_is_the_two_trees(method: str) -> None:
    key, cycle, updates = jax.random.key(4), 5, 17
    frozen, trainable, spec = start(jax.random.key(1))
    wrapped = relora.wrap(toy.MODEL, spec)
    steps = relora.adamw(spec, relora.jagged(lambda t: 0.01, cycle, rewarmup=2), weight_decay=0.01)
    whole = relora.as_transformation(steps, spec, cycle=cycle, key=key, method=method)
    x, y = batches(jax.random.key(2), updates)

    @jax.jit
    def one_tree(params: dict, state: Any, batch: tuple) -> tuple:
        _, grads = gradients(wrapped, params, spec, batch)
        changes, state = whole.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    @jax.jit
    def two_trees(trainable: dict, frozen: dict, state: Any, batch: tuple) -> tuple:
        grads = jax.grad(functools.partial(toy.loss, wrapped))(trainable, frozen, *batch)
        changes, state = steps.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state

    params = relora.combine(trainable, frozen)
    state, inner, merges = whole.init(params), steps.init(trainable), 0
    for i in range(updates):
        batch = (x[i] * (jnp.nan if i == 6 else 1.0), y[i])  # one update is skipped
        params, state = one_tree(params, state, batch)
        trainable, inner = two_trees(trainable, frozen, inner, batch)
        applied = int(relora.applied_updates(inner))
        if relora.is_due(applied, cycle, merges):
            own = jax.random.fold_in(key, merges)
            frozen, trainable, inner, _ = relora.merge_and_reset(
                frozen, trainable, inner, own, spec=spec, method=method
            )
            merges += 1
        if i in (4, 5, 10, updates - 1):
            close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
            jax.tree.map(close, params, relora.combine(trainable, frozen))
            jax.tree.map(close, state.inner, inner)
    assert merges == int(state.merges) == 3
    assert applied == updates - 1


@functools.lru_cache
def forty(method: str) -> tuple[np.ndarray, np.ndarray]:
    """(final losses, largest adapter update over the rate) of 20 seeds with each of two betas; Adam's epsilon is the usual one."""
    _, _, spec = start(jax.random.key(0))
    wrapped = relora.wrap(toy.MODEL, spec)

    def run(key: jax.Array, b2: jax.Array) -> tuple[jax.Array, jax.Array]:
        frozen, trainable, _ = start(key)
        steps = relora.chain(spec, optax.scale_by_adam(0.9, b2, 1e-8), RATE)
        whole = relora.as_transformation(steps, spec, cycle=CYCLE, key=key, method=method)
        params = relora.combine(trainable, frozen)

        def step(carry: tuple, batch: tuple) -> tuple[tuple, tuple]:
            params, state = carry
            loss, grads = gradients(wrapped, params, spec, batch)
            lr = RATE(relora.applied_updates(state.inner))
            changes, after = whole.update(grads, state, params)
            moved = jnp.max(jnp.stack([jnp.abs(relora.trees.flat(changes)[path]).max() for path in spec.adapters]))
            merged = after.merges > state.merges
            jump = jnp.where(merged | (lr == 0), 0.0, moved / jnp.where(lr == 0, 1.0, lr))
            return (optax.apply_updates(params, changes), after), (loss, jump)

        _, (losses, jumps) = jax.lax.scan(step, (params, whole.init(params)), batches(key, UPDATES))
        return losses[-1], jumps.max()

    keys = jax.vmap(jax.random.key)(jnp.arange(20))
    each = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
    losses, jumps = each(keys, jnp.array([0.999, 0.95]))
    return np.asarray(losses), np.asarray(jumps)


def test_none_of_forty_runs_explodes() -> None:
    losses, jumps = forty("zero")
    assert losses.shape == (20, 2)
    assert np.sum(~(losses < 1)) == 0
    assert jumps.max() <= 4


def test_all_forty_explode_as_the_reference_resets() -> None:
    losses, jumps = forty("reference")
    assert np.sum(~(losses < 1)) == 40
    assert np.median(jumps) > 1e4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "random", "keep"])
def test_none_explodes_with_our_other_resets(method: str) -> None:
    losses, jumps = forty(method)
    assert np.sum(~(losses < 1)) == 0
    assert jumps.max() <= 4


def test_refusals() -> None:
    _, _, spec = start(jax.random.key(0))
    steps = relora.adamw(spec, 0.1)
    with pytest.raises(ConfigError, match="cycle is 0; it must be at least 1"):
        relora.as_transformation(steps, spec, cycle=0, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="'none' is unknown"):
        relora.as_transformation(steps, spec, cycle=1, key=jax.random.key(0), method="none")
