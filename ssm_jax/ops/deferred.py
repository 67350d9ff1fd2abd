"""A function that is traced when it is lowered, and only for the platforms that it is lowered for.

``jax.lax.platform_dependent`` traces every branch of every call. A kernel takes a second to trace, five times what the rest of a
scan and its gradient take, and on a CPU it is thrown away. So a kernel's branch holds one equation, which stands for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from ssm_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class _Deferred:
    """What is to be traced, told apart by value: compiled programs are found again by it."""

    function: Callable[..., Any]
    static: tuple[tuple[str, Any], ...]
    structure: Any
    mesh: Any
    mapped: tuple[tuple[int | None, ...], ...] = ()

    def __call__(self, *leaves: Array) -> list[Array]:
        run = self._run
        for axes in self.mapped:
            run = jax.vmap(run, in_axes=axes)
        with jax.sharding.use_abstract_mesh(self.mesh):
            return run(*leaves)

    def _run(self, *leaves: Array) -> list[Array]:
        return jax.tree.leaves(self.function(*jax.tree.unflatten(self.structure, leaves), **dict(self.static)))


def call(function: Callable[..., Any], results: PyTree, *arrays: PyTree, **static: Any) -> PyTree:
    """``function(*arrays, **static)``, whose results have the structure and types of ``results``; without derivatives.

    ``results`` are abstract values: shapes and dtypes, and inside ``jax.shard_map`` over which axes a result varies.

    ``function`` and ``static`` must be hashable, and mean the same wherever they are equal.
    """
    leaves, structure = jax.tree.flatten(arrays)
    out, out_structure = jax.tree.flatten(results)
    mesh = jax.sharding.get_abstract_mesh()
    what = _Deferred(function, tuple(sorted(static.items())), structure, mesh)
    return jax.tree.unflatten(out_structure, deferred_p.bind(*leaves, what=what, out=tuple(out)))


deferred_p = Primitive("deferred")
deferred_p.multiple_results = True


@deferred_p.def_abstract_eval
def _types(*inputs: Any, what: _Deferred, out: tuple[Any, ...]) -> list[Any]:
    return list(out)


@deferred_p.def_impl
def _evaluate(*inputs: Array, what: _Deferred, out: Any) -> Any:
    return _compiled(what)(*inputs)


@functools.lru_cache(maxsize=256)
def _compiled(what: _Deferred) -> Callable[..., Any]:
    return jax.jit(what)


def _lower(ctx: Any, *inputs: Any, what: _Deferred, out: Any) -> Any:
    return mlir.lower_fun(what, multiple_results=True)(ctx, *inputs)


mlir.register_lowering(deferred_p, _lower)


def _batch(inputs: Sequence[Array], axes: Sequence[int | None], *, what: _Deferred, out: Any) -> Any:
    placed = tuple(axes)
    size = next(x.shape[axis] for x, axis in zip(inputs, placed, strict=True) if axis is not None)
    mapped = dataclasses.replace(what, mapped=(*what.mapped, placed))
    return deferred_p.bind(*inputs, what=mapped, out=tuple(_larger(x, size) for x in out)), (0,) * len(out)


def _larger(x: Any, size: int) -> Any:
    placed = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
    return x.update(shape=(size, *x.shape), sharding=placed)


batching.primitive_batchers[deferred_p] = _batch
