"""One update as a pure function, and its compiled form on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ssm_jax import optim, sharding
from ssm_jax.models import LanguageModel
from ssm_jax.optim import relora
from ssm_jax.training import carry as carry_lib
from ssm_jax.training import derived, low_rank
from ssm_jax.training.losses import Batch, Objective, Sums, next_token_objective, seen
from ssm_jax.training.state import TrainState
from ssm_jax.typing import Params, PyTree

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_step(
    model: LanguageModel,
    config: optim.OptimConfig,
    microbatches: int = 1,
    batch_shards: int = 1,
    objective: Objective | None = None,
    spec: relora.Spec | None = None,
) -> Step:
    """``step(state, frozen, batch) -> (state, metrics)``.

    loss = sum over the whole batch of weight * nll / sum of weights; gradient of that with respect to ``state.params`` only;
    AdamW; an update with non-finite gradients changes nothing but the step and the counts.

    Where the state has a carry, rows go on from it, and it becomes what they leave, whether the update was skipped or not; see
    ``carry.kept``.

    ``objective`` takes the place of nll. What else it sums, under a name, becomes a metric, its mean, with ``name_weight`` beside
    it: 0 where this update had none of it.

    ``microbatches`` splits the lanes (never the time axis) and adds up sums: memory and rounding change, the result does not (but
    dropout draws anew for each).
    ``batch_shards``: over how many devices the lanes are split.
    ``spec``: of the low-rank paths in the state, see ``state.with_low_rank_paths``; the rate rises anew after each merge.
    """
    optimizer = optim.make_optimizer(config) if spec is None else relora.make_optimizer(config, spec)
    if objective is None:
        objective = next_token_objective(low_rank.applied_model(model, config, spec), batch_shards)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(state.key, state.step)

        params, pull_back = state.params, None
        if microbatches > 1:
            length, documents = batch["tokens"].shape[1], "positions" in batch
            params, pull_back = jax.vjp(
                lambda params: derived.extended(model, params, frozen, length, documents), params
            )

        def of_part(part: Batch, key: jax.Array, index: jax.Array, carry: PyTree) -> tuple[Sums, Params, PyTree]:
            return objective(params, frozen, part, key, index, carry)

        first = state.step * microbatches
        sums, grads, carry = _accumulate(of_part, batch, dropout_key, first, state.carry, microbatches)
        if pull_back is not None:
            (grads,) = pull_back(grads)
        loss, weight = sums.pop("loss")
        scale = _inverse(weight)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        lr = _learning_rate(config, state, spec)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate=lr)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if config.ema is None else optim.average(state.ema, params, config.ema, state.step)
        metrics = {
            "loss": loss * scale,
            "lr": lr,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "weight": weight,
            "skipped": opt_state.total_notfinite,
            "skipped_in_a_row": opt_state.notfinite_count,
            **{name: total * _inverse(weight) for name, (total, weight) in sums.items()},
            **{f"{name}_weight": weight for name, (_, weight) in sums.items()},
        }
        if carry is not None:
            carry = carry_lib.kept(model, carry, opt_state.notfinite_count)
        changed = {"params": params, "opt_state": opt_state, "ema": ema, "carry": carry, "step": state.step + 1}
        return dataclasses.replace(state, **changed), metrics

    return step


def _learning_rate(config: optim.OptimConfig, state: TrainState, spec: relora.Spec | None) -> jax.Array:
    """The schedule at this step of the run, and its teeth where applied updates with low-rank paths end a cycle."""
    if spec is None or config.relora is None:
        return optim.learning_rate(config, state.step, state.total_steps)
    applied, settings = relora.applied_updates(state.opt_state), config.relora
    first_step = state.step - applied

    def of_run(applied: jax.Array | int) -> jax.Array:
        rate = optim.learning_rate(config, first_step + applied, state.total_steps)
        return rate if settings.lr is None else rate * (settings.lr / config.lr)

    teeth = relora.restarts(of_run, settings.cycle, settings.rewarmup_steps, first=settings.warm_start > 0)
    return jnp.asarray(teeth(applied))


def compile_step(
    step: Step, abstract_state: TrainState, abstract_frozen: Params, abstract_batch: PyTree, mesh: Mesh
) -> jax.stages.Compiled:
    """``step`` compiled for arrays of these shapes and shardings; the state is donated, metrics are on every device.

    A compiled step never compiles again: other shapes are an error.
    """
    state_shardings, frozen_shardings, batch_shardings = jax.tree.map(
        lambda leaf: leaf.sharding, (abstract_state, abstract_frozen, abstract_batch)
    )
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, frozen_shardings, batch_shardings),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):  # Kernels divide their work over it.
        lowered = jitted.lower(abstract_state, abstract_frozen, abstract_batch)
    return lowered.compile()


def abstract_batch(rows: int, length: int, mesh: Mesh, joined: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch; see ``losses.seen``."""
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "weights": jnp.float32}
    placed = sharding.batch_sharding(mesh)
    shapes = {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=placed) for name, kind in kinds.items()}
    return seen(shapes, joined)


def _inverse(weight: jax.Array) -> jax.Array:
    """1 / weight, and 0 where there is none."""
    return jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)


def _accumulate(
    of_part: Callable[[Batch, jax.Array, jax.Array, PyTree], tuple[Sums, Params, PyTree]],
    batch: Batch,
    key: jax.Array,
    first: jax.Array,
    carry: PyTree,
    microbatches: int,
) -> tuple[Sums, Params, PyTree]:
    """Sums over the microbatches, which are counted from ``first``; each takes its lanes of the carry."""
    if microbatches == 1:
        return of_part(batch, key, first, carry)

    def part(x: jax.Array) -> jax.Array:
        # Lane b goes to microbatch b % microbatches: every device keeps its own lanes.
        return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)

    def body(total: Any, inputs: tuple[Batch, jax.Array, jax.Array, PyTree]) -> tuple[Any, PyTree]:
        sums, grads, left = of_part(*inputs)
        return jax.tree.map(jnp.add, total, (sums, grads)), left

    parts = (
        jax.tree.map(part, dict(batch)),
        jax.random.split(key, microbatches),
        first + jnp.arange(microbatches, dtype=jnp.int32),
        None if carry is None else carry_lib.split(carry, microbatches),
    )
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], parts))[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, left = jax.lax.scan(body, zeros, parts)
    return *total, None if carry is None else carry_lib.join(left)
