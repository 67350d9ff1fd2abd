"""Schedules, the optimizer, and the split into trained and frozen parameters."""

from ssm_jax.optim.optimizer import NO_DECAY, OptimConfig, average, decay_mask, learning_rate, make_optimizer
from ssm_jax.optim.partition import merge, split

__all__ = ["NO_DECAY", "OptimConfig", "average", "decay_mask", "learning_rate", "make_optimizer", "merge", "split"]
