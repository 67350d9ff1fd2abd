"""The optimizer as an Optax chain: clip, direction, masked decay, learning rate, with a guard against non-finite gradients."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_jax.optim import directions, schedules
from ssm_jax.optim.config import NO_DECAY, OptimConfig
from ssm_jax.optim.partition import paths
from ssm_jax.typing import Params, PyTree


def learning_rate(config: OptimConfig, step: jax.Array, total: jax.Array) -> jax.Array:
    """The configured schedule at ``step`` of ``total``."""
    return schedules.learning_rate(
        config.schedule,
        step,
        total,
        peak=config.lr,
        final=config.final_lr,
        warmup_steps=config.warmup_steps,
        warmup_ratio=config.warmup_ratio,
        decay_ratio=config.decay_ratio,
        power=config.power,
    )


def decay_mask(params: Params, no_decay: Sequence[str] = NO_DECAY) -> PyTree:
    """True where weight decay applies: no pattern finds the leaf's path. By name, not by rank: layers are stacked."""
    decays = [not any(re.search(pattern, name) for pattern in no_decay) for name in paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), decays)


def make_optimizer(
    config: OptimConfig, direction: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """``update(grads, state, params, learning_rate=lr)``: -lr * (direction + weight_decay * w * mask).

    AdamW's direction is m / (sqrt(v) + eps). ``direction`` takes the place of the configured one.

    Gradients with any non-finite entry leave parameters and moments as they are (``optax.apply_if_finite``); the state counts
    such updates in a row (``notfinite_count``) and in all (``total_notfinite``).
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if direction is None:
        direction = directions.direction(config.name, beta1=config.beta1, beta2=config.beta2, eps=config.eps)
    chain = optax.chain(
        clip,
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.no_decay)),
        _scale_by_learning_rate(),
    )
    return optax.apply_if_finite(chain, max_consecutive_errors=jnp.iinfo(jnp.int32).max)


def average(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), so that early values are soon forgotten."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - d).astype(old.dtype) * (new - old), ema, params)


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, learning_rate: jax.Array, **extra: Any
    ) -> tuple[PyTree, Any]:
        return jax.tree.map(lambda u: -learning_rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
