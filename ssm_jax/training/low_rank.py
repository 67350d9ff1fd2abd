"""ReLoRA within a run: which matrices, when their low-rank paths begin, the merges, and the parameters without them.

All of it happens between updates, just before the one that needs it. So a checkpoint at a boundary holds what was there before the
merge (or before the low-rank paths began), a run that goes on from it does what it would have done without stopping, and the last
cycle of a run is not merged, which would change nothing but rounding.
"""

import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ssm_jax import optim
from ssm_jax.config import suggest
from ssm_jax.errors import ConfigError
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.models import LanguageModel
from ssm_jax.optim import OptimConfig, ReLoRAConfig, relora
from ssm_jax.optim.relora import Spec
from ssm_jax.optim.relora.trees import flat, nested
from ssm_jax.training import state as state_lib
from ssm_jax.training.config import RunConfig
from ssm_jax.training.lanes import carried_lanes
from ssm_jax.training.losses import AppliedModel
from ssm_jax.training.state import TrainState
from ssm_jax.typing import Params


def plan(model: LanguageModel, config: OptimConfig) -> Spec | None:
    """The kernels that get a low-rank path, of those that are trained; None in ordinary training.

    Raises:
        ConfigError: a selection that matches nothing, a rank above a width, a reset that the optimizer's state does not allow.
    """
    settings = config.relora
    if settings is None:
        return None
    trainable, _ = optim.split(abstract_params(model), config.freeze, config.train)
    try:
        _require_matches(trainable, model, settings.select)
        spec = relora.plan(trainable, relora.defaults(model.config, settings.select), settings.rank, settings.alpha)
        adapted = jax.eval_shape(functools.partial(relora.init, spec=spec), trainable)[1]
        opt_state = jax.eval_shape(relora.make_optimizer(config, spec).init, adapted)
        reset = functools.partial(relora.reset_state, spec=spec, method=settings.reset, keep=settings.keep)
        jax.eval_shape(lambda state, key: reset(state, key=key), opt_state, jax.random.key(0))
    except ConfigError as error:
        raise ConfigError(f"Config section 'optim.relora': {error}") from error
    return spec


def _require_matches(trainable: Params, model: LanguageModel, patterns: tuple[str, ...]) -> None:
    every = relora.defaults(model.config)
    kernels = [path for path, leaf in flat(trainable).items() if every(path, leaf) is not None]
    if not kernels:
        raise ConfigError(
            "all kernels that are meant for it are fixed by optim.freeze or optim.train; leave some to train."
        )
    for pattern in patterns:
        try:
            found = any(re.search(pattern, path) for path in kernels)
        except re.error as error:
            raise ConfigError(f"select: {pattern!r} is not a regular expression ({error}).") from error
        if not found:
            raise ConfigError(
                f"select: {pattern!r} matches none of the {len(kernels)} kernels that are meant for it; {suggest(pattern, kernels)}"
            )


def require_length(config: RunConfig, total_steps: int | None) -> None:
    """Raises ConfigError unless a run of so many updates is a warm start and whole cycles. None: a budget of time decides."""
    settings = config.optim.relora
    if settings is None:
        return
    warm, cycle = settings.warm_start, settings.cycle
    if total_steps is None and warm:
        raise ConfigError(
            f"Config keys 'optim.relora.warm_start' ({warm}) and 'train.time_budget_s' are both set, and a step takes another time "
            "after the warm start than before; set train.steps."
        )
    if total_steps is None:
        return
    if warm >= total_steps:
        raise ConfigError(
            f"Config key 'optim.relora.warm_start' is {warm}, and the whole run has {total_steps} updates; lower it, or "
            "lengthen the run."
        )
    if cycle is not None and (total_steps - warm) % cycle:
        whole = max(1, round((total_steps - warm) / cycle))
        raise ConfigError(
            f"Config key 'optim.relora.cycle' is {cycle}, which does not divide the {total_steps - warm} updates after the warm "
            f"start of {warm}; set train.steps={warm + whole * cycle} (and train.epochs=null), or another cycle."
        )


