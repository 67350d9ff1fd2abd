"""How arrays lie on a mesh of devices: path patterns give logical axes, rules map those to mesh axes.

Logical names are data, not boxes around parameters: one table covers parameters and their optimizer moments; carried states
bring their own (``ssm_jax.nn.state``). Everything is checked before anything compiles.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ssm_jax.errors import ShardingError
from ssm_jax.nn import state as state_lib
from ssm_jax.typing import PyTree

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

Axes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": "sequence",
    "vocab": "tensor",
    "embed": "fsdp",
    "inner": "tensor",
    "heads": "tensor",
    "layers": None,
    "norm": None,
    "rank": None,
    "taps": None,
    "state": None,
    "groups": None,
    "group_state": None,
    "window": None,
    "places": None,
    "head_dim": None,
    "parts": None,
    "bottleneck": None,
    "memory": None,
    "embed_state": None,
}
"""Logical axis -> mesh axis. ``inner`` is a mixer's channels or heads: an axis of size E or H."""

_LAYER = r"layers/((units|rest)/)?(members_\d+/)?"
_MIXER = _LAYER + r"(mixer|mamba)/"
_FUSION = _MIXER + r"(k_fusion|v_fusion)/"
PARAMETER_AXES: tuple[tuple[str, Axes], ...] = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"embed_position/embedding", (None, "embed")),
    (r"head/kernel", ("embed", "vocab")),
    (r"(norm_f|norm_embed)/(scale|bias)", ("norm",)),
    (r"layers/pause", ("norm",)),
    (r"layers/memory", ("memory", "norm")),
    (r"layers/step", ("taps", "embed", "inner")),
    (_LAYER + r"(norm|mlp_norm|mamba_norm)/(scale|bias)", ("layers", "norm")),
    (_LAYER + r"step/proj/kernel", ("layers", "taps", "embed", "inner")),
    (_LAYER + r"(mixer|mlp|step)_gate/kernel", ("layers", "embed", "inner")),
    (_LAYER + r"mlp/(gate_proj|up_proj)/kernel", ("layers", "embed", "inner")),
    (_LAYER + r"mlp/(gate_proj|up_proj)/bias", ("layers", "inner")),
    (_LAYER + r"mlp/norm/(scale|bias)", ("layers", "inner")),
    (_LAYER + r"mlp/down_proj/kernel", ("layers", "inner", "embed")),
    (_LAYER + r"mlp/down_proj/bias", ("layers", "norm")),
    (_MIXER + r"in_proj/kernel", ("layers", "embed", None, "inner")),
    (_MIXER + r"in_proj/bias", ("layers", None, "inner")),
    (_MIXER + r"out_proj/kernel", ("layers", "inner", "embed")),
    (_MIXER + r"out_proj/bias", ("layers", "norm")),
    (_MIXER + r"(q_proj|k_proj|v_proj|g_proj)/kernel", ("layers", "embed", "heads", "head_dim")),
    (_MIXER + r"(q_proj|k_proj|v_proj)/bias", ("layers", "heads", "head_dim")),
    (_MIXER + r"out_proj/kernel", ("layers", "heads", "head_dim", "embed")),
    (_MIXER + r"(conv|conv_x)/kernel", ("layers", "taps", "inner")),
    (_MIXER + r"(conv|conv_x)/bias", ("layers", "inner")),
    (_MIXER + r"(conv_B|conv_C)/kernel", ("layers", "taps", "group_state")),
    (_MIXER + r"(conv_B|conv_C)/bias", ("layers", "group_state")),
    (_MIXER + r"dt_down/kernel", ("layers", "inner", "rank")),
    (_MIXER + r"dt_up/kernel", ("layers", "rank", "inner")),
    (_MIXER + r"dt_proj/kernel", ("layers", "embed", "inner")),
    (_MIXER + r"dt_proj/bias", ("layers", "inner")),
    (_MIXER + r"(B_proj|C_proj)/kernel", ("layers", "inner", "state")),
    (_MIXER + r"(B_proj|C_proj)/kernel", ("layers", "embed", "groups", "state")),
    (_MIXER + r"(B_proj|C_proj)/bias", ("layers", "groups", "state")),
    (_MIXER + r"(dt_bias|D|A_log)", ("layers", "inner")),
    (_MIXER + r"A_log", ("layers", "inner", "state")),
    (_MIXER + r"norm/scale", ("layers", "inner")),
    (_MIXER + r"head_norm/scale", ("layers", "head_dim")),
    (_MIXER + r"gate/down/kernel", ("layers", "embed", "bottleneck")),
    (_MIXER + r"gate/up/kernel", ("layers", "bottleneck", "inner")),
    (_MIXER + r"source_\d+/kernel", ("layers", None, "state")),
    (_FUSION + r"gate/down/kernel", ("layers", "embed", "bottleneck")),
    (_FUSION + r"gate/up/kernel", ("layers", "bottleneck", "heads", "head_dim")),
    (_FUSION + r"source_\d+/kernel", ("layers", None, None, "heads", "head_dim")),
    (_FUSION + r"norm/scale", ("layers", "heads", "head_dim")),
    (_MIXER + r"(u_proj|v_proj)/kernel", ("layers", "embed", "inner")),
    (_MIXER + r"gate_proj/kernel", ("layers", "bottleneck", "inner")),
    (_MIXER + r"dss_norm/(scale|bias)", ("layers", "inner")),
    (_MIXER + r"(Lambda_real|Lambda_imag)", ("layers", "state")),
    (_MIXER + r"(C_real|C_imag)", ("layers", "inner", "state")),
    (_MIXER + r"coefficients", ("layers", "inner", "parts", "state")),
    (_MIXER + r"kernel", ("layers", "taps", "inner")),
)
"""(pattern, logical axes). A leaf takes the one entry whose pattern ends its path and whose number of axes is its own."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes the rest.

    data: copies of the model, each with its part of the batch. fsdp: parameters and batch are both split. tensor: channels,
    heads and vocabulary are split. sequence: parts of a sequence.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes {sizes} must be at least 1, with -1 (the remaining devices) at most once")
        if self.sequence != 1:
            raise ValueError(
                f"mesh.sequence is {self.sequence}; only 1 works: the recurrences do not hand their state across devices yet"
            )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "tensor", "sequence") over all devices, or those given.

    Raises:
        ShardingError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ShardingError(
            f"The mesh {wanted} does not fit {len(devices)} device(s); change mesh.* or use mesh.data=-1."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def path_name(path: Sequence[Any]) -> str:
    """``a/b/0/c`` for a key path of ``jax.tree_util``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def parameter_axes(name: str, ndim: int) -> Axes:
    """Logical axes of the parameter at a path.

    Raises:
        ShardingError: no entry of PARAMETER_AXES fits, or several do.
    """
    found = [axes for pattern, axes in PARAMETER_AXES if len(axes) == ndim and re.search(f"(^|/)({pattern})$", name)]
    if len(found) != 1:
        raise ShardingError(
            f"Parameter {name} with {ndim} axes fits {len(found)} entries of ssm_jax.sharding.PARAMETER_AXES; exactly one must fit."
        )
    return found[0]


