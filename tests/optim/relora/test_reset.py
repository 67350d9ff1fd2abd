"""Pruning bit for bit, the resets of the reference, and why ours is another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssm_jax.errors import ConfigError
from ssm_jax.optim import relora
from ssm_jax.optim.relora.reset import largest
from tests.optim.relora import goldens

KERNELS = ("block/attn/kernel", "block/mlp/kernel")
FACTORS = {
    f"{path.replace('/kernel', '').replace('/', '.')}.lora_{x}.weight": f"{path}:{x.lower()}"
    for path in KERNELS
    for x in "AB"
}
NAMES = {**FACTORS, "norm.weight": "norm/scale", "embed.weight": "embed/embedding"}


@pytest.mark.parametrize("name", [name for name in goldens.names("prune") if "magnitude" in name])
def test_magnitude_pruning_bit_for_bit(name: str) -> None:
    case, values = goldens.settings(name), goldens.tensors(name)
    with jax.enable_x64(True):
        inputs = {tensor: jnp.asarray(values[f"in.{tensor}"]) for tensor in case["tensors"]}
        masks = jax.jit(lambda ts: jax.tree.map(lambda t: largest(t, 1 - case["ratio"]), ts))(inputs)
    for tensor, entry in case["tensors"].items():
        assert str(inputs[tensor].dtype) == entry["dtype"]
        kept = np.where(masks[tensor], values[f"in.{tensor}"], 0)
        np.testing.assert_array_equal(kept, values[f"out.{tensor}"], err_msg=tensor)
        assert int(masks[tensor].sum()) == entry["kept"]


def test_random_pruning_keeps_what_the_draw_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded draws in place of ours the state after the reset is the recorded one."""
    name = "prune_07_random_0.9"
    case, values = goldens.settings(name), goldens.tensors(name)
    for tensor, entry in case["tensors"].items():
        if len(entry["shape"]) != 2:
            continue
        t, u = jnp.asarray(values[f"in.{tensor}"]), jnp.asarray(values[f"u.{tensor}"])
        rows, columns = entry["shape"]
        spec = relora.plan({"kernel": jax.ShapeDtypeStruct((rows, rows), t.dtype)}, "kernel", rank=min(rows, columns))
        spec = relora.Spec(
            tuple(relora.Leaf("kernel", (rows, 999), "float32", (), (0,), (1,)) for _ in "1"), columns, 1.0
        )
        monkeypatch.setattr(jax.random, "uniform", lambda *args, u=u, **kwargs: u)
        state = {"trace": {"kernel:a": t}}
        kept = relora.reset_state(state, spec, "reference_random", keep=1 - case["ratio"], key=jax.random.key(0))
        np.testing.assert_array_equal(kept["trace"]["kernel:a"], values[f"out.{tensor}"], err_msg=tensor)


def tree(values: dict[str, np.ndarray], prefix: str) -> dict:
    """The file's tensors as our tree; torch's matrices are [out, in]."""
    leaves = {ours: values[prefix + theirs] for theirs, ours in NAMES.items()}
    return relora.trees.nested(
        {path: jnp.asarray(x.T if "lora" in path or ":" in path else x) for path, x in leaves.items()}
    )


@functools.lru_cache
def recorded(name: str) -> tuple:
    """(settings, tensors, spec, optimizer, its update, parameters and state before the reset) of a case."""
    case, values = goldens.settings(name), goldens.tensors(name)
    rank = values["param.initial.block.attn.lora_A.weight"].shape[0]

    def leaf(path: str) -> relora.Leaf:
        stem = path.replace("/kernel", "").replace("/", ".")
        a, b = (values[f"param.initial.{stem}.lora_{x}.weight"] for x in "AB")
        return relora.Leaf(path, (a.shape[1], b.shape[0]), "float32", (), (0,), (1,))

    spec = relora.Spec(tuple(leaf(path) for path in KERNELS), rank, 32.0)
    how = case["optimizer"]
    direction = optax.scale_by_adam(*how["betas"], how["eps"])
    optimizer = relora.chain(spec, direction, how["lr"], clip_norm=None, weight_decay=how["weight_decay"])
    update = jax.jit(optimizer.update)
    params, state = tree(values, "param.initial."), optimizer.init(tree(values, "param.initial."))
    for step in range(case["reset_before_update_index"]):
        changes, state = update(tree(values, f"grad.{step}."), state, params)
        params = optax.apply_updates(params, changes)
    return case, values, spec, update, params, state


