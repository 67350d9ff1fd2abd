"""The optimizer as an Optax chain: clip, direction, masked decay, learning rate, with a guard against non-finite gradients."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_jax.optim import directions, schedules
from ssm_jax.optim.partition import paths
from ssm_jax.typing import Params, PyTree

NO_DECAY = (
    r"(^|/)A_log$",
    r"(^|/)(Lambda|C)_(real|imag)$",
    r"(^|/)D$",
    r"(^|/)dt_bias$",
    r"(^|/)bias$",
    r"(^|/)scale$",
)
"""Weight decay skips A_log, D and dt_bias (mamba_ssm marks them), Lambda and C (as the DSS code does), every other bias and every
norm. It reaches all kernels, the convolution's included, and the embedding: mamba_ssm marks neither."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with the published Mamba recipe as default.

    Attributes:
        name: "adamw", "lion", "adafactor" or "muon"; see ``ssm_jax.optim.directions``.
        lr, final_lr: peak and last learning rate. schedule: see ``ssm_jax.optim.schedules``.
        warmup_steps, warmup_ratio: length of the warm-up, in steps or as a part of the total; at most one.
        decay_ratio: the part of a "wsd" schedule, after warm-up, that decays. power: of a "polynomial" one.
        clip_norm: bound of the global gradient norm, null for none.
        no_decay: patterns of parameter paths without weight decay.
        ema: decay of an exponential moving average of the parameters, null for none; evaluation, samples and export use it.
        freeze, train: patterns of parameter paths to freeze, or the only ones to train; at most one of the two.
        max_skipped: updates in a row that may be skipped for non-finite gradients before the run stops.
    """

    name: directions.Name = "adamw"
    lr: float = 3e-3
    final_lr: float = 1e-5
    schedule: schedules.Name = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    decay_ratio: float = 0.1
    power: float = 2.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    no_decay: tuple[str, ...] = NO_DECAY
    ema: float | None = None
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if not (
            0 <= self.final_lr < math.inf and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0
        ):
            raise ValueError("final_lr and weight_decay must not be negative, beta1 and beta2 must lie in [0, 1)")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both set; keep one")
        if not 0 <= self.warmup_ratio < 1 or self.warmup_steps < 0:
            raise ValueError("warmup_ratio must lie in [0, 1) and warmup_steps must not be negative")
        if not 0 < self.decay_ratio <= 1:
            raise ValueError(f"decay_ratio is {self.decay_ratio}; it must lie in (0, 1]")
        if self.power <= 0:
            raise ValueError(f"power is {self.power}; it must be above 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must lie between 0 and 1, or be null for none")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be above 0, or null for no clipping")


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
