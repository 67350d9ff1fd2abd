"""Merge and restart: W <- W + scale A B, A drawn anew, B zero, the adapters' optimizer state reset.

A merge belongs between steps, not into them: within the compiled step it would cost a second copy of the frozen tree. Here every
kernel is changed in place, a block at a time, on each device its own part: as A is split like the kernel's inputs and B like its
outputs, no device needs another's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ssm_jax.errors import ConfigError
from ssm_jax.optim.relora import factors
from ssm_jax.optim.relora.blocks import add_product
from ssm_jax.optim.relora.reset import check, reset_state, zeroed
from ssm_jax.optim.relora.spec import Leaf, Spec
from ssm_jax.optim.relora.trees import HOST, flat, nested
from ssm_jax.typing import Key, Params, PyTree

Metrics = dict[str, Float[Array, ""]]


def in_host_memory(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The same parts, each in the memory of its device's host; the sharding itself on devices that know no such memory."""
    device: Any = next(iter(sharding.addressable_devices))
    known = {memory.kind for memory in device.addressable_memories()}
    return sharding.with_memory_kind(HOST) if HOST in known else sharding


def is_due(applied: Any, cycle: int, merges: Any) -> Any:
    """Whether merge number ``merges`` (the first is 0) has its time: ``applied`` updates have reached (merges + 1) * cycle.

    Skipped updates are not applied, and a merge that is done is not repeated on resuming. For a host that has not read the count
    yet, the dispatched updates less the skipped ones it knows of are an upper bound: False for that is False.
    """
    return applied // cycle > merges


def merge_and_reset(
    frozen: Params,
    trainable: Params,
    opt_state: PyTree,
    key: Key,
    *,
    spec: Spec,
    method: str = "zero",
    keep: float | None = None,
    reset_count: bool | None = None,
    donate: bool = True,
) -> tuple[Params, Params, PyTree, Metrics]:
    """(frozen, trainable, opt_state, metrics) after a merge; the output of the model changes by rounding alone.

    The product is taken in float32 (float64 for such kernels), added and rounded to the kernel's type once. Arrays stay where they
    are, on any mesh. ``key`` should be this merge's own: ``jax.random.fold_in(key, number of the merge)``; the draws depend on it
    and on the kernels' paths alone.

    Args:
        method, keep, reset_count: see ``reset_state``.
        donate: whether the arrays passed in are used up, kernel by kernel; without it a second frozen tree is made.

    Metrics: merged_norm of all changes; rounding_loss, the norm of what rounding took from them, relative to that; state_zeroed,
    the share of the adapters' moments that is zero now.

    Raises:
        ConfigError: trees that are not the plan's, and what ``reset_state`` refuses; before anything is changed.
    """
    how: dict[str, Any] = {"spec": spec, "method": method, "keep": keep, "reset_count": reset_count, "donate": donate}
    return _merge_all(None, frozen, trainable, opt_state, key, **how)[1:]


def merge_with_master(
    master: Params,
    frozen: Params,
    trainable: Params,
    opt_state: PyTree,
    key: Key,
    *,
    spec: Spec,
    method: str = "zero",
    keep: float | None = None,
    reset_count: bool | None = None,
    donate: bool = True,
) -> tuple[Params, Params, Params, PyTree, Metrics]:
    """``merge_and_reset`` of frozen kernels in low precision, whose changes are summed in a second tree: (master, frozen, ...).

    ``master`` holds the kernels in float32, as NumPy or JAX arrays, on any device or in host memory (``in_host_memory``), where it
    stays: it is touched at merges only. ``frozen`` becomes its rounded copy, so that small changes are not lost merge by merge;
    rounding_loss is the master's.
    """
    how: dict[str, Any] = {"spec": spec, "method": method, "keep": keep, "reset_count": reset_count, "donate": donate}
    merged, *rest = _merge_all(master, frozen, trainable, opt_state, key, **how)
    assert merged is not None
    return merged, *rest


