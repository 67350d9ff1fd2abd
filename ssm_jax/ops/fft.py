"""Real FFTs along the last axis that stay where the other axes are sharded.

XLA gathers a sharded array before it transforms it, although rows are transformed apart. Here every device transforms its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Complex, Float


def rfft(x: Float[Array, "*rows L"], points: int) -> Complex[Array, "*rows K"]:
    """The first points / 2 + 1 Fourier coefficients of x, filled up with zeros. Not differentiable: for use inside a custom_vjp."""
    return _local(jnp.fft.rfft, points)(x)


def irfft(spectrum: Complex[Array, "*rows K"], points: int) -> Float[Array, "*rows L"]:
    """The real signal of ``points`` values that has these coefficients; undoes ``rfft``."""
    return _local(jnp.fft.irfft, points)(spectrum)


@functools.cache
def _local(transform: Callable[..., Array], points: int) -> Callable[[Array], Array]:
    def of_rows(x: Array) -> Array:
        # XLA:CPU refuses an FFT of an array that is transposed in memory, and never does that to one of two axes.
        rows = transform(x.reshape(-1, x.shape[-1]), points, axis=-1)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def kept(arguments: Any) -> PartitionSpec:
        spec = tuple(arguments[0].sharding.spec) + (None,) * len(arguments[0].shape)
        return PartitionSpec(*spec[: len(arguments[0].shape) - 1], None)

    def infer(mesh: Mesh, arguments: Any, result: Any) -> NamedSharding:
        return NamedSharding(mesh, kept(arguments))

    def partition(mesh: Mesh, arguments: Any, result: Any) -> tuple[Any, ...]:
        place = NamedSharding(mesh, kept(arguments))
        return mesh, of_rows, place, (place,)

    partitioned = custom_partitioning(of_rows)
    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule="... i -> ... j",
        need_replication_factors=("i", "j"),
    )
    mapped = jax.custom_batching.custom_vmap(partitioned)

    @mapped.def_vmap
    def _(size: int, batched: Any, x: Array) -> tuple[Array, bool]:
        return mapped(x), True

    return mapped
