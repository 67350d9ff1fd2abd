"""The optimizer of the trainable tree: one Optax chain, in which the adapters have a step counter of their own."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from ssm_jax.optim import directions
from ssm_jax.optim.config import OptimConfig
from ssm_jax.optim.optimizer import make_optimizer as make_full_rank
from ssm_jax.optim.relora.spec import Spec
from ssm_jax.typing import PyTree

ADAPTERS, OTHER = "adapters", "other"
Mask = PyTree | Callable[[PyTree], PyTree]


class AppliedState(NamedTuple):
    """How many updates were applied; skipped ones do not count."""

    applied: Int[Array, ""]


def count_applied() -> optax.GradientTransformation:
    """The identity, which counts. Inside a guard or ``optax.MultiSteps`` it sees only updates that are applied."""

    def update(updates: PyTree, state: AppliedState, params: PyTree = None) -> tuple[PyTree, AppliedState]:
        del params
        return updates, AppliedState(state.applied + 1)

    return optax.GradientTransformation(lambda params: AppliedState(jnp.zeros((), jnp.int32)), update)


def separate_counters(spec: Spec, direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """``direction`` once for the adapters and once for all other leaves, so that the adapters' counter can start again; and the
    count of applied updates, which is the run's clock."""

    def labels(params: PyTree) -> PyTree:
        def label(path: tuple, leaf: jax.Array) -> str:
            del leaf
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return ADAPTERS if name in spec.adapters else OTHER

        return jax.tree.map_with_path(label, params)

    return optax.chain(count_applied(), optax.partition({ADAPTERS: direction, OTHER: direction}, labels))


def chain(
    spec: Spec,
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    decay_mask: Mask | None = None,
    compat: Literal["reference"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """-lr * (direction(clip(g)) + weight_decay * w) over the trainable tree; non-finite gradients change nothing.

    The norm that is clipped is that of the trainable leaves, the only ones there are. A schedule counts applied updates.

    Args:
        direction: an Optax transformation such as ``optax.scale_by_adam()``. decay_mask: which leaves decay; None: all, the
            adapters too, as in the reference. compat: "reference" clips by min(1, limit / (norm + 1e-6)).
    """
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    if compat is not None and clip_norm is not None:
        clip = _clip_as_torch(clip_norm)
    steps = optax.chain(
        clip,
        separate_counters(spec, direction),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.apply_if_finite(steps, max_consecutive_errors=jnp.iinfo(jnp.int32).max)


def adamw(
    spec: Spec,
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    **how: Any,
) -> optax.GradientTransformationExtraArgs:
    """``chain`` with AdamW's direction, and the betas of the published scripts."""
    return chain(spec, optax.scale_by_adam(b1, b2, eps), learning_rate, **how)


def make_optimizer(config: OptimConfig, spec: Spec) -> optax.GradientTransformationExtraArgs:
    """``ssm_jax.optim.make_optimizer`` for the trainable tree: ``update(grads, state, params, learning_rate=lr)``."""
    plain = directions.direction(config.name, beta1=config.beta1, beta2=config.beta2, eps=config.eps)
    return make_full_rank(config, separate_counters(spec, plain))


def applied_updates(opt_state: PyTree) -> Int[Array, ""]:
    """How many updates were applied since the state was made: dispatched less skipped.

    Raises:
        ValueError: a state without ``count_applied``.
    """
    found = _states(opt_state, AppliedState)
    if not found:
        raise ValueError("The optimizer does not count its updates; put relora.count_applied() into the chain.")
    return found[0].applied


def accumulator_empty(opt_state: PyTree) -> Bool[Array, ""]:
    """Whether no gradients wait in an ``optax.MultiSteps``: they are those of adapters that a merge would replace."""
    empty = jnp.asarray(True)
    for state in _states(opt_state, optax.MultiStepsState):
        empty &= state.mini_step == 0
    return empty


def _states(opt_state: PyTree, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    found = [leaf for leaf in leaves if isinstance(leaf, kind)]
    inner = [state.inner_opt_state for state in found if isinstance(state, optax.MultiStepsState)]
    return found + [state for tree in inner for state in _states(tree, kind)]


def _clip_as_torch(limit: float) -> optax.GradientTransformation:
    def update(updates: PyTree, params: PyTree) -> PyTree:
        del params
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(update)
