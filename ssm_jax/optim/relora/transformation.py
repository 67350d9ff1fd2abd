"""The whole recipe as one Optax transformation, for loops that know only ``tx.update`` and ``optax.apply_updates``.

It works on the combined tree, kernels and adapters together. Its updates of the kernels are zero but at the end of a cycle, where
they carry the merge; those of the adapters then carry the new draw. What it costs beside the two trees: the updates of the kernels
are arrays of the frozen tree's size in float32, alive in every step, and a gradient of that size unless the loop keeps the kernels
from being differentiated (``jax.lax.stop_gradient``). Where memory matters use ``split`` and ``merge_and_reset``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ssm_jax.errors import ConfigError
from ssm_jax.optim.relora import factors
from ssm_jax.optim.relora.merge import is_due, redrawn
from ssm_jax.optim.relora.optimizer import accumulator_empty, applied_updates
from ssm_jax.optim.relora.reset import check, reset_state
from ssm_jax.optim.relora.spec import Spec
from ssm_jax.optim.relora.trees import flat, nested, partition
from ssm_jax.typing import Key, Params, PyTree


class ReLoRAState(NamedTuple):
    """inner: of the optimizer of the trainable tree. merges: how many are done."""

    inner: PyTree
    merges: Int[Array, ""]
    key: Key


def as_transformation(
    optimizer: optax.GradientTransformation,
    spec: Spec,
    *,
    cycle: int,
    key: Key,
    method: str = "zero",
    keep: float | None = None,
    reset_count: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``optimizer`` (``adamw`` or ``chain``) on the trainable leaves, then every ``cycle`` applied updates merge and reset.

    Equal to ``merge_and_reset`` with ``jax.random.fold_in(key, number of the merge)`` after those updates. The gradients of the
    kernels are not looked at. The rest as there.

    Raises:
        ConfigError: a cycle below 1, and what ``reset_state`` refuses.
    """
    check(method, keep)
    if cycle < 1:
        raise ConfigError(f"The cycle is {cycle}; it must be at least 1 update.")
    inner_update = optax.with_extra_args_support(optimizer).update

    def init(params: Params) -> ReLoRAState:
        return ReLoRAState(optimizer.init(partition(params, spec)[1]), jnp.zeros((), jnp.int32), key)

    def update(grads: Params, state: ReLoRAState, params: Params, **extra: Any) -> tuple[Params, ReLoRAState]:
        frozen, trainable = partition(params, spec)
        kernels = flat(frozen)
        changes, inner = inner_update(partition(grads, spec)[1], state.inner, trainable, **extra)
        due = is_due(applied_updates(inner), cycle, state.merges) & accumulator_empty(inner)

        def go_on(changes: dict[str, Array], inner: PyTree) -> tuple[dict[str, Array], dict[str, Array], PyTree]:
            return {path: jnp.zeros(leaf.shape, _wide(leaf)) for path, leaf in kernels.items()}, changes, inner

        def merge(changes: dict[str, Array], inner: PyTree) -> tuple[dict[str, Array], dict[str, Array], PyTree]:
            own = jax.random.fold_in(state.key, state.merges)
            old = flat(trainable)
            adapters = {path: (old[path] + changes[path]).astype(old[path].dtype) for path in spec.adapters}
            merged = {
                leaf.path: factors.product(
                    adapters[leaf.a_path], adapters[leaf.b_path], leaf, spec.scale, _wide(kernels[leaf.path])
                )
                for leaf in spec.leaves
            }
            fresh = redrawn(adapters, spec, own)
            moves = {path: (fresh[path] - old[path]).astype(changes[path].dtype) for path in fresh}
            inner = reset_state(inner, spec, method, keep=keep, key=own, reset_count=reset_count)
            return merged, {**changes, **moves}, inner

        merged, changes, inner = jax.lax.cond(due, merge, go_on, flat(changes), inner)
        return nested({**changes, **merged}), ReLoRAState(inner, state.merges + due, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(leaf: Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
