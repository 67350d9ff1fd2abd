"""The linear recurrence in plain JAX: one token after the other, or an associative scan inside chunks."""

import functools

import jax.numpy as jnp
from jax import Array, lax

ACCELERATOR_CHUNK_SIZE = 256


def reference(a: Array, b: Array, state: Array, *, reverse: bool = False, chunk_size: int | None = None) -> Array:
    """One token after the other."""
    del chunk_size

    def step(h: Array, ab: tuple[Array, Array]) -> tuple[Array, Array]:
        a_t, b_t = ab
        h = a_t * h + b_t
        return h, h

    _, h = lax.scan(step, state, (jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)), reverse=reverse)
    return jnp.moveaxis(h, 0, 1)


def xla(a: Array, b: Array, state: Array, *, reverse: bool = False, chunk_size: int | None = None) -> Array:
    """In chunks; without a ``chunk_size``, one token after the other on a CPU, whose steps cost nothing to start."""
    if chunk_size is not None:
        return _chunked(a, b, state, reverse=reverse, chunk_size=chunk_size)
    in_chunks = functools.partial(_chunked, reverse=reverse, chunk_size=ACCELERATOR_CHUNK_SIZE)
    return lax.platform_dependent(a, b, state, cpu=functools.partial(reference, reverse=reverse), default=in_chunks)


def _chunked(a: Array, b: Array, state: Array, *, reverse: bool, chunk_size: int) -> Array:
    """An associative scan inside each chunk, the last h of one chunk carried into the next.

    (a, b) o (a', b') = (a' * a, a' * b + b'). The chunk that comes last is filled up, and what that adds is cut off again.
    """
    length = b.shape[1]
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    fill = chunks * chunk_size - length
    padding = [(0, 0), (fill, 0) if reverse else (0, fill), *[(0, 0)] * (b.ndim - 2)]
    first, last = (-1, 0) if reverse else (0, -1)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, padding)
        return jnp.moveaxis(padded.reshape(x.shape[0], chunks, chunk_size, *x.shape[2:]), 1, 0)

    def combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    def step(h: Array, ab: tuple[Array, Array]) -> tuple[Array, Array]:
        a_c, b_c = ab
        b_c = b_c.at[:, first].add(a_c[:, first] * h)
        _, h_c = lax.associative_scan(combine, (a_c, b_c), axis=1, reverse=reverse)
        return h_c[:, last], h_c

    _, h = lax.scan(step, state, (split(a), split(b)), reverse=reverse)
    h = jnp.moveaxis(h, 0, 1).reshape(b.shape[0], chunks * chunk_size, *b.shape[2:])
    return lax.slice_in_dim(h, fill if reverse else 0, fill + length if reverse else length, axis=1)
