"""vmap for kernels that know one batch axis, the lanes: the mapped axis is folded into it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def folding(function: Callable[..., tuple[Array, ...]], in_axes: Sequence[int], out_axes: Sequence[int]) -> Any:
    """``function`` with a vmap rule. Every argument (an array or None) has its lanes at ``in_axes``, every result at ``out_axes``.

    An argument with one lane stands for all of them: parameters, which stay so as long as they are not mapped. The function must
    treat lanes alike, and must not sum over them.
    """

    @jax.custom_batching.custom_vmap
    def folded(*arrays: Array | None) -> tuple[Array, ...]:
        return function(*arrays)

    @folded.def_vmap
    def rule(axis_size: int, in_batched: Sequence[bool | None], *arrays: Array | None) -> tuple[Any, Any]:
        lanes = max(
            array.shape[axis + bool(mapped)]
            for array, axis, mapped in zip(arrays, in_axes, in_batched, strict=True)
            if array is not None
        )
        fold = functools.partial(_fold, axis_size=axis_size, lanes=lanes)
        results = folded(*map(fold, arrays, in_axes, in_batched))
        return tuple(map(functools.partial(_unfold, axis_size=axis_size), results, out_axes)), (True,) * len(out_axes)

    return folded


def _fold(array: Array | None, axis: int, mapped: bool | None, *, axis_size: int, lanes: int) -> Array | None:
    """[mapped, ..., lanes, ...] to [..., mapped * lanes, ...]."""
    if array is None or (not mapped and array.shape[axis] == 1 and lanes > 1):
        return array
    if not mapped:
        array = jnp.broadcast_to(array, (axis_size, *array.shape))
    shape = list(array.shape[1:])
    shape[axis] = lanes
    array = jnp.moveaxis(jnp.broadcast_to(array, (axis_size, *shape)), 0, axis)
    shape[axis] = axis_size * lanes
    return array.reshape(shape)


def _unfold(array: Array, axis: int, *, axis_size: int) -> Array:
    shape = (*array.shape[:axis], axis_size, array.shape[axis] // axis_size, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)