def logical_axes(params: PyTree) -> PyTree:
    """The tree with every leaf replaced by its logical axes. Scalars have none; neither do PRNG keys."""

    def axes(path: Any, leaf: Any) -> Axes:
        return parameter_axes(path_name(path), leaf.ndim) if leaf.ndim else ()

    return jax.tree_util.tree_map_with_path(axes, params)


def optimizer_axes(opt_state: PyTree, params: PyTree) -> PyTree:
    """Logical axes of an optimizer's leaves: the parameter's where path end and shape are a parameter's (moments), none elsewhere
    (counts, coefficients, factored moments)."""
    known = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def axes(path: Any, leaf: Any) -> Axes:
        parts = path_name(path).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        name = next((end for end in ends if known.get(end) == leaf.shape), None)
        return parameter_axes(name, leaf.ndim) if name is not None and leaf.ndim else (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(axes, opt_state)


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Mesh, name: str = "array", rules: Rules = RULES
) -> PartitionSpec:
    """The mesh axes that an array's logical axes map to.

    Raises:
        ShardingError: two axes land on one mesh axis, or a size does not divide; the message names array, axis and fix.
    """
    spec, used = [], dict[str, str]()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ShardingError(f"{name}: logical axis {axis!r} has no rule; add it to ssm_jax.sharding.RULES.")
        target = rules[axis] if axis is not None else None
        targets = (target,) if isinstance(target, str) else target or ()
        for mesh_axis in targets:
            if mesh_axis in used:
                raise ShardingError(
                    f"{name}: logical axes {used[mesh_axis]!r} and {axis!r} are both mapped to mesh axis {mesh_axis!r}; "
                    "change one rule."
                )
            used[mesh_axis] = str(axis)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in targets)
        if size % parts:
            over = " x ".join(f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in targets)
            raise ShardingError(f"{name}: axis {axis!r} of size {size} does not divide over {over}; {_fix(str(axis))}.")
        spec.append(target)
    return PartitionSpec(*spec)


def _fix(axis: str) -> str:
    if axis == "vocab":
        return "change the mesh or raise model.pad_vocab_size_multiple to a multiple of it"
    if axis == "batch":
        return "change the mesh or the batch size"
    return "change the mesh or the model's widths"


def shardings(tree: PyTree, mesh: Mesh, axes: PyTree | None = None, rules: Rules = RULES) -> PyTree:
    """A NamedSharding for every leaf of a tree of parameters or of anything that holds parameters (a train state).

    ``axes``: logical axes per leaf, default ``logical_axes(tree)``. All checks of ``partition_spec`` happen here.
    """

    def place(path: Any, leaf: Any, leaf_axes: Axes) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(leaf_axes, leaf.shape, mesh, path_name(path), rules))

    return jax.tree_util.tree_map_with_path(place, tree, logical_axes(tree) if axes is None else axes)


def state_shardings(state: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Shardings of a recurrent state; ``state`` may hold arrays or shapes."""
    return shardings(state, mesh, state_lib.logical_axes(state), rules)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [B, L]: lanes over ("data", "fsdp"), length over "sequence"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def batch_parts(mesh: Mesh) -> int:
    """Over how many devices the lanes of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A host batch on the mesh. With several processes each passes its own contiguous rows."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for key, value in batch.items()}


def describe(tree: PyTree, mesh: Mesh, axes: PyTree | None = None, rules: Rules = RULES) -> str:
    """A table: path, shape, logical axes, mesh axes and bytes per device of every leaf."""
    rows = [("leaf", "shape", "logical axes", "mesh axes", "bytes per device")]

    def add_row(path: Any, leaf: Any, leaf_axes: Axes, sharding: NamedSharding) -> None:
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        spec = ", ".join("-" if entry is None else str(entry) for entry in sharding.spec)
        rows.append((path_name(path), str(leaf.shape), ", ".join(str(a or "-") for a in leaf_axes), spec, f"{size:,}"))

    axes = logical_axes(tree) if axes is None else axes
    jax.tree_util.tree_map_with_path(add_row, tree, axes, shardings(tree, mesh, axes, rules))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
