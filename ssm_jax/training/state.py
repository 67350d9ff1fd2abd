"""What a training run carries from step to step, and how it comes into being on a mesh."""

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
from ssm_jax.training.teacher import Tables, with_tables
from ssm_jax.typing import Key, Params


@struct.dataclass
class TrainState:
    """Everything that an update changes, and so everything that a checkpoint must hold. Leaves may be arrays or shapes.

    params: the trained leaves. opt_state: their moments. ema: their moving average, None where there is none. step: updates done,
    int32. total_steps: where the schedule ends, int32; traced, so that a run whose length is measured compiles once. key: what
    dropout folds the step into. carry: recurrent state carried across batches, None where rows start fresh.
    """

    params: Any
    opt_state: Any
    step: Any
    total_steps: Any
    key: Any
    ema: Any = None
    carry: Any = None

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
) -> tuple[TrainState, Params]:
    """(state, frozen) before the first update, from ``params`` or new ones, with ``tables`` in them, and an empty carry for
    ``lanes``. Pure: a key gives the same values on every mesh."""
    init_key, train_key = jax.random.split(key)
    if params is None:
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    if tables is not None:
        params = with_tables(params, tables)
    trainable, frozen = optim.split(params, config.freeze, config.train)
    opt_state = optim.make_optimizer(config).init(trainable)
    ema = None if config.ema is None else trainable
    carry = None if lanes is None else model.init_state(lanes)
    return TrainState(trainable, opt_state, jnp.int32(0), jnp.int32(total_steps), train_key, ema, carry), frozen


def abstract(
    model: LanguageModel, config: optim.OptimConfig, mesh: Mesh, lanes: int | None = None
) -> tuple[TrainState, Params]:
    """Shapes, dtypes and shardings of what ``create`` returns; nothing is allocated.

    Raises:
        ShardingError: a parameter that does not divide over the mesh. ConfigError: a freeze pattern that matches nothing.
    """
    build = functools.partial(create, model=model, config=config, lanes=lanes)
    shapes = jax.eval_shape(build, jax.random.key(0), jnp.int32(0))
    state, frozen = shapes
    axes = (_logical_axes(state), sharding.logical_axes(frozen))
    placed = sharding.shardings(shapes, mesh, axes)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, placed)


def _logical_axes(state: TrainState) -> TrainState:
    return TrainState(
        params=sharding.logical_axes(state.params),
        opt_state=sharding.optimizer_axes(state.opt_state, state.params),
        step=(),
        total_steps=(),
        key=(),
        ema=None if state.ema is None else sharding.logical_axes(state.ema),
        carry=None if state.carry is None else state_lib.logical_axes(state.carry),
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
) -> tuple[TrainState, Params]:
    """(state, frozen) on the mesh: every device makes its own part. Starts from ``params`` and ``tables`` where they are given."""
    build = functools.partial(create, model=model, config=config, lanes=lanes)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract(model, config, mesh, lanes))
    return jax.jit(build, out_shardings=out)(jax.random.key(seed), jnp.int32(total_steps), params, tables)
