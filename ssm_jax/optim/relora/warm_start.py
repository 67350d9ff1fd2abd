"""From full-rank training to adapters."""

from typing import Any

import jax

from ssm_jax.errors import ConfigError
from ssm_jax.optim.relora.constants import ALPHA, RANK
from ssm_jax.optim.relora.slots import names, slots
from ssm_jax.optim.relora.spec import Select, Spec
from ssm_jax.optim.relora.trees import flat, split
from ssm_jax.typing import Key, Params, PyTree


def from_full_rank(
    params: Params,
    select: Select,
    rank: int = RANK,
    alpha: float = ALPHA,
    *,
    key: Key | None = None,
    **how: Any,
) -> tuple[Params, Params, Spec]:
    """``split`` of parameters that were trained at full rank: the function goes on as it is. See ``carry_moments`` for the rest."""
    return split(params, select, rank, alpha, key=key, **how)


def carry_moments(opt_state: PyTree, full_rank_state: PyTree, trainable: Params, spec: Spec) -> PyTree:
    """A new optimizer state with the moments, and the step counter, that the leaves without adapters had at full rank.

    The adapters begin afresh. The default of the reference is not to carry anything: ``optimizer.init(trainable)`` alone.

    Args:
        opt_state: ``optimizer.init(trainable)``. full_rank_state: of an optimizer with the same direction.

    Raises:
        ConfigError: the old state has no such moments.
    """
    others = {path: leaf for path, leaf in flat(trainable).items() if path not in spec.adapters}
    new, old = slots(opt_state, others), slots(full_rank_state, others)
    there = {(slot.field, slot.param): slot for slot in old}
    leaves, treedef = jax.tree.flatten(opt_state)
    old_leaves = jax.tree.leaves(full_rank_state)
    new_names, old_names = names(opt_state), names(full_rank_state)
    for slot in new:
        source = there.get((slot.field, slot.param))
        if source is None or old_leaves[source.index].shape != leaves[slot.index].shape:
            raise ConfigError(
                f"The full-rank optimizer state has no {slot.field} of {slot.param}; carry moments between optimizers of the same "
                "direction only, or start with fresh ones."
            )
        leaves[slot.index] = old_leaves[source.index]
        counts = (f"{slot.owner}/count".lstrip("/"), f"{source.owner}/count".lstrip("/"))
        if counts[0] in new_names and counts[1] in old_names:
            leaves[new_names.index(counts[0])] = old_leaves[old_names.index(counts[1])]
    return jax.tree.unflatten(treedef, leaves)
