"""Recurrent state that goes from one window of a lane to the next: truncated back-propagation through time.

It enters an update as a constant, so no gradient reaches the window before.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from ssm_jax import sharding
from ssm_jax.models import LanguageModel
from ssm_jax.nn import state as state_lib
from ssm_jax.typing import Positions, PyTree


def empty_on(model: LanguageModel, lanes: int, mesh: Mesh) -> PyTree:
    """The state before any token, every device making its own part."""
    make = functools.partial(model.init_state, lanes)
    return jax.jit(make, out_shardings=sharding.state_shardings(jax.eval_shape(make), mesh))()


def going_on(positions: Positions, stands: Int[Array, "B"]) -> Positions:
    """The positions of a batch's windows, counted from where each lane's state ``stands``.

    In a lane that begins an article, and in one whose state knows the article from its start, they are what they were. A lane that
    was emptied in the middle of an article goes on as if the article began there.
    """
    first = positions[:, :1]
    shift = jnp.where(first > 0, stands[:, None] - first, 0)
    return jnp.where(positions < 0, positions, positions + shift)


def kept(model: LanguageModel, carry: PyTree, skipped_in_a_row: Int[Array, ""]) -> PyTree:
    """``carry`` with the lanes emptied that are not finite: all of them after two skipped updates in a row, for which a state that
    is finite and useless may be the reason."""
    lanes = carry.position.shape[0]
    stays = jnp.broadcast_to(skipped_in_a_row < 2, (lanes,))

    def finite(axis: int, leaf: Array) -> Bool[Array, "B"]:
        return jnp.all(jnp.isfinite(leaf), axis=tuple(i for i in range(leaf.ndim) if i != axis))

    for lane_is_finite in jax.tree.leaves(state_lib.map_lanes(finite, carry)):
        stays = stays & lane_is_finite

    def choose(axis: int, leaf: Array, empty: Array) -> Array:
        return jnp.where(stays.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)]), leaf, empty)

    return state_lib.map_lanes(choose, carry, model.init_state(lanes))


def split(carry: PyTree, parts: int) -> PyTree:
    """A leading axis of ``parts``: lane b goes to part b % parts, as the lanes of a batch do."""

    def leaf_parts(axis: int, leaf: Array) -> Array:
        shape: Any = (*leaf.shape[:axis], -1, parts, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    return state_lib.map_lanes(leaf_parts, carry)


def join(carry: PyTree) -> PyTree:
    """The inverse of ``split``."""

    def leaf_lanes(axis: int, leaf: Array) -> Array:
        lanes = jnp.moveaxis(leaf, 0, axis + 1)
        return lanes.reshape((*lanes.shape[:axis], lanes.shape[axis] * lanes.shape[axis + 1], *lanes.shape[axis + 2 :]))

    return state_lib.map_lanes(leaf_lanes, carry)
