"""The articles of a run that reads in lanes: opened, checked against the run, and read."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ssm_jax import distributed
from ssm_jax.data.lanes import Documents, counted_afresh, lane_batches
from ssm_jax.data.mixture import Mixture
from ssm_jax.data.packing import Row
from ssm_jax.data.schedule import Schedule
from ssm_jax.errors import ConfigError, DataError
from ssm_jax.training.config import LanesConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Lanes:
    """documents and held_out: the articles of both splits. schedule, held_out_schedule: who reads them when; the latter is one pass
    in stored order."""

    documents: Documents
    schedule: Schedule
    held_out: Documents | None = None
    held_out_schedule: Schedule | None = None


def carried_lanes(config: RunConfig) -> int | None:
    """Lanes whose state goes from update to update; None where every window begins with an empty one."""
    return config.batch.size if config.train.carry_state else None


def require_lanes_for_carry(config: RunConfig) -> None:
    """Raises ConfigError where ``train.carry_state`` is set and there is nothing to carry, or nowhere to carry it to."""
    if not config.train.carry_state:
        return
    if config.data.lanes is None:
        reason = (
            "the data is read as rows, and a row does not go on where the one before it in the batch ended; set data.lanes.window, "
            "with data prepared with --form documents"
        )
    elif config.data.lanes.refill == "closing":
        reason = (
            "data.lanes.refill is closing, where an article may go on in another lane; set data.lanes.refill=stable, which reads "
            "the same articles in the same steps"
        )
    elif config.distill is not None:
        reason = (
            "a teacher is set, which reads only some of the windows and so has no state to go on from; set one of distill=null and "
            "train.carry_state=false"
        )
    else:
        return
    raise ConfigError(f"Config key 'train.carry_state' is true and {reason}.")


def open_lanes(config: RunConfig, data: Mixture, held_out: Mixture | None, limit: int | None) -> Lanes | None:
    """The articles of a run; None where it reads rows. ``limit``: tokens of the longest document that the model reads.

    Raises:
        DataError: a damaged record, nothing to predict, or with ``train.carry_state`` an article longer than the limit.
    """
    lanes = config.data.lanes
    if lanes is None:
        return None
    documents = Documents(data.datasets[0])
    schedule = _schedule(documents, lanes, config, config.batch.size, epochs=config.train.epochs)
    others = None if held_out is None else Documents(held_out.datasets[0])
    for each in (documents, others):
        longest = 0 if each is None else int(each.lengths.max())
        if config.train.carry_state and limit is not None and longest > limit:
            raise DataError(
                f"Config key 'train.carry_state' is true, the longest article in {data.path} has {longest} tokens and the model "
                f"reads at most {limit}; set train.carry_state=false, or take a family without a limit."
            )
    if others is None:
        return Lanes(documents, schedule)
    once = dataclasses.replace(lanes, refill="stable", shuffle=False)
    part = config.batch.size // config.batch.microbatches
    return Lanes(documents, schedule, others, _schedule(others, once, config, part, epochs=1.0))


def training_rows(lanes: Lanes, config: RunConfig, start_step: int) -> Iterator[Row]:
    """This process's part of the batches from ``start_step`` on, with positions counted from the window's start where no state is
    carried into it."""
    assert config.data.lanes is not None
    within = config.data.lanes.targets == "within_windows"
    return _read(lanes.documents, lanes.schedule, config, start_step, within)


def held_out_rows(lanes: Lanes, config: RunConfig) -> Iterator[Row]:
    """One pass over the held-out articles, every token but an article's first being a target."""
    assert lanes.held_out is not None
    assert lanes.held_out_schedule is not None
    return _read(lanes.held_out, lanes.held_out_schedule, config)


def carried_from(identity: Mapping[str, Any], config: RunConfig) -> dict[str, Any] | None:
    """What must be the same for a carried state to be that of the lanes now; None where none is carried."""
    if not config.train.carry_state:
        return None
    return {
        "model": identity["model"],
        "data": identity["data"],
        "batch": {"size": config.batch.size},
        "train": {"epochs": config.train.epochs},
    }


def _schedule(
    documents: Documents, lanes: LanesConfig, config: RunConfig, count: int, epochs: float | None
) -> Schedule:
    return Schedule(
        documents.lengths,
        lanes=count,
        window=lanes.window,
        refill=lanes.refill,
        seed=config.data.seed,
        shuffle=lanes.shuffle,
        epochs=epochs,
    )


def _read(
    documents: Documents, schedule: Schedule, config: RunConfig, start_step: int = 0, within_windows: bool = False
) -> Iterator[Row]:
    rows = lane_batches(
        documents,
        schedule,
        start_step=start_step,
        within_windows=within_windows,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
    )
    return rows if config.train.carry_state else map(counted_afresh, rows)
