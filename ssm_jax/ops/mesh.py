"""Kernels on a mesh: each device runs its own lanes and channels.

The compiler cannot look into a kernel: in a plain ``jit`` over sharded inputs it gathers them first (GPU) or refuses (TPU). So a
kernel is mapped over the mesh by hand. The mesh is the one of ``jax.set_mesh``; lanes lie over its axes ``LANES``, channels
(or heads) over ``CHANNELS``, and axes of other names repeat the work. An axis that does not divide its dimension is not used, and
only axes of the type Auto are: over Manual ones the caller has divided the work, over Explicit ones arrays lie as their types say.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

LANES = ("data", "fsdp")
CHANNELS = ("tensor",)

Dimension = Literal["lanes", "channels"] | None


def over_mesh(
    function: Callable[..., tuple[Array, ...]],
    in_dimensions: Sequence[Sequence[Dimension]],
    out_dimensions: Sequence[Sequence[Dimension]],
    out_sums: Sequence[Dimension] | None = None,
) -> Callable[..., tuple[Array, ...]]:
    """``function`` on each device's part of its arguments.

    Args:
        in_dimensions: for every argument (an array or None), which of its dimensions are lanes or channels. A dimension of size 1
            is shared by all.
        out_dimensions: the same for every result.
        out_sums: over what each result is still to be summed, where the devices have parts of it.
    """

    def run(*arrays: Array | None) -> tuple[Array, ...]:
        mesh = jax.sharding.get_abstract_mesh()
        free = {
            name: size
            for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
            if kind == AxisType.Auto
        }
        if math.prod(free.values()) == 1:
            return function(*arrays)
        axes: dict[Dimension, tuple[str, ...]] = {None: ()}
        placed: tuple[tuple[Dimension, tuple[str, ...]], ...] = (("lanes", LANES), ("channels", CHANNELS))
        for dimension, names in placed:
            used = tuple(name for name in names if name in free)
            sizes = {
                array.shape[i]
                for array, dimensions in zip(arrays, in_dimensions, strict=True)
                if array is not None
                for i, d in enumerate(dimensions)
                if d == dimension and array.shape[i] > 1
            }
            devices = math.prod(free[name] for name in used)
            axes[dimension] = used if all(size % devices == 0 for size in sizes) and sizes else ()

        def spec(dimensions: Sequence[Dimension], shape: tuple[int, ...] | None = None) -> PartitionSpec:
            shared = [shape is not None and shape[i] == 1 for i in range(len(dimensions))]
            return PartitionSpec(
                *(None if alone else axes[d] or None for d, alone in zip(dimensions, shared, strict=True))
            )

        def part(*parts: Array | None) -> tuple[Array, ...]:
            results = function(*parts)
            sums = out_sums or (None,) * len(results)
            return tuple(
                jax.lax.psum(result, axes[over]) if axes[over] else result
                for result, over in zip(results, sums, strict=True)
            )

        in_specs = [None if v is None else spec(d, v.shape) for v, d in zip(arrays, in_dimensions, strict=True)]
        mapped: Callable[..., tuple[Array, ...]] = jax.shard_map(
            part,
            in_specs=tuple(in_specs),
            out_specs=tuple(map(spec, out_dimensions)),
            axis_names=set(free),
            check_vma=False,
        )
        return mapped(*arrays)

    return run
