"""Logical axes of the adapters and of their moments, from those of their kernels.

A kernel on P(i, o) has A on P(i, None) and B on P(None, o): the product of what a device holds is its part of the merge.
"""

from collections.abc import Callable
from typing import Any

import jax

from ssm_jax import sharding
from ssm_jax.optim.relora.slots import names, slots
from ssm_jax.optim.relora.spec import Spec
from ssm_jax.optim.relora.trees import flat
from ssm_jax.sharding import Axes
from ssm_jax.typing import Params, PyTree

RANK_AXIS = "rank"


def adapter_axes(spec: Spec, of_kernel: Callable[[str, int], Axes] = sharding.parameter_axes) -> dict[str, Axes]:
    """Path of every factor -> its logical axes; ``of_kernel`` gives the kernel's."""
    found: dict[str, Axes] = {}
    for leaf in spec.leaves:
        axes = of_kernel(leaf.path, len(leaf.shape))
        batch, inputs, outputs = (tuple(axes[i] for i in group) for group in (leaf.batch, leaf.inputs, leaf.outputs))
        found[leaf.a_path] = (*batch, *inputs, RANK_AXIS)
        found[leaf.b_path] = (*batch, RANK_AXIS, *outputs)
    return found


def logical_axes(params: Params, spec: Spec) -> PyTree:
    """``sharding.logical_axes`` of a tree with adapters: trainable, frozen or combined."""
    known = adapter_axes(spec)

    def axes(path: Any, leaf: Any) -> Axes:
        name = sharding.path_name(path)
        if name in known:
            return known[name]
        return sharding.parameter_axes(name, leaf.ndim) if leaf.ndim else ()

    return jax.tree_util.tree_map_with_path(axes, params)


def optimizer_axes(opt_state: PyTree, trainable: Params, spec: Spec) -> PyTree:
    """``sharding.optimizer_axes`` of the optimizer of a tree with adapters."""
    params = flat(trainable)
    shapes = {path: leaf.shape for path, leaf in params.items()}
    known = flat(logical_axes(trainable, spec))
    leaves, treedef = jax.tree.flatten(opt_state)
    of_slot = {slot.index: slot.param for slot in slots(opt_state, params)}
    found: list[Axes] = []
    for index, (_, leaf) in enumerate(zip(names(opt_state), leaves, strict=True)):
        param = of_slot.get(index)
        mine = param is not None and shapes[param] == leaf.shape
        found.append(known[param] if mine and param is not None else (None,) * leaf.ndim)
    return jax.tree.unflatten(treedef, found)
