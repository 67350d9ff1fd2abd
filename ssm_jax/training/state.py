"""What a training run carries from step to step, and how it comes into being on a mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ssm_jax import optim, sharding
from ssm_jax.models import LanguageModel
from ssm_jax.nn import state as state_lib
from ssm_jax.optim import relora
from ssm_jax.training.teacher import Tables, with_tables
from ssm_jax.typing import Key, Params, PyTree


@struct.dataclass
class TrainState:
    """Everything that an update changes, and so everything that a checkpoint must hold. Leaves may be arrays or shapes.

    params: the trained leaves, low-rank paths among them where there are any. opt_state: their moments. ema: their moving average,
    None where there is none. step: updates done, int32. total_steps: where the schedule ends, int32; traced, so that a run whose
    length is measured compiles once. key: what dropout folds the step into. carry: recurrent state carried across batches, None
    where rows start fresh. merges: how often the low-rank paths were merged, int32; None while there are none.
    """

    params: Any
    opt_state: Any
    step: Any
    total_steps: Any
    key: Any
    ema: Any = None
    carry: Any = None
    merges: Any = None

    @property
    def average(self) -> Params:
        """What evaluation and export use: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def create(
    key: Key,
    total_steps: Int[Array, ""],
    params: Params | None = None,
    tables: Tables | None = None,
    *,
    model: LanguageModel,
    config: optim.OptimConfig,
    lanes: int | None = None,
    spec: relora.Spec | None = None,
) -> tuple[TrainState, Params]:
    """(state, frozen) before the first update, from ``params`` or new ones, with ``tables`` in them, an empty carry for ``lanes``,
    and the low-rank paths of ``spec``. Pure: a key gives the same values on every mesh."""
    init_key, train_key = jax.random.split(key)
    if params is None:
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    if tables is not None:
        params = with_tables(params, tables)
    trainable, frozen = optim.split(params, config.freeze, config.train)
    opt_state = optim.make_optimizer(config).init(trainable)
    ema = None if config.ema is None else trainable
    carry = None if lanes is None else model.init_state(lanes)
    state = TrainState(trainable, opt_state, jnp.int32(0), jnp.int32(total_steps), train_key, ema, carry)
    return (state, frozen) if spec is None else with_low_rank_paths(state, frozen, config=config, spec=spec)


def with_low_rank_paths(
    state: TrainState, frozen: Params, *, config: optim.OptimConfig, spec: relora.Spec
) -> tuple[TrainState, Params]:
    """(state, frozen) that compute the same function, where the kernels of ``spec`` are frozen and have low-rank paths, in float32
    all of them; with a new optimizer. Pure."""
    assert config.relora is not None
    kernels, trainable = relora.init(state.params, spec, key=restart_key(state.key, 0))
    opt_state: Any = relora.make_optimizer(config, spec).init(trainable)
    if config.relora.carry_moments:
        opt_state = relora.carry_moments(opt_state, state.opt_state, trainable, spec)
    opt_state = opt_state._replace(total_notfinite=state.opt_state.total_notfinite)
    changed = {"params": trainable, "opt_state": opt_state, "merges": jnp.int32(0)}
    return dataclasses.replace(state, **changed), optim.merge(frozen, kernels)


def restart_key(key: Key, number: Int[Array, ""] | int) -> Key:
    """Of the draw of the low-rank paths after merge ``number``; 0: at their beginning. No step reaches the number that is folded
    in for it."""
    return jax.random.fold_in(jax.random.fold_in(key, jnp.iinfo(jnp.int32).max), number)


def abstract(
    model: LanguageModel,
    config: optim.OptimConfig,
    mesh: Mesh,
    lanes: int | None = None,
    spec: relora.Spec | None = None,
) -> tuple[TrainState, Params]:
    """Shapes, dtypes and shardings of what ``create`` returns; nothing is allocated.

    Raises:
        ShardingError: a parameter that does not divide over the mesh. ConfigError: a freeze pattern that matches nothing.
    """
    build = functools.partial(create, model=model, config=config, lanes=lanes, spec=spec)
    shapes = jax.eval_shape(build, jax.random.key(0), jnp.int32(0))
    state, frozen = shapes
    axes = (_logical_axes(state, spec), sharding.logical_axes(frozen))
    placed = sharding.shardings(shapes, mesh, axes)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, placed)


def parameter_axes(params: Params, spec: relora.Spec | None = None) -> PyTree:
    """Logical axes of the trained leaves, low-rank paths among them where there is a ``spec``."""
    return sharding.logical_axes(params) if spec is None else relora.logical_axes(params, spec)


def _logical_axes(state: TrainState, spec: relora.Spec | None) -> TrainState:
    if spec is None:
        opt_state = sharding.optimizer_axes(state.opt_state, state.params)
    else:
        opt_state = relora.optimizer_axes(state.opt_state, state.params, spec)
    return TrainState(
        params=parameter_axes(state.params, spec),
        opt_state=opt_state,
        step=(),
        total_steps=(),
        key=(),
        ema=None if state.ema is None else sharding.logical_axes(state.ema),
        carry=None if state.carry is None else state_lib.logical_axes(state.carry),
        merges=None if state.merges is None else (),
    )


def initialize(
    model: LanguageModel,
    config: optim.OptimConfig,
    mesh: Mesh,
    seed: int,
    total_steps: int,
    params: Params | None = None,
    tables: Tables | None = None,
    lanes: int | None = None,
    spec: relora.Spec | None = None,
) -> tuple[TrainState, Params]:
    """(state, frozen) on the mesh: every device makes its own part. Starts from ``params`` and ``tables`` where they are given."""
    build = functools.partial(create, model=model, config=config, lanes=lanes, spec=spec)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract(model, config, mesh, lanes, spec))
    return jax.jit(build, out_shardings=out)(jax.random.key(seed), jnp.int32(total_steps), params, tables)
