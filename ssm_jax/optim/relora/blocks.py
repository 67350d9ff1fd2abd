"""W + scale A B in place, a block at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.optim.relora import factors
from ssm_jax.optim.relora.spec import Leaf

_PARTS = 16
"""A kernel is merged in at least so many blocks, where its sizes divide: what a block needs is a fraction of the kernel."""


def add_product(
    kernel: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    leaf: Leaf,
    scale: float,
    parts: int = _PARTS,
) -> tuple[Float[Array, "..."], Float[Array, "2"]]:
    """(W + scale A B, [sum of squares of the change, of what rounding took from it]), in blocks over W's first two axes."""
    kind = jnp.promote_types(kernel.dtype, jnp.float32)
    sizes = _block(kernel.shape, parts)
    counts = tuple(n // size for n, size in zip(kernel.shape[:2], sizes, strict=True))

    blocks = counts[0] * counts[1]
    a_axes, b_axes = (*leaf.batch, *leaf.inputs, None), (*leaf.batch, None, *leaf.outputs)

    def start(i: Array | int) -> tuple[Array | int, Array | int]:
        return i // counts[1] * sizes[0], i % counts[1] * sizes[1]

    def read(kernel: Array, i: Array | int) -> Array:
        return _cut(kernel, tuple(range(kernel.ndim)), start(i), sizes)

    # A block is read at the end of the round before its own, from what that round wrote: were a round to read the kernel before it
    # writes, XLA would copy the whole of it first.
    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        kernel, old, sums = carry
        change = factors.product(_cut(a, a_axes, start(i), sizes), _cut(b, b_axes, start(i), sizes), leaf, scale, kind)
        new = (old.astype(kind) + change).astype(kernel.dtype)
        lost = new.astype(kind) - old.astype(kind) - change
        sums = sums + jnp.stack([jnp.sum(jnp.square(x), dtype=kind) for x in (change, lost)])
        kernel = jax.lax.dynamic_update_slice(kernel, new, (*start(i), *(0,) * (kernel.ndim - 2)))
        return kernel, read(kernel, (i + 1) % blocks), sums

    kernel, _, sums = jax.lax.fori_loop(0, blocks, body, (kernel, read(kernel, 0), jnp.zeros((2,), kind)))
    return kernel, sums


def _cut(x: Array, axes: tuple[int | None, ...], starts: tuple[Any, Any], sizes: tuple[int, int]) -> Array:
    """The part of ``x``, whose axes are those of the kernel, that a block needs."""
    for place, axis in enumerate(axes):
        if axis in (0, 1):
            x = jax.lax.dynamic_slice_in_dim(x, starts[axis], sizes[axis], place)
    return x


def _block(shape: tuple[int, ...], parts: int) -> tuple[int, int]:
    """Sizes of a block along the first two axes: the largest that divide, at most 1 / parts of the whole."""
    first = _divisor(shape[0], shape[0] // parts)
    return first, _divisor(shape[1], shape[0] * shape[1] // (parts * first))


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)