def moments(state: optax.OptState, param: str) -> list[jax.Array]:
    leaves = jax.tree.leaves(state)
    return [leaves[slot.index] for slot in relora.slots.slots(state, {param: None})]


def require_moments(state: optax.OptState, values: dict[str, np.ndarray], when: str, tolerance: float = 1e-6) -> None:
    for theirs, ours in NAMES.items():
        found = moments(state, ours)
        assert len(found) == 2
        for kind, mine in zip(("exp_avg", "exp_avg_sq"), found, strict=True):
            wanted = values[f"{kind}.{when}.{theirs}"]
            wanted = wanted.T if ":" in ours else wanted
            np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=tolerance * np.abs(wanted).max(), err_msg=theirs)


def test_the_reference_reset_by_magnitude_and_the_jump_after_it() -> None:
    case, values, spec, update, params, state = recorded("optreset_01_magnitude_0.9")
    require_moments(state, values, "before")
    reset = relora.reset_state(state, spec, "reference", keep=1 - case["ratio"])
    require_moments(reset, values, "after")
    last = case["updates"] - 1
    changes, _ = update(tree(values, f"grad.{last}."), reset, params)
    final, wanted = (
        relora.trees.flat(optax.apply_updates(params, changes)),
        relora.trees.flat(tree(values, "param.final.")),
    )
    for path in wanted:
        np.testing.assert_allclose(final[path], wanted[path], rtol=2e-5, atol=1e-6, err_msg=path)
    jumps = {path: float(jnp.abs(x).max()) / case["optimizer"]["lr"] for path, x in relora.trees.flat(changes).items()}
    for theirs, ours in NAMES.items():
        assert jumps[ours] == pytest.approx(case["largest_last_update_over_lr"][theirs], rel=0.05)
    assert max(jumps.values()) > 70


def test_the_random_reset_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case, values, spec, _, _, state = recorded("optreset_04_full_reset")
    draws = {
        (field, ours): values[f"u.{kind}.{theirs}"].T
        for theirs, ours in FACTORS.items()
        for field, kind in (("mu", "exp_avg"), ("nu", "exp_avg_sq"))
    }

    def recorded_draw(key: jax.Array, name: str, keep: float, shape: tuple) -> jax.Array:
        parts = name.split("/")
        return jnp.asarray(draws[parts[-1], "/".join(parts[:-1])] > 1 - keep)

    monkeypatch.setattr(relora.reset, "_drawn", recorded_draw)
    reset = relora.reset_state(state, spec, "reference_random", key=jax.random.key(0))
    require_moments(reset, values, "after")
    assert case["ratio"] == 1 - relora.KEEP_RANDOM


@pytest.mark.parametrize("method", ["zero", "magnitude", "random", "keep"])
def test_no_reset_of_ours_makes_an_update_jump(method: str) -> None:
    """v = 0 implies m = 0, and the next update, even with the gradient of A exactly zero, is at most four learning rates."""
    case, values, spec, update, params, state = recorded("optreset_01_magnitude_0.9")
    reset = relora.reset_state(state, spec, method, key=jax.random.key(1))
    gradient = tree(values, f"grad.{case['updates'] - 1}.")
    for dead in (False, True):
        grads = relora.trees.flat(gradient)
        grads = {path: jnp.zeros_like(g) if dead and path.endswith(":a") else g for path, g in grads.items()}
        changes, _ = update(relora.trees.nested(grads), reset, params)
        largest_change = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(changes))
        assert largest_change <= 4 * case["optimizer"]["lr"]
    kept = 0
    for path in spec.adapters:
        m, v = moments(reset, path)
        assert not np.any((np.asarray(v) == 0) & (np.asarray(m) != 0))
        kept += int(jnp.sum(m != 0))
    total = sum(moments(reset, path)[0].size for path in spec.adapters)
    assert {
        "zero": kept == 0,
        "keep": kept == total,
        "magnitude": 0.08 < kept / total < 0.12,
        "random": kept < 0.03 * total,
    }[method]
    for path in ("norm/scale", "embed/embedding"):
        for before, after in zip(moments(state, path), moments(reset, path), strict=True):
            np.testing.assert_array_equal(before, after)


