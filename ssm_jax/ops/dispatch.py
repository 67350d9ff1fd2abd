"""Which implementation of an op runs, and why.

Every op has ``reference`` (a sequential oracle) and ``xla`` (works everywhere). Kernel files may register ``pallas``
(TPU) and ``triton`` (GPU) under the same op name; deleting such a file changes nothing for the callers.

``implementation=None`` decides per platform *at lowering time* (``jax.lax.platform_dependent``), so that compiling on a
CPU host for an accelerator picks the accelerator's kernel, and no kernel is traced for a platform that it does not run on. A
name forces one, or raises with the reason. ``prefer`` gives None another meaning for a while: it reaches ops inside models,
which pass None.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from ssm_jax.errors import ImplementationError
from ssm_jax.ops import deferred

PREFERENCE: dict[str, tuple[str, ...]] = {
    "tpu": ("pallas", "xla"),
    "cuda": ("triton", "xla"),
    "rocm": ("xla",),
    "cpu": ("xla",),
}

# Part of the key of every ``jax.jit`` cache: a function that was traced under another preference is traced again.
_preferred = jax.make_user_context(default_value=None)

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_unavailable: dict[str, dict[str, str]] = {}


def register(op: str, name: str, function: Callable[..., Any]) -> None:
    """Makes ``function`` the implementation ``name`` of ``op``. All implementations of an op share one signature."""
    _implementations.setdefault(op, {})[name] = function


def register_lazy(op: str, name: str, where: str) -> None:
    """Like ``register`` for the function "module:name", whose module is imported when it first runs: kernel files import what
    ``import ssm_jax`` must not."""
    module, function = where.split(":")

    def run(*arrays: Any, **static: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arrays, **static)

    register(op, name, run)


def register_unavailable(op: str, name: str, reason: str) -> None:
    """Records why an implementation cannot be imported here, for the error that asks for it by name."""
    _unavailable.setdefault(op, {})[name] = reason


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations of ``op`` that can be asked for here."""
    return tuple(_implementations.get(op, {}))


def choice(op: str, platform: str) -> str:
    """The name that ``implementation=None`` means when ``op`` is lowered for ``platform``."""
    available = _implementations[op]
    return next(name for name in PREFERENCE.get(platform, ("xla",)) if name in available)


@contextlib.contextmanager
def prefer(implementation: str | None) -> Iterator[None]:
    """Within, ``implementation=None`` means this name for every op that has it; ops without it choose by platform as before.

    It counts where a computation is traced: what runs later, and other threads, are as they were. None: by platform.

    Raises:
        ImplementationError: no platform's implementation has that name; or, from an op that is called within, its implementation
            of that name cannot run here.
    """
    names = sorted({name for order in PREFERENCE.values() for name in order})
    if implementation is not None and implementation not in names:
        raise ImplementationError(
            f"No implementation to prefer is named {implementation!r}; use one of {names} or None."
        )
    with _preferred(implementation):
        yield


def lookup(op: str, name: str) -> Callable[..., Any]:
    """The implementation ``name`` of ``op``; raises ImplementationError with the reason if it is not there."""
    available = _implementations[op]
    if name in available:
        return available[name]
    reason = _unavailable.get(op, {}).get(name, "no such implementation")
    raise ImplementationError(
        f"{op}: implementation {name!r} cannot run here ({reason}); use one of {sorted(available)} or None."
    )


def call(op: str, implementation: str | None, *arrays: Any, **static: Any) -> Any:
    """Runs ``op`` on array arguments (pytrees) with static keyword arguments, by name or by the lowering platform.

    Kernels have no derivatives: an op's ``custom_vjp`` stands around this.
    """
    if implementation is None:
        preferred = _preferred.value
        known = preferred in _implementations[op] or preferred in _unavailable.get(op, {})
        implementation = preferred if known else None
    if implementation is not None:
        return lookup(op, implementation)(*arrays, **static)
    chosen = {platform: choice(op, platform) for platform in PREFERENCE}
    # A kernel is launched over lanes and tokens: without any there is nothing to launch.
    empty = any(jnp.size(leaf) == 0 for leaf in jax.tree.leaves(arrays))
    if empty or set(chosen.values()) == {"xla"}:
        return _implementations[op]["xla"](*arrays, **static)

    def portable(*args: Any) -> Any:
        return _implementations[op]["xla"](*args, **static)

    traced, results = jax.make_jaxpr(portable, return_shape=True)(*arrays)
    structure = jax.tree.structure(results)
    types = jax.tree.unflatten(structure, traced.out_avals)

    def xla(*args: Any) -> Any:
        return jax.tree.unflatten(structure, jaxpr_as_fun(traced)(*jax.tree.leaves(args)))

    def kernel(name: str) -> Callable[..., Any]:
        return functools.partial(deferred.call, _implementations[op][name], types, **static)

    per_platform = {platform: kernel(name) for platform, name in chosen.items() if name != "xla"}
    return jax.lax.platform_dependent(*arrays, default=xla, **per_platform)


def explain(op: str, platform: str | None = None) -> str:
    """One line per platform: what ``implementation=None`` runs for ``op`` there, and why not something faster.

    Raises:
        ImplementationError: no op has that name.
    """
    if op not in _implementations:
        raise ImplementationError(f"No op is named {op!r}; the ops are {sorted(_implementations)}.")
    lines = []
    for target in (platform,) if platform else PREFERENCE:
        name = choice(op, target)
        passed_over = [
            f"{other}: {_unavailable.get(op, {}).get(other, 'not written for this op')}"
            for other in PREFERENCE.get(target, ("xla",))
            if other not in _implementations[op]
        ]
        lines.append(f"{op} on {target}: {name}" + (f" ({'; '.join(passed_over)})" if passed_over else ""))
    return "\n".join(lines)
