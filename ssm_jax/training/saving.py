"""A train state as a checkpoint: parameters, optimizer, step, RNG key, carried state, data position.

Frozen leaves lie beside the checkpoints, once; those that have low-rank paths change with every merge, and are in each.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ssm_jax import checkpoint, distributed
from ssm_jax.checkpoint import manifest
from ssm_jax.checkpoint.model import CHECKPOINTS, FROZEN, LOW_RANK, require_frozen
from ssm_jax.checkpoint.store import write_folder
from ssm_jax.errors import CheckpointError, ConfigError
from ssm_jax.optim.relora import Spec
from ssm_jax.optim.relora.trees import flat
from ssm_jax.training.lanes import carried_from
from ssm_jax.training.metrics import Meter
from ssm_jax.training.run import Run, differences, identity
from ssm_jax.training.state import TrainState
from ssm_jax.typing import Params, PyTree


class Restored(NamedTuple):
    """What a checkpoint gives back. ``state.carry`` is None where it was not saved, or by lanes that differ in ``changed``."""

    state: TrainState
    frozen: Params
    meter: Meter
    changed: list[str]


def lanes_of(run: Run) -> dict[str, Any] | None:
    """What a carried state belongs to; None where none is carried."""
    return carried_from(identity(run.config, run.data), run.config)


def save(run: Run, state: TrainState, frozen: Params, meter: Meter, spec: Spec | None = None) -> Path:
    """Writes the checkpoint of the step the meter stands at, and drops old ones. ``spec``: of the low-rank paths in it."""
    root, config = run.folder / CHECKPOINTS, run.config
    beside = frozen if spec is None else {}
    if beside and not distributed.from_main(int(checkpoint.is_checkpoint(root / FROZEN))):
        write_folder(root / FROZEN, {"params": beside}, {})
    info = {
        "counts": meter.counts(),
        "model": config.model,
        "freeze": list(config.optim.freeze),
        "train": list(config.optim.train),
        "ema": config.optim.ema,
        "frozen": manifest.digest(root / FROZEN) if beside else None,
        **({"carry": lanes_of(run)} if state.carry is not None else {}),
        **({LOW_RANK: {**spec.to_dict(), "frozen_dtype": _dtype_of(frozen, spec)}} if spec is not None else {}),
    }
    items = _items(state) | ({} if spec is None else {"frozen": frozen})
    keep = config.checkpoint
    return checkpoint.save(root, meter.step, items, info, keep.keep, keep.keep_every)


def holds_low_rank_paths(folder: Path) -> bool:
    """Whether there are any in the last good checkpoint."""
    newest = checkpoint.latest_good(folder / CHECKPOINTS, set_aside=True)
    return newest is not None and LOW_RANK in checkpoint.store.read_info(newest)


def begin(run: Run) -> None:
    """For a run that starts anew: takes away frozen leaves that an earlier start left without a checkpoint."""
    if distributed.is_main():
        shutil.rmtree(run.folder / CHECKPOINTS / FROZEN, ignore_errors=True)
    distributed.barrier("the run starts anew")


def restore(
    folder: Path,
    abstract_state: TrainState,
    abstract_frozen: Params,
    lanes: Mapping[str, Any] | None = None,
    spec: Spec | None = None,
) -> Restored | None:
    """State, frozen leaves and counts of the last good checkpoint, on the shardings asked for; None if there is none yet.

    Damaged ones are set aside with a warning. ``lanes``: what a carried state must belong to, see ``lanes_of``. ``spec``: of the
    low-rank paths in the state.

    Raises:
        CheckpointError: all are damaged, the frozen leaves are, or the arrays do not fit. ConfigError: other low-rank paths.
    """
    root = folder / CHECKPOINTS
    newest = checkpoint.latest_good(root, set_aside=True)
    if newest is None:
        return None
    info = checkpoint.store.read_info(newest)
    _require_same_paths(newest, info, spec)
    saved = info.get("carry")
    if saved is None or saved != lanes:
        abstract_state = dataclasses.replace(abstract_state, carry=None)
    wanted = _items(abstract_state) | ({} if spec is None else {"frozen": abstract_frozen})
    items, info = checkpoint.restore(newest, wanted)
    if "rows" not in info["counts"]:
        raise CheckpointError(
            f"Checkpoint {newest} does not say how much data was read; it was saved by another version."
        )
    frozen: Params = items.get("frozen", {})
    if abstract_frozen and spec is None:
        require_frozen(newest, info)
        frozen = checkpoint.restore(root / FROZEN, {"params": abstract_frozen})[0]["params"]
    fields = {**items["train"], "carry": items.get("carry")}
    state = TrainState(params=items["params"], ema=items.get("ema"), **fields)
    changed: list[str] = []
    if lanes is not None and state.carry is None:
        changed = ["the checkpoint was saved without one"] if saved is None else differences(saved, lanes)
    return Restored(state, frozen, Meter(**info["counts"]), changed)


def _require_same_paths(newest: Path, info: Mapping[str, Any], spec: Spec | None) -> None:
    stored = info.get(LOW_RANK)
    if stored is not None and spec is None:
        raise ConfigError(
            f"Checkpoint {newest} holds low-rank paths of rank {stored['rank']}, and config section 'optim.relora' is null; set it "
            "as it was, or start another run from these weights (init_from)."
        )
    if stored is not None and spec is not None:
        spec.require_same(Spec.from_dict(stored))


def _dtype_of(frozen: Params, spec: Spec) -> str:
    return str(flat(frozen)[spec.leaves[0].path].dtype)


def _items(state: TrainState) -> dict[str, PyTree]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if state.merges is None:
        del fields["merges"]  # which older checkpoints do not have
    items = {name: fields.pop(name) for name in ("params", "ema", "carry")}
    items["train"] = {
        **fields,
        "carry": None,
    }  # apart, since lanes may change; the empty place is that of older checkpoints
    return {name: item for name, item in items.items() if item is not None}