def _merge_all(
    master: Params | None,
    frozen: Params,
    trainable: Params,
    opt_state: PyTree,
    key: Key,
    *,
    spec: Spec,
    method: str,
    keep: float | None,
    reset_count: bool | None,
    donate: bool,
) -> tuple[Params | None, Params, Params, PyTree, Metrics]:
    check(method, keep)
    kernels, leaves = flat(frozen), flat(trainable)
    masters = None if master is None else flat(master)
    _require_trees(spec, kernels, leaves, masters)
    pruned = functools.partial(reset_state, spec=spec, method=method, keep=keep, reset_count=reset_count)
    jax.eval_shape(lambda state, key: pruned(state, key=key), opt_state, key)  # refuses while nothing is used up
    reset = _restart(spec, method, keep, reset_count, donate, *_placed((_factors(spec, leaves), opt_state)))
    sums = []
    for leaf in spec.leaves:
        a, b = leaves[leaf.a_path], leaves[leaf.b_path]
        if masters is None:
            kernels[leaf.path], found = _merge(leaf, spec.scale, kernels[leaf.path], a, b, donate)
        else:
            old = masters[leaf.path], kernels[leaf.path]
            home = getattr(old[0], "sharding", None)
            merged, found = _merge(leaf, spec.scale, old[0], a, b, donate)
            kernels[leaf.path] = _copied(merged, old[1])
            masters[leaf.path] = merged if home is None else jax.device_put(merged, home)
            if donate:  # else both trees would be there twice, and the masters on their way to the device all at once
                jax.block_until_ready((masters[leaf.path], kernels[leaf.path]))
                for used in old:
                    if isinstance(used, jax.Array):
                        used.delete()
        sums.append(found)
    restarted, opt_state, share = reset(_factors(spec, leaves), opt_state, key)
    changed, lost = (np.sqrt(sum(float(pair[i]) for pair in sums)) for i in (0, 1))
    metrics = {
        "merged_norm": jnp.float32(changed),
        "rounding_loss": jnp.float32(lost / changed if changed else 0.0),
        "state_zeroed": share,
    }
    new_master = None if masters is None else nested(masters)
    return new_master, nested(kernels), nested({**leaves, **restarted}), opt_state, metrics


def _merge(leaf: Leaf, scale: float, kernel: Any, a: Array, b: Array, donate: bool) -> tuple[Array, Float[Array, "2"]]:
    if not isinstance(kernel, jax.Array):
        with jax.default_device(jax.devices("cpu")[0]):
            kernel = jnp.asarray(kernel)
    if kernel.sharding.memory_kind == HOST:
        kernel = jax.device_put(kernel, kernel.sharding.with_memory_kind(a.sharding.memory_kind))
    if kernel.sharding.device_set != a.sharding.device_set:
        a, b = (jax.device_put(np.asarray(x), next(iter(kernel.devices()))) for x in (a, b))
    unnamed = dataclasses.replace(leaf, path="", dtype="")  # kernels of one shape share a program
    return _compiled_merge(unnamed, scale, kernel.sharding, donate)(kernel, a, b)


@functools.cache
def _compiled_merge(leaf: Leaf, scale: float, placed: Any, donate: bool) -> Any:
    merge = functools.partial(add_product, leaf=leaf, scale=scale)
    donated = (0,) if donate else ()
    if not isinstance(placed, NamedSharding) or placed.mesh.size == 1:
        return jax.jit(merge, donate_argnums=donated)
    entries = (*placed.spec, *(None,) * (len(leaf.shape) - len(placed.spec)))
    a_spec, b_spec = factor_specs(leaf, entries)
    used = [
        axis for entry in entries if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))
    ]

    def local(kernel: Array, a: Array, b: Array) -> tuple[Array, Array]:
        kernel, sums = merge(kernel, a, b)
        return kernel, jax.lax.psum(sums, used) if used else sums

    sharded = jax.shard_map(
        local,
        mesh=placed.mesh,
        in_specs=(PartitionSpec(*entries), a_spec, b_spec),
        out_specs=(PartitionSpec(*entries), PartitionSpec()),
        check_vma=False,
    )
    whole = NamedSharding(placed.mesh, PartitionSpec())
    return jax.jit(sharded, out_shardings=(placed, whole), donate_argnums=donated)


