"""The training run, read from top to bottom."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_jax import distributed, sharding
from ssm_jax.checkpoint import store
from ssm_jax.checkpoint.model import CHECKPOINTS
from ssm_jax.config import to_dict
from ssm_jax.data.packing import Row
from ssm_jax.data.pipeline import batches
from ssm_jax.errors import UserError
from ssm_jax.optim.relora import Spec
from ssm_jax.training import carry as carry_lib
from ssm_jax.training import distillation, low_rank, saving, summary
from ssm_jax.training import run as run_lib
from ssm_jax.training import state as state_lib
from ssm_jax.training.config import RunConfig, interval
from ssm_jax.training.lanes import carried_lanes, training_rows
from ssm_jax.training.losses import seen
from ssm_jax.training.metrics import Meter, MetricsLog, require_trackers
from ssm_jax.training.progress import TrainingProgress
from ssm_jax.training.run import Run
from ssm_jax.training.samples import write_samples
from ssm_jax.training.signals import StopRequest
from ssm_jax.training.state import TrainState
from ssm_jax.training.step import abstract_batch, compile_step, make_step
from ssm_jax.training.teacher import load_teacher, tables_for
from ssm_jax.training.tracing import Tracer
from ssm_jax.training.validation import Scores, make_evaluation
from ssm_jax.typing import Params

_WARM_STEPS, _TIMED_STEPS = 2, 10


def train(config: RunConfig) -> dict[str, Any]:
    """Trains, or goes on with, the run in ``config.output``; returns what ``summary.json`` holds.

    Raises:
        UserError: something in config, data, mesh or run folder cannot be used (raised before anything compiles or is
            overwritten); damaged data or checkpoints; gradients that stay non-finite.
    """
    started = time.monotonic()
    distributed.initialize()
    require_trackers(config.log)
    run = run_lib.prepare(config)
    config, model, mesh = run.config, run.model, run.mesh
    lanes = carried_lanes(config)
    low_rank.require_length(config, None if config.train.time_budget_s is not None else _steps(run, Meter()))
    run_lib.check_folder(run)
    spec = _first_spec(run)
    shapes, frozen_shapes = low_rank.stored_shapes(model, config, mesh, spec)
    restored = saving.restore(run.folder, shapes, frozen_shapes, saving.lanes_of(run), spec)
    resumed = restored is not None
    if restored is not None:
        low_rank.require_cadence(restored.state, config.optim)
    params = None if resumed else run_lib.initial_params(run)
    teacher = load_teacher(run.teacher, mesh)
    run_lib.describe_in_folder(run)
    if not resumed:
        saving.begin(run)

    master = None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(config.train.max_seconds))
        progress = stack.enter_context(TrainingProgress())
        progress.note(summary.headline(run, shapes, frozen_shapes))
        if mesh.size > 1:
            progress.note(sharding.describe(shapes.params, mesh, state_lib.parameter_axes(shapes.params, spec)))

        if restored is not None:
            state, frozen, meter, changed = restored
            restored = None  # so that nothing of it outlives what takes its place
            frozen, master = low_rank.rounded(frozen, config.optim, spec)
            total_steps = _steps(run, meter) or int(state.total_steps)
            state = _with_total_steps(state, total_steps)
            finished = meter.step >= total_steps and summary.read(run.folder).get("steps") == meter.step
            if distributed.from_main(int(finished)):
                progress.note(f"this run is finished, at step {meter.step}; nothing to do")
                return summary.read(run.folder)
            progress.note(f"going on from step {meter.step} of {total_steps}")
            if lanes is not None and state.carry is None:
                state = dataclasses.replace(state, carry=carry_lib.empty_on(model, lanes, mesh))
                progress.note(f"every lane begins with an empty state: {'; '.join(changed)}")

        programs = _programs(run, spec, teacher, progress)
        if not resumed:
            meter = Meter()
            total_steps = _steps(run, meter) or _steps_in_budget(programs.step, run, spec, teacher, progress)
            tables = tables_for(run.teacher, teacher)
            begin = functools.partial(state_lib.initialize, model, config.optim, mesh, config.seed)
            state, frozen = begin(total_steps, params, tables, lanes, spec)
            frozen, master = low_rank.rounded(frozen, config.optim, spec)
            params = tables = None

        every = _intervals(config, total_steps)
        log = stack.enter_context(MetricsLog(run.folder, meter.step, config.log, to_dict(config)))
        tracer = stack.enter_context(Tracer(run.folder, config.train.profile))
        rows = _rows(run, meter.rows)
        cadence = low_rank.Cadence(config.optim.relora)
        fixed = distillation.fixed(frozen, teacher)
        scores: dict[str, float] = {}
        done = saved = meter.step
        unread = None  # metrics of the last step: read after the next one is on its way, so that the device never waits

        def read(metrics: dict[str, jax.Array]) -> None:
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            row = meter.row(meter.step + 1, values, config.batch.size, programs.flops)
            if row["step"] % config.log.every == 0 or row["step"] == total_steps:
                log.write(row)
            progress.update(row)
            _require_finite(row, config)

        progress.start(done, total_steps)
        meter.restart()
        while done < total_steps and not stop.at(done):
            change = cadence.before(done, state)
            if change is not None:
                if unread is not None:
                    read(unread)
                    unread = None
                if change == "begin":
                    spec = run.spec
                    state, frozen, master = low_rank.begin(state, frozen, model, config, mesh, spec)
                    programs = _programs(run, spec, teacher, progress)
                else:
                    state, frozen, master, found = low_rank.merge(state, frozen, master, config.optim, spec)
                    log.write({"step": done + 1, **found})  # of the update after it, which a resumed run does again
                fixed = distillation.fixed(frozen, teacher)
                meter.restart()
            with meter.waiting("data_s"):
                batch = sharding.put_batch(next(rows), mesh)
            tracer.before(done + 1)
            state, metrics = programs.step(state, fixed, batch)
            done += 1
            tracer.after(done, metrics)
            if unread is not None:
                with meter.waiting("wait_s"):
                    jax.block_until_ready(unread)
                read(unread)
            unread = metrics
            due = {name for name, n in every.items() if done == total_steps or (n and done % n == 0)}
            if due:
                read(unread)
                unread = None
                if "eval" in due and programs.evaluate is not None:
                    scores = programs.evaluate(state.average, frozen)
                    log.write({"step": done, **scores})
                    progress.note(f"step {done}, held out: {summary.describe_scores(scores)}")
                if "checkpoint" in due:
                    saving.save(run, state, low_rank.stored(frozen, master), meter, spec)
                    saved = done
                if "sample" in due and config.sample.prompts:  # after the checkpoint: the steps up to here are kept
                    write_samples(run, done, low_rank.whole_params(state, frozen, spec), log, progress)
                meter.restart()
        if unread is not None:
            read(unread)
        if saved < done:
            saving.save(run, state, low_rank.stored(frozen, master), meter, spec)
        if done == total_steps and not scores and programs.evaluate is not None:  # killed between last save and summary
            scores = programs.evaluate(state.average, frozen)
        if done < total_steps:
            progress.note(f"stopped at step {done} of {total_steps}; the same command goes on from there")
        measured = {**scores, "compile_s": programs.compile_s, "session_s": time.monotonic() - started}
        return summary.write(run, state, frozen, meter, programs.step, measured)


class _Programs(NamedTuple):
    """What is compiled for ordinary training or for low-rank paths, and the operations of a step."""

    step: jax.stages.Compiled
    evaluate: Callable[[Params, Params], Scores] | None
    flops: dict[str, float]
    compile_s: float


def _programs(run: Run, spec: Spec | None, teacher: Params | None, progress: TrainingProgress) -> _Programs:
    started, config, mesh = time.monotonic(), run.config, run.mesh
    model = low_rank.applied_model(run.model, config.optim, spec)
    objective = distillation.objective_of(run, model)
    parts = sharding.batch_parts(mesh)
    step = make_step(run.model, config.optim, config.batch.microbatches, parts, objective, spec)
    shapes, frozen_shapes = state_lib.abstract(run.model, config.optim, mesh, carried_lanes(config), spec)
    frozen_shapes, _ = low_rank.rounded(frozen_shapes, config.optim, spec)
    batch_shapes = abstract_batch(config.batch.size, run.data.seq_len, mesh, config.data.joined)
    compiled = compile_step(step, shapes, distillation.fixed(frozen_shapes, teacher), batch_shapes, mesh)
    compile_s = time.monotonic() - started
    progress.note(("" if spec is None else f"{low_rank.describe(spec)}, ") + f"compiled in {compile_s:.1f} s")
    return _Programs(compiled, make_evaluation(run, model), summary.flops_per_step(run, spec), compile_s)


def _first_spec(run: Run) -> Spec | None:
    """Of the low-rank paths that the run begins, or goes on, with; None where it trains at full rank first, or for good."""
    relora = run.config.optim.relora
    if relora is None:
        return None
    if store.steps(run.folder / CHECKPOINTS):
        return run.spec if saving.holds_low_rank_paths(run.folder) else None
    return None if relora.warm_start else run.spec


def _rows(run: Run, start_row: int) -> Iterator[Row]:
    if run.lanes is not None:
        return training_rows(run.lanes, run.config, start_row // run.config.batch.size)
    rows = batches(
        run.data,
        batch_size=run.config.batch.size,
        seed=run.config.data.seed,
        start_row=start_row,
        process_index=distributed.process_index(),
        process_count=distributed.process_count(),
    )
    return (seen(row, run.config.data.joined) for row in rows)


def _steps(run: Run, meter: Meter) -> int | None:
    """The length of the run where it does not depend on the machine."""
    config = run.config
    if config.train.epochs is None:
        return config.train.steps
    if run.lanes is not None:
        # Steps of the schedule, which are those of the run as long as it has the same lanes.
        return max(1, meter.step - meter.rows // config.batch.size + (run.lanes.schedule.steps or 0))
    return max(1, math.ceil(config.train.epochs * run.data.rows / config.batch.size))


def _steps_in_budget(
    train_step: jax.stages.Compiled, run: Run, spec: Spec | None, teacher: Params | None, progress: TrainingProgress
) -> int:
    """How many steps fit into ``train.time_budget_s``, from a few timed ones on a state that is thrown away."""
    lanes, optim_config = carried_lanes(run.config), run.config.optim
    state, frozen = state_lib.initialize(run.model, optim_config, run.mesh, run.config.seed, 1, lanes=lanes, spec=spec)
    frozen, _ = low_rank.rounded(frozen, optim_config, spec)
    fixed, batch = distillation.fixed(frozen, teacher), sharding.put_batch(next(_rows(run, 0)), run.mesh)
    started = 0.0
    for i in range(_WARM_STEPS + _TIMED_STEPS):
        if i == _WARM_STEPS:
            jax.block_until_ready(state)
            started = time.monotonic()
        state, _ = train_step(state, fixed, batch)
    jax.block_until_ready(state)
    step_s = (time.monotonic() - started) / _TIMED_STEPS
    budget = run.config.train.time_budget_s or 0.0
    steps = distributed.from_main(low_rank.whole_cycles(optim_config, max(1, int(budget / step_s))))
    progress.note(f"a step takes {step_s:.3f} s: {steps} steps fit into {budget:g} s")
    return steps


def _with_total_steps(state: TrainState, total_steps: int) -> TrainState:
    placed = jax.device_put(jnp.int32(total_steps), state.total_steps.sharding)
    return dataclasses.replace(state, total_steps=placed)


def _intervals(config: RunConfig, total_steps: int) -> dict[str, int]:
    sections = {"eval": config.eval.every, "sample": config.sample.every, "checkpoint": config.checkpoint.every}
    return {name: interval(every, total_steps) for name, every in sections.items()}


def _require_finite(row: dict[str, Any], config: RunConfig) -> None:
    if row["skipped_in_a_row"] > config.optim.max_skipped:
        raise UserError(
            f"Gradients were not finite in {row['skipped_in_a_row']} updates in a row, up to step {row['step']}; lower optim.lr. "
            "None of them reached the parameters."
        )
