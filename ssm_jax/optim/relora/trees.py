"""Two trees, never one: the frozen kernels, and what is trained, with the adapters beside the places of their kernels.

Both are nested dicts without the other's leaves, as everywhere in ``ssm_jax.optim``: ``optim.merge`` puts them together, and a
step that differentiates only the second never forms a gradient of the first.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ssm_jax.errors import ConfigError
from ssm_jax.optim.partition import merge as combine
from ssm_jax.optim.relora import factors
from ssm_jax.optim.relora.constants import ALPHA, RANK
from ssm_jax.optim.relora.factors import Compat
from ssm_jax.optim.relora.spec import Leaf, Select, Spec, plan
from ssm_jax.typing import Key, Params

HOST = "pinned_host"
"""Memory of a device's host that the device reads."""

__all__ = ["HOST", "combine", "export", "flat", "init", "materialise", "nested", "partition", "split"]


def split(
    params: Params,
    select: Select,
    rank: int = RANK,
    alpha: float = ALPHA,
    *,
    key: Key | None = None,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
    compat: Compat | None = None,
) -> tuple[Params, Params, Spec]:
    """(frozen, trainable, spec): the kernels that ``select`` takes; all other leaves with the new adapters of those kernels.

    The function that the two compute together is that of ``params``. See ``Select`` for what to pass, and ``plan`` for errors.

    Args:
        key: of A's draw, default ``jax.random.key(0)``. dtype: of the adapters, default the kernel's.
        frozen_dtype: "bfloat16" halves the frozen tree; then merges round (see ``merge_and_reset``).
        compat: see ``factors.init``.
    """
    spec = plan(params, select, rank, alpha)
    frozen, trainable = init(params, spec, key=key, dtype=dtype, frozen_dtype=frozen_dtype, compat=compat)
    return frozen, trainable, spec


def init(
    params: Params,
    spec: Spec,
    *,
    key: Key | None = None,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
    compat: Compat | None = None,
) -> tuple[Params, Params]:
    """``split`` with a plan that is made already. Pure, so that it can be jitted and its shapes evaluated."""
    key = jax.random.key(0) if key is None else key
    leaves = flat(params)
    frozen, adapters = {}, {}
    for leaf in spec.leaves:
        kernel = leaves.pop(leaf.path)
        frozen[leaf.path] = kernel if frozen_dtype is None else kernel.astype(frozen_dtype)
        adapters[leaf.a_path], adapters[leaf.b_path] = factors.init(key, leaf, spec.rank, dtype, compat)
    return nested(frozen), nested({**leaves, **adapters})


def partition(params: Params, spec: Spec) -> tuple[Params, Params]:
    """(frozen, trainable) of the combined tree; the inverse of ``combine(trainable, frozen)``."""
    leaves = flat(params)
    frozen = {leaf.path: leaves.pop(leaf.path) for leaf in spec.leaves if leaf.path in leaves}
    return nested(frozen), nested(leaves)


def materialise(params: Params, spec: Spec, which: Callable[[Leaf], bool] = lambda leaf: True) -> Params:
    """The combined tree with W + scale A B in place of the chosen kernels, and without their adapters.

    The sum is taken in float32 (or the kernel's type, where that is wider) and rounded to the kernel's type once.
    """
    leaves = flat(params)
    for leaf in spec.leaves:
        if which(leaf):
            kernel, a, b = (_take(leaves, path) for path in (leaf.path, leaf.a_path, leaf.b_path))
            kind = jnp.promote_types(kernel.dtype, jnp.float32)
            change = factors.product(a, b, leaf, spec.scale, kind)
            leaves[leaf.path] = (kernel.astype(kind) + change).astype(kernel.dtype)
    return nested(leaves)


def export(frozen: Params, trainable: Params, spec: Spec) -> Params:
    """The parameters of the model as it came: its own structure, names and types, every change merged in. Nothing is donated.

    Kernels that were frozen in lower precision are widened before their change is added. ``frozen`` may be a master in host memory;
    what is returned is in the devices' own.
    """
    kinds = {leaf.path: leaf.dtype for leaf in spec.leaves}
    leaves = {path: _in_device_memory(leaf) for path, leaf in flat(combine(trainable, frozen)).items()}
    return materialise(nested({path: leaf.astype(kinds.get(path, leaf.dtype)) for path, leaf in leaves.items()}), spec)


def flat(params: Params) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree's leaves."""
    return traverse_util.flatten_dict(params, sep="/")


def nested(leaves: Mapping[str, Any]) -> Params:
    """The inverse of ``flat``."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def _in_device_memory(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind != HOST:
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


def _take(leaves: dict[str, Any], path: str) -> Any:
    if path not in leaves:
        raise ConfigError(
            f"{path} is not among the parameters, and the plan has it; pass the trees that it was made for."
        )
    return leaves.pop(path)
