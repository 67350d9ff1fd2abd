"""What of a mesh kernels are mapped over."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssm_jax.ops.mesh import Dimension, over_mesh

DIMENSIONS: tuple[Dimension, ...] = ("lanes", "channels")


def seen_shapes(kinds: tuple[AxisType, ...], manual: frozenset[str] = frozenset()) -> set[tuple[int, ...]]:
    """Of the parts of a [4, 6] array that a function sees on a mesh of 2 x 2 devices."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=kinds, devices=jax.devices()[:4])
    seen = set()

    def double(x: jax.Array) -> tuple[jax.Array]:
        seen.add(x.shape)
        return (2 * x,)

    def run(x: jax.Array) -> jax.Array:
        return over_mesh(double, (DIMENSIONS,), (DIMENSIONS,))(x)[0]

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(24.0).reshape(4, 6), NamedSharding(mesh, PartitionSpec()))
        if manual:
            lanes = PartitionSpec("data" if "data" in manual else None)
            run = jax.shard_map(run, in_specs=lanes, out_specs=lanes, axis_names=set(manual), check_vma=False)
        assert (jax.jit(run)(x) == 2 * x).all()
    return seen


@pytest.mark.parametrize(
    ("kinds", "manual", "shape"),
    [
        ((AxisType.Auto, AxisType.Auto), frozenset(), (2, 3)),
        ((AxisType.Auto, AxisType.Auto), frozenset({"data"}), (2, 3)),
        ((AxisType.Explicit, AxisType.Explicit), frozenset(), (4, 6)),
        ((AxisType.Auto, AxisType.Explicit), frozenset(), (2, 6)),
    ],
)
def test_automatic_axes_divide_the_work(
    kinds: tuple[AxisType, ...], manual: frozenset[str], shape: tuple[int, ...]
) -> None:
    assert seen_shapes(kinds, manual) == {shape}