def require_cadence(state: TrainState, config: OptimConfig) -> None:
    """Raises ConfigError unless the merges that ``state`` has had are those of the config's cycle: with another one they would no
    longer fall where the rate rises anew."""
    cycle = None if config.relora is None else config.relora.cycle
    if cycle is None or state.merges is None:
        return
    applied, merges = int(relora.applied_updates(state.opt_state)), int(state.merges)
    # At the end of a cycle its merge may still be to come.
    if merges not in (applied // cycle, max(0, applied - 1) // cycle):
        raise ConfigError(
            f"Config key 'optim.relora.cycle' is {cycle}, and this run had {merges} merges in {applied} updates; go on with the "
            "cycle that it was begun with, or start another run from these weights (init_from)."
        )


def whole_cycles(config: OptimConfig, steps: int) -> int:
    """The most updates, at most ``steps``, that are whole cycles, but one cycle at least."""
    cycle = None if config.relora is None else config.relora.cycle
    return steps if cycle is None else max(1, steps // cycle) * cycle


def describe(spec: Spec) -> str:
    """In a few words."""
    return f"low-rank paths of rank {spec.rank} beside {len(spec.leaves)} kernels"


def applied_model(model: LanguageModel, config: OptimConfig, spec: Spec | None) -> AppliedModel:
    """The model as updates and evaluations apply it: to kernels and low-rank paths in one tree, where there are any."""
    if spec is None or config.relora is None:
        return model
    return relora.wrap(model, spec, config.relora.dropout)


def stored_shapes(model: LanguageModel, config: RunConfig, mesh: Mesh, spec: Spec | None) -> tuple[TrainState, Params]:
    """(state, frozen) of a checkpoint, as shapes on the mesh."""
    shapes, frozen = state_lib.abstract(model, config.optim, mesh, carried_lanes(config), spec)
    settings = config.optim.relora
    return shapes, frozen if settings is None or settings.master else rounded(frozen, config.optim, spec)[0]


def stored(frozen: Params, master: Params | None) -> Params:
    """What a checkpoint keeps of the two."""
    return frozen if master is None else nested({**flat(frozen), **flat(master)})


def rounded(frozen: Params, config: OptimConfig, spec: Spec | None) -> tuple[Params, Params | None]:
    """(frozen, master): the kernels of ``spec`` in the type that updates read, and, where the config asks for it, as they were, in
    host memory. Shapes give shapes, and no master."""
    settings = config.relora
    if spec is None or settings is None or settings.frozen_dtype is None:
        return frozen, None
    leaves, masters = flat(frozen), {}
    for leaf in spec.leaves:
        kernel = leaves[leaf.path]
        leaves[leaf.path] = _cast(kernel, settings.frozen_dtype)
        if settings.master and isinstance(kernel, jax.Array):
            masters[leaf.path] = jax.device_put(kernel, relora.in_host_memory(kernel.sharding))
    return nested(leaves), nested(masters) if masters else None


def _cast(leaf: Any, dtype: str) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf.astype(dtype)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)


def begin(
    state: TrainState, frozen: Params, model: LanguageModel, config: RunConfig, mesh: Mesh, spec: Spec | None
) -> tuple[TrainState, Params, Params | None]:
    """(state, frozen, master) that go on from full rank, see ``state.with_low_rank_paths``. What is passed in is used up."""
    assert spec is not None
    placed = state_lib.abstract(model, config.optim, mesh, carried_lanes(config), spec)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)

    def change(params: Params, frozen: Params, rest: TrainState) -> tuple[TrainState, Params]:
        whole = dataclasses.replace(rest, params=params)
        return state_lib.with_low_rank_paths(whole, frozen, config=config.optim, spec=spec)

    rest = dataclasses.replace(state, params=None)
    changed, frozen = jax.jit(change, out_shardings=shardings, donate_argnums=(0, 1))(state.params, frozen, rest)
    jax.tree.map(lambda moment: moment.delete(), state.opt_state)
    return changed, *rounded(frozen, config.optim, spec)


def merge(
    state: TrainState, frozen: Params, master: Params | None, config: OptimConfig, spec: Spec | None
) -> tuple[TrainState, Params, Params | None, dict[str, Any]]:
    """(state, frozen, master, metrics) after the next merge. What is passed in is used up. See ``relora.merge_and_reset``."""
    assert spec is not None
    assert config.relora is not None
    number = int(state.merges) + 1
    key = state_lib.restart_key(state.key, number)
    how: dict[str, Any] = {"spec": spec, "method": config.relora.reset, "keep": config.relora.keep}
    if master is None:
        frozen, params, opt_state, metrics = relora.merge_and_reset(frozen, state.params, state.opt_state, key, **how)
    else:
        master, frozen, params, opt_state, metrics = relora.merge_with_master(
            master, frozen, state.params, state.opt_state, key, **how
        )
    merges = jax.device_put(jnp.int32(number), state.merges.sharding)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, merges=merges)
    found = {f"relora/{name}": float(value) for name, value in metrics.items()}
    return state, frozen, master, {"relora/merges": number, **found}


class Cadence:
    """What comes before an update. It waits for the device only where a merge could be due: skipped updates do not count, and only
    the device knows of them."""

    def __init__(self, config: ReLoRAConfig | None):
        self._config = config
        # Updates done, those of them with low-rank paths that were applied, and merges, when the device was last asked.
        self._known: tuple[int, int, int] | None = None

    def before(self, done: int, state: TrainState) -> Literal["begin", "merge"] | None:
        """``done``: updates on their way or done. The caller does at once what it is told."""
        if self._config is None:
            return None
        if state.merges is None:
            return "begin" if done >= self._config.warm_start else None
        cycle = self._config.cycle
        if cycle is None:
            return None
        if self._known is None or relora.is_due(self._known[1] + done - self._known[0], cycle, self._known[2]):
            merges = int(state.merges) if self._known is None else self._known[2]
            self._known = done, int(relora.applied_updates(state.opt_state)), merges
        if not relora.is_due(self._known[1], cycle, self._known[2]):
            return None
        self._known = (*self._known[:2], self._known[2] + 1)
        return "merge"


def whole_params(state: TrainState, frozen: Params, spec: Spec | None) -> Params:
    """The model's own parameters, with nothing beside them."""
    if spec is None:
        return optim.merge(state.average, frozen)
    leaves = flat(frozen)
    kernels = nested({leaf.path: leaves.pop(leaf.path) for leaf in spec.leaves})
    export = jax.jit(functools.partial(relora.export, spec=spec))
    return optim.merge(export(kernels, state.params), nested(leaves))