def factor_specs(leaf: Leaf, entries: tuple[Any, ...]) -> tuple[PartitionSpec, PartitionSpec]:
    """How A and B lie where the kernel's axes lie as ``entries`` say: A like its inputs, B like its outputs, rank whole."""
    batch, inputs, outputs = ([entries[axis] for axis in axes] for axes in (leaf.batch, leaf.inputs, leaf.outputs))
    return PartitionSpec(*batch, *inputs, None), PartitionSpec(*batch, None, *outputs)


def factor_shardings(leaf: Leaf, kernel: jax.sharding.Sharding) -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """Where A and B lie, given where their kernel lies."""
    if not isinstance(kernel, NamedSharding):
        return kernel, kernel
    entries = (*kernel.spec, *(None,) * (len(leaf.shape) - len(kernel.spec)))
    a_spec, b_spec = factor_specs(leaf, entries)
    return NamedSharding(kernel.mesh, a_spec), NamedSharding(kernel.mesh, b_spec)


def _copied(master: Array, old: Array) -> Array:
    rounded = master.astype(old.dtype)
    elsewhere = rounded.sharding.device_set != old.sharding.device_set
    return jax.device_put(np.asarray(rounded) if elsewhere else rounded, old.sharding)


def _factors(spec: Spec, leaves: dict[str, Array]) -> dict[str, Array]:
    return {path: leaves[path] for path in spec.adapters}


def _placed(tree: PyTree) -> tuple[Any, tuple[Any, ...]]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(leaf.sharding for leaf in leaves)


@functools.cache
def _restart(
    spec: Spec,
    method: str,
    keep: float | None,
    reset_count: bool | None,
    donate: bool,
    treedef: Any,
    placed: tuple[Any, ...],
) -> Any:
    """Compiled: (adapters by path, optimizer state, key) -> (new adapters, state, share of zeros)."""

    def restart(adapters: dict[str, Array], opt_state: PyTree, key: Key) -> tuple[dict[str, Array], PyTree, Array]:
        fresh = redrawn(adapters, spec, key)
        state = reset_state(opt_state, spec, method, keep=keep, key=key, reset_count=reset_count)
        return fresh, state, zeroed(state, spec)

    shardings = jax.tree.unflatten(treedef, placed)
    return jax.jit(restart, out_shardings=(*shardings, None), donate_argnums=(0, 1) if donate else ())


def redrawn(adapters: dict[str, Array], spec: Spec, key: Key) -> dict[str, Array]:
    """New factors by path, in the types of the old ones."""
    fresh: dict[str, Array] = {}
    for leaf in spec.leaves:
        a, b = factors.init(key, leaf, spec.rank, str(adapters[leaf.a_path].dtype))
        fresh |= {leaf.a_path: a, leaf.b_path: b.astype(adapters[leaf.b_path].dtype)}
    return fresh


def _require_trees(spec: Spec, kernels: dict[str, Any], leaves: dict[str, Any], masters: dict[str, Any] | None) -> None:
    for leaf in spec.leaves:
        wanted = {
            leaf.path: (kernels, leaf.shape),
            leaf.a_path: (leaves, leaf.a_shape(spec.rank)),
            leaf.b_path: (leaves, leaf.b_shape(spec.rank)),
        }
        for path, (tree, shape) in wanted.items():
            found = tree[path].shape if path in tree else None
            if found != shape:
                raise ConfigError(
                    f"{path} should have shape {shape} and has {found}; pass the trees that the plan was made for."
                )
        if masters is not None and (leaf.path not in masters or masters[leaf.path].shape != leaf.shape):
            raise ConfigError(
                f"The master has no {leaf.path} of shape {leaf.shape}; make it from the kernels before rounding."
            )
