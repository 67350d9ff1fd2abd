"""Schedules, the optimizer, the split into trained and frozen parameters, and ReLoRA (``optim.relora``)."""

from ssm_jax.optim import relora
from ssm_jax.optim.config import NO_DECAY, OptimConfig, ReLoRAConfig
from ssm_jax.optim.optimizer import average, decay_mask, learning_rate, make_optimizer
from ssm_jax.optim.partition import merge, split

__all__ = [
    "NO_DECAY",
    "OptimConfig",
    "ReLoRAConfig",
    "average",
    "decay_mask",
    "learning_rate",
    "make_optimizer",
    "merge",
    "relora",
    "split",
]
