"""What a run hands to ReLoRA and takes from it, piece by piece, without training."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax import optim, sharding
from ssm_jax.errors import ConfigError
from ssm_jax.optim import relora
from ssm_jax.optim.relora.optimizer import AppliedState
from ssm_jax.optim.relora.trees import flat
from ssm_jax.training import load_run_config, low_rank
from ssm_jax.training import state as state_lib
from ssm_jax.training.state import TrainState
from ssm_jax.training.step import _learning_rate
from tests.training.conftest import Overrides

MODEL = ssm_jax.build("mamba", vocab_size=32, d_model=8, n_layers=1)


def config(**settings: Any) -> optim.OptimConfig:
    return optim.OptimConfig(relora=optim.ReLoRAConfig(**{"cycle": 4, "rank": 2, "rewarmup": 2, **settings}))


def counted(applied: int, **fields: Any) -> TrainState:
    empty = dict.fromkeys(("params", "opt_state", "step", "total_steps", "key"))
    return TrainState(**{**empty, "opt_state": AppliedState(jnp.int32(applied)), **fields})


def spec_of(settings: optim.OptimConfig) -> relora.Spec:
    spec = low_rank.plan(MODEL, settings)
    assert spec is not None
    return spec


def test_the_rate_rises_where_applied_updates_end_a_cycle() -> None:
    """The schedule goes by the run's steps, its teeth by the updates that were applied since the warm start of 3."""
    settings = config(warm_start=3)
    spec = spec_of(settings)

    def rate(applied: int, skipped: int) -> float:
        step = jnp.int32(3 + applied + skipped)
        return float(_learning_rate(settings, counted(applied, step=step, total_steps=jnp.int32(27)), spec))

    def of_run(step: int) -> float:
        return float(optim.learning_rate(settings, jnp.int32(step), jnp.int32(27)))

    found = [rate(applied, 0) for applied in range(8)]
    wanted = [0, of_run(5) / 2, of_run(5), of_run(6), 0, of_run(9) / 2, of_run(9), of_run(10)]
    assert found == pytest.approx(wanted)
    found = [rate(applied, 2) for applied in range(3, 7)]
    assert found == pytest.approx([of_run(8), 0, of_run(11) / 2, of_run(11)])
    full = counted(0, step=jnp.int32(2), total_steps=jnp.int32(27))
    assert float(_learning_rate(settings, full, None)) == pytest.approx(of_run(2))


def test_what_is_configured_reaches_the_merge_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(reset="magnitude", keep=0.25, dropout=0.5)
    spec, given = spec_of(settings), {}

    def merged(*arguments: Any, **how: Any) -> Any:
        given.update(how, key=arguments[-1], trees=arguments[:-3])
        return (*arguments[:-1], {"rounding_loss": jnp.float32(0.5)})

    monkeypatch.setattr(relora, "merge_and_reset", merged)
    monkeypatch.setattr(relora, "merge_with_master", merged)
    state = counted(8, params="adapters", key=jax.random.key(5), merges=jnp.int32(1))
    for master in (None, {"kernel": 2}):
        after, frozen, kept, metrics = low_rank.merge(state, {"kernel": 1}, master, settings, spec)
        assert (int(after.merges), after.params, frozen, kept) == (2, "adapters", {"kernel": 1}, master)
        assert metrics == {"relora/merges": 2, "relora/rounding_loss": 0.5}
        assert (given["spec"], given["method"], given["keep"]) == (spec, "magnitude", 0.25)
        assert given["trees"] == (({"kernel": 1},) if master is None else (master, {"kernel": 1}))
        assert given["key"] == state_lib.restart_key(state.key, 2)
    assert state_lib.restart_key(state.key, 1) != state_lib.restart_key(state.key, 2)
    applied = low_rank.applied_model(MODEL, settings, spec)
    assert isinstance(applied, relora.Wrapped)
    assert (applied.model, applied.spec, applied.dropout) == (MODEL, spec, 0.5)


