"""Schedules against Optax, AdamW against a hand-written update, the decay mask by name, the guard, and the partition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssm_jax import optim
from ssm_jax.config import from_dict
from ssm_jax.errors import ConfigError
from ssm_jax.optim import OptimConfig, schedules


def small_params() -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return {
        "embed": {"embedding": jax.random.normal(next(keys), (6, 4))},
        "layers": {
            "norm": {"scale": jax.random.normal(next(keys), (2, 4))},
            "mixer": {
                "A_log": jax.random.normal(next(keys), (2, 8, 3)),
                "conv": {
                    "kernel": jax.random.normal(next(keys), (2, 4, 8)),
                    "bias": jax.random.normal(next(keys), (2, 8)),
                },
            },
        },
    }


def rates(name: str, total: int, **settings: float) -> np.ndarray:
    compiled = jax.jit(lambda step, total: schedules.learning_rate(name, step, total, **settings))
    return np.array([compiled(step, total) for step in range(total)])


def test_cosine_equals_optax() -> None:
    reference = optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=5, decay_steps=39, end_value=1e-5)
    ours = rates("cosine", 40, peak=1e-3, final=1e-5, warmup_steps=5)
    np.testing.assert_allclose(ours[5:], [reference(step) for step in range(5, 40)], rtol=1e-5)
    # Optax starts its warm-up at 0, which wastes a step; ours starts at peak / w and gets to the peak at the same step.
    np.testing.assert_allclose(ours[:5], 1e-3 * np.arange(1, 6) / 5, rtol=1e-6)


def test_linear_falls_evenly_to_its_final_value() -> None:
    ours = rates("linear", 21, peak=1.0, final=0.2, warmup_ratio=0.0)
    np.testing.assert_allclose(ours, np.linspace(1.0, 0.2, 21), rtol=1e-6)


def test_wsd_is_flat_and_then_decays() -> None:
    ours = rates("wsd", 111, peak=1.0, final=0.0, warmup_steps=10, decay_ratio=0.2)
    np.testing.assert_allclose(ours[10:91], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ours[91:], 1.0 - np.arange(1, 21) / 20, atol=1e-6)


def test_constant_has_only_a_warmup() -> None:
    np.testing.assert_allclose(rates("constant", 10, peak=0.5, warmup_ratio=0.2), [0.25] + [0.5] * 9)


def test_the_total_is_traced() -> None:
    compiled = jax.jit(lambda step, total: schedules.learning_rate("cosine", step, total, peak=1.0, warmup_ratio=0.1))
    for total in (10, 100, 1000):
        assert float(compiled(total - 1, total)) == pytest.approx(0.0, abs=1e-7)
    assert compiled._cache_size() == 1


def test_weight_decay_reaches_exactly_the_kernels_and_the_embedding() -> None:
    undecayed = {
        "layers/mixer/A_log", "layers/mixer/D", "layers/mixer/dt_bias", "layers/mixer/conv/bias", "layers/mixer/in_proj/bias",
        "layers/norm/scale", "layers/mixer/norm/scale", "norm_f/scale", "layers/mixer/dt_proj/bias",
    }  # fmt: skip
    decayed = {
        "embed/embedding", "head/kernel", "layers/mixer/in_proj/kernel", "layers/mixer/out_proj/kernel",
        "layers/mixer/conv/kernel", "layers/mixer/dt_down/kernel", "layers/mixer/dt_up/kernel", "layers/mixer/B_proj/kernel",
    }  # fmt: skip
    params: dict = {}
    for name in undecayed | decayed:
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.zeros(())
    mask, _ = jax.tree_util.tree_flatten_with_path(optim.decay_mask(params))
    assert {jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays} == decayed


def test_update_is_adamw() -> None:
    optimizer, params = optim.make_optimizer(OptimConfig(clip_norm=0.5, weight_decay=0.1)), small_params()
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    decays = jax.tree.leaves(optim.decay_mask(params))
    treedef = jax.tree.structure(params)
    ours = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    mean = variance = [np.zeros_like(leaf) for leaf in ours]
    for t in range(1, 4):
        grads = [np.sin(leaf * t) for leaf in ours]
        tree, gradients = treedef.unflatten(ours), treedef.unflatten(grads)
        updates, state = update(gradients, state, tree, learning_rate=jnp.float32(0.01))
        scale = min(1.0, 0.5 / np.sqrt(sum(np.sum(g**2) for g in grads)))
        mean = [0.9 * m + 0.1 * scale * g for m, g in zip(mean, grads, strict=True)]
        variance = [0.95 * v + 0.05 * (scale * g) ** 2 for v, g in zip(variance, grads, strict=True)]
        for i, (leaf, m, v, decay) in enumerate(zip(ours, mean, variance, decays, strict=True)):
            adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            step = -0.01 * (adam + 0.1 * decay * leaf)
            np.testing.assert_allclose(jax.tree.leaves(updates)[i], step, rtol=1e-4, atol=1e-7)
            ours[i] = leaf + step


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_finds_the_minimum(name: str) -> None:
    """Of |w - target|^2 over a stacked projection, an embedding and a vector."""
    keys = jax.random.split(jax.random.key(0), 3)
    target = {
        "embed": {"embedding": jax.random.normal(keys[0], (6, 4))},
        "layers": {
            "out_proj": {"kernel": jax.random.normal(keys[1], (2, 8, 4))},
            "D": jax.random.normal(keys[2], (2, 8)),
        },
    }
    settings = OptimConfig(name=name, lr=0.05, weight_decay=0.0, clip_norm=None)
    optimizer = optim.make_optimizer(settings)

    @jax.jit
    def step(params: dict, state: tuple, lr: jax.Array) -> tuple:
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = optimizer.update(grads, state, params, learning_rate=lr)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda leaf: leaf + 0.3, target)
    state = optimizer.init(params)
    for i in range(400):
        params, state = step(params, state, jnp.float32(0.05 * (1 - i / 400)))
    distance = jax.tree.map(lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2))), params, target)
    assert max(jax.tree.leaves(distance)) < 0.05, distance


def test_muon_orthogonalises_the_projections_and_nothing_else() -> None:
    params = {
        "embed": {"embedding": jnp.zeros((16, 8))},
        "layers": {
            "in_proj": {"kernel": jnp.zeros((2, 8, 2, 16))},
            "conv": {"kernel": jnp.zeros((2, 4, 16))},
            "dt_up": {"kernel": jnp.zeros((2, 1, 16))},
            "out_proj": {"kernel": jnp.zeros((2, 3, 16, 8))},
        },
        "peeled": {"out_proj": {"kernel": jnp.zeros((16, 8))}},
    }
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    grads = treedef.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    settings = {"weight_decay": 0.0, "clip_norm": None, "beta1": 0.9}
    updates = {}
    for name in ("muon", "adamw"):
        optimizer = optim.make_optimizer(OptimConfig(name=name, **settings))
        updates[name] = optimizer.update(grads, optimizer.init(params), params, learning_rate=jnp.float32(-1.0))[0]
    for path in (("embed", "embedding"), ("layers", "conv", "kernel"), ("layers", "dt_up", "kernel")):
        ours, adam = (functools.reduce(lambda node, key: node[key], path, updates[name]) for name in ("muon", "adamw"))
        np.testing.assert_array_equal(ours, adam)
    stacked = jnp.swapaxes(updates["muon"]["layers"]["in_proj"]["kernel"], 1, 2).reshape(4, 8, 16)
    gradient = jnp.swapaxes(grads["layers"]["in_proj"]["kernel"], 1, 2).reshape(4, 8, 16)
    matrices = [*zip(stacked, gradient, strict=True)]
    heads = (tree["layers"]["out_proj"]["kernel"].reshape(6, 16, 8) for tree in (updates["muon"], grads))
    matrices.extend(zip(*heads, strict=True))
    matrices.append((updates["muon"]["peeled"]["out_proj"]["kernel"], grads["peeled"]["out_proj"]["kernel"]))
    for update, gradient in matrices:
        u, _, vt = np.linalg.svd(np.asarray(gradient), full_matrices=False)
        singular = np.diag(u.T @ np.asarray(update) @ vt.T) / (0.2 * np.sqrt(16))
        assert np.all((singular > 0.6) & (singular < 1.3)), singular  # Newton-Schulz ends near 1, not at it


def test_muon_with_every_matrix_frozen_is_adamw() -> None:
    params = small_params()
    updates = []
    for name in ("muon", "adamw"):
        optimizer = optim.make_optimizer(OptimConfig(name=name))
        update, _ = optimizer.update(params, optimizer.init(params), params, learning_rate=jnp.float32(0.1))
        updates.append(update)
    jax.tree.map(np.testing.assert_array_equal, *updates)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradients_change_nothing(bad: float) -> None:
    optimizer, params = optim.make_optimizer(OptimConfig()), small_params()
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    good = jax.tree.map(jnp.ones_like, params)
    _, state = update(good, state, params, learning_rate=jnp.float32(0.1))
    spoiled = jax.tree.map(jnp.copy, good)
    spoiled["layers"]["norm"]["scale"] = spoiled["layers"]["norm"]["scale"].at[0, 0].set(bad)
    updates, skipped = update(spoiled, state, params, learning_rate=jnp.float32(0.1))
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)
    assert (int(skipped.notfinite_count), int(skipped.total_notfinite)) == (1, 1)
    _, after = update(good, skipped, params, learning_rate=jnp.float32(0.1))
    assert (int(after.notfinite_count), int(after.total_notfinite)) == (0, 1)


def test_partition_splits_and_merges() -> None:
    params = small_params()
    trainable, frozen = optim.split(params, freeze=("embed", r"mixer/conv/"))
    assert optim.partition.paths(frozen) == [
        "embed/embedding", "layers/mixer/conv/bias", "layers/mixer/conv/kernel",
    ]  # fmt: skip
    assert optim.partition.paths(trainable) == ["layers/mixer/A_log", "layers/norm/scale"]
    merged = optim.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    only, rest = optim.split(params, train=("A_log",))
    assert optim.partition.paths(only) == ["layers/mixer/A_log"]
    assert len(optim.partition.paths(rest)) == 4
    assert optim.split(params)[1] == {}


def test_partition_refuses_patterns_that_do_nothing() -> None:
    params = small_params()
    with pytest.raises(ConfigError, match=r"optim\.freeze.*'embde' matches no parameter"):
        optim.split(params, freeze=("embed", "embde"))
    with pytest.raises(ConfigError, match="not a regular expression"):
        optim.split(params, freeze=("(",))
    with pytest.raises(ConfigError, match="no parameter to train"):
        optim.split(params, freeze=(".",))
    with pytest.raises(ConfigError, match="both set"):
        optim.split(params, freeze=("embed",), train=("A_log",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "both set"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"decay_ratio": 0.0}, "decay_ratio"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"learning_rate": 1e-3}, "'optim.learning_rate' is unknown"),
        ({"beta1": "high"}, "'optim.beta1' is 'high'"),
    ],
)
def test_config_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(OptimConfig, settings, "optim.")
