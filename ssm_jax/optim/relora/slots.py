"""Where an Optax state keeps something for an adapter: found by path, in whatever chain."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssm_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Slot:
    """A leaf of an optimizer's state that belongs to a parameter. index: its place among the leaves. owner: the path of the
    transformation's own state. field: its name there (mu, nu, trace). param: the parameter's path."""

    index: int
    owner: str
    field: str
    param: str


def names(tree: PyTree) -> list[str]:
    """Paths of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def slots(opt_state: PyTree, params: Mapping[str, Any]) -> list[Slot]:
    """The leaves whose path ends in a path of ``params``, in the order of the state's leaves; m before v."""
    found = []
    for index, name in enumerate(names(opt_state)):
        parts = name.split("/")
        for i in range(1, len(parts)):
            param = "/".join(parts[i:])
            if param in params:
                found.append(Slot(index, "/".join(parts[: i - 1]), parts[i - 1], param))
                break
    return found


def counters(opt_state: PyTree, owned: list[Slot]) -> tuple[list[int], list[str]]:
    """(places of the step counters that count for ``owned`` alone, owners of ``owned`` that share theirs with other leaves).

    A counter is an integer leaf called ``count`` beside the fields of the slots.
    """
    every, leaves = names(opt_state), jax.tree.leaves(opt_state)
    mine = {slot.index for slot in owned}
    alone, shared = [], []
    for owner in dict.fromkeys(slot.owner for slot in owned):
        prefix = f"{owner}/" if owner else ""
        if f"{prefix}count" not in every:
            continue
        count = every.index(f"{prefix}count")
        others = [
            i
            for i, name in enumerate(every)
            if name.startswith(prefix) and i not in mine and jnp.issubdtype(leaves[i].dtype, jnp.floating)
        ]
        if others:
            shared.append(owner)
        elif jnp.issubdtype(leaves[count].dtype, jnp.integer):
            alone.append(count)
    return alone, shared
