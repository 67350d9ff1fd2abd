"""Learning-rate schedules as functions of the step and of the total number of steps, both possibly traced.

The total is an argument, not a constant, so that a run whose length is decided by a time budget compiles once.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from ssm_jax.errors import ConfigError

Name = Literal["cosine", "wsd", "linear", "polynomial", "constant"]
Scalar = jax.Array | int | float


def learning_rate(
    name: Name,
    step: Scalar,
    total: Scalar,
    *,
    peak: float,
    final: float = 0.0,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    decay_ratio: float = 0.1,
    power: float = 2.0,
) -> jax.Array:
    """The learning rate of step ``step`` (the first is 0) of ``total``, float32.

    Warm-up rises linearly over w = warmup_steps (or round(warmup_ratio * total)) steps: peak * (step + 1) / w. With the progress
    p = (step - w) / (total - 1 - w), clipped to [0, 1], so that the last step has p = 1:

    * cosine: final + (peak - final) (1 + cos(pi p)) / 2
    * linear: peak + (final - peak) p
    * polynomial: final + (peak - final) (1 - p)^power
    * wsd (warm-up, stable, decay): peak, then linear to ``final`` over the last ``decay_ratio`` of p
    * constant: peak
    """
    step, total = jnp.asarray(step, jnp.float32), jnp.asarray(total, jnp.float32)
    warmup = jnp.float32(warmup_steps) if warmup_steps else jnp.round(warmup_ratio * total)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - 1.0 - warmup, 1.0), 0.0, 1.0)
    if name == "cosine":
        decayed = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    elif name == "linear":
        decayed = peak + (final - peak) * progress
    elif name == "polynomial":
        decayed = final + (peak - final) * (1.0 - progress) ** power
    elif name == "wsd":
        decayed = peak + (final - peak) * jnp.clip((progress - (1.0 - decay_ratio)) / decay_ratio, 0.0, 1.0)
    elif name == "constant":
        decayed = jnp.full_like(progress, peak)
    else:
        raise ConfigError(f"Schedule {name!r} is unknown; use cosine, wsd, linear, polynomial or constant.")
    rising = peak * (step + 1.0) / jnp.maximum(warmup, 1.0)
    return jnp.where(step < warmup, rising, decayed)