def test_the_counter_starts_again_for_the_adapters_alone() -> None:
    case, _, spec, _, params, state = recorded("optreset_01_magnitude_0.9")
    updates = case["reset_before_update_index"]

    def counts(state: optax.OptState) -> list[int]:
        found = zip(relora.slots.names(state), jax.tree.leaves(state), strict=True)
        return [int(x) for name, x in found if name.endswith("count") and "inner_states" in name]

    assert counts(state) == [updates, updates]
    assert sorted(counts(relora.reset_state(state, spec))) == [0, updates]
    assert counts(relora.reset_state(state, spec, "magnitude")) == [updates, updates]
    assert int(relora.applied_updates(relora.reset_state(state, spec))) == updates
    shared = optax.adam(0.1).init(params)
    with pytest.raises(ConfigError, match="share their step counter"):
        relora.reset_state(shared, spec)
    assert counts(relora.reset_state(state, spec, reset_count=False)) == [updates, updates]
    relora.reset_state(shared, spec, reset_count=False)


def test_one_threshold_for_each_layer_of_a_stack() -> None:
    """Pruning a stack is pruning its layers one by one."""
    layers = jax.random.normal(jax.random.key(0), (3, 8, 4)) * jnp.array([1.0, 100.0, 0.01])[:, None, None]
    one_by_one = jnp.stack([largest(layer, 0.25) for layer in layers])
    np.testing.assert_array_equal(largest(layers, 0.25, stacked=1), one_by_one)
    assert int(one_by_one.sum()) == 3 * 8
    spec = relora.plan(
        {"layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)}},
        relora.Kernel("kernel", (0,), (1,)),
        rank=4,
    )
    pruned = relora.reset_state({"trace": {"layers": {"kernel:a": layers}}}, spec, "magnitude", keep=0.25)
    np.testing.assert_array_equal(pruned["trace"]["layers"]["kernel:a"], jnp.where(one_by_one, layers, 0))


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.adafactor(0.1, min_dim_size_to_factor=2)]
)
def test_other_optimizers(optimizer: optax.GradientTransformation) -> None:
    _, values, spec, _, params, _ = recorded("optreset_01_magnitude_0.9")

    @jax.jit
    def states() -> tuple:
        _, state = optimizer.update(tree(values, "grad.0."), optimizer.init(params), params)
        return state, relora.reset_state(state, spec, reset_count=False)

    state, reset = states()
    assert float(relora.reset.zeroed(reset, spec)) == 1.0 > float(relora.reset.zeroed(state, spec))
    assert jax.tree.structure(reset) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "zeros"}, "'zeros' is unknown; use zero"),
        ({"method": "zero", "keep": 0.1}, "use 'magnitude' or 'random'"),
        ({"method": "magnitude", "keep": 1.1}, "must lie between 0 and 1"),
        ({"method": "random"}, "pass key="),
    ],
)
def test_refusals(settings: dict, message: str) -> None:
    _, _, spec, _, _, state = recorded("optreset_01_magnitude_0.9")
    with pytest.raises(ConfigError, match=message):
        relora.reset_state(state, spec, **settings)


def test_a_state_of_another_tree_is_refused() -> None:
    _, _, spec, _, _, _ = recorded("optreset_01_magnitude_0.9")
    with pytest.raises(ConfigError, match="nothing under the adapters' paths"):
        relora.reset_state(optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones((2, 2))}), spec)
    factored = {"v_row": {"block": {"attn": {"kernel:a": jnp.ones((3,))}}}}
    with pytest.raises(ConfigError, match="not entry by entry; use reset 'zero'"):
        relora.reset_state(factored, spec, "magnitude")