@pytest.mark.parametrize("carried", [True, False])
def test_the_phase_changes_and_nothing_else_does(carried: bool, overrides: Overrides, tmp_path: Path) -> None:
    """Low-rank paths begin: the function, counts, carried lanes and (where that is asked for) moments stay; old moments go."""
    lanes = {"data__lanes__window": 16, "train__carry_state": "true"}
    paths = {"rank": 2, "cycle": 2, "rewarmup": 1, "warm_start": 2, "frozen_dtype": "bfloat16", "master": "true"}
    paths |= {"carry_moments": str(carried).lower()}
    fields = overrides(tmp_path / "run", **lanes, **{f"optim__relora__{name}": value for name, value in paths.items()})
    run = load_run_config(None, [*fields, 'optim.freeze=["^norm_f/"]'])
    spec, mesh = spec_of(run.optim), sharding.make_mesh(run.mesh)
    state, frozen = state_lib.initialize(MODEL, run.optim, mesh, 0, 100, lanes=8)

    def filled(name: str, leaf: jax.Array) -> jax.Array:
        value = {"count": 7, "total_notfinite": 3, "position": 5}.get(name.split("/")[-1], 0.5)
        return jax.device_put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)

    def fill(tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten([filled(*pair) for pair in zip(relora.slots.names(tree), leaves, strict=True)])

    state = state.replace(opt_state=fill(state.opt_state), carry=fill(state.carry), step=filled("count", state.step))
    old_params, old_carry, old_state = jax.device_get((optim.merge(state.params, frozen), state.carry, state.opt_state))
    moments = jax.tree.leaves(state.opt_state)
    after, kernels, master = low_rank.begin(state, frozen, MODEL, run, mesh, spec)

    assert all(moment.is_deleted() for moment in moments)
    assert (int(after.step), int(after.total_steps), int(after.merges)) == (7, 100, 0)
    jax.tree.map(np.testing.assert_array_equal, after.carry, old_carry)
    assert int(after.opt_state.total_notfinite) == 3
    assert int(relora.applied_updates(after.opt_state)) == 0
    others = {path: None for path in flat(after.params) if path not in spec.adapters}
    new, old = (
        {(slot.field, slot.param): jax.tree.leaves(tree)[slot.index] for slot in relora.slots.slots(tree, others)}
        for tree in (after.opt_state, old_state)
    )
    assert len(new) == 2 * len(others)
    for place, moment in new.items():
        np.testing.assert_array_equal(moment, old[place] if carried else 0 * old[place])
    assert float(relora.reset.zeroed(after.opt_state, spec)) == 1.0
    assert master is not None
    assert {leaf.dtype.name for leaf in jax.tree.leaves(master)} == {"float32"}
    assert {path: leaf.dtype.name for path, leaf in flat(kernels).items()} == {
        "norm_f/scale": "float32",
        **{leaf.path: "bfloat16" for leaf in spec.leaves},
    }
    whole = relora.export(master, after.params, spec)
    jax.tree.map(np.testing.assert_array_equal, optim.merge(whole, {"norm_f": kernels["norm_f"]}), old_params)


@pytest.mark.parametrize(
    ("applied", "merges", "cycle", "fits"),
    [(3, 0, 4, True), (4, 0, 4, True), (4, 1, 4, True), (5, 1, 4, True), (8, 1, 4, True), (0, 0, 4, True), (9, 2, None, True),
     (8, 1, 2, False), (6, 3, 4, False), (9, 0, 4, False), (5, 0, 4, False)],
)  # fmt: skip
def test_merges_that_were_done_must_be_those_of_the_cycle(
    applied: int, merges: int, cycle: int | None, fits: bool
) -> None:
    settings = config(cycle=cycle, rewarmup=1)
    low_rank.require_cadence(counted(applied), settings)
    state = counted(applied, merges=jnp.int32(merges))
    if fits:
        low_rank.require_cadence(state, settings)
        return
    with pytest.raises(ConfigError, match=rf"cycle' is {cycle}, and this run had {merges} merges in {applied} updates"):
        low_rank.require_cadence(state, settings)


@pytest.mark.parametrize("fixed", [{"freeze": ("_proj/kernel$",)}, {"train": ("norm",)}])
def test_where_every_kernel_is_fixed_the_reason_is_named(fixed: dict[str, Any]) -> None:
    settings = optim.OptimConfig(relora=optim.ReLoRAConfig(cycle=None, rank=2), **fixed)
    with pytest.raises(ConfigError, match=r"'optim\.relora': all kernels.*fixed by optim\.freeze or optim\.train"):
        low_rank.plan(MODEL, settings)


def test_the_rate_rises_over_a_tenth_of_a_cycle_unless_told() -> None:
    steps = {cycle: optim.ReLoRAConfig(cycle=cycle).rewarmup_steps for cycle in (1, 10, 300, 5000, None)}
    assert steps == {1: 0, 10: 1, 300: 30, 5000: 50, None: 50}
    assert optim.ReLoRAConfig(cycle=10, rewarmup=3).rewarmup_steps == 3
