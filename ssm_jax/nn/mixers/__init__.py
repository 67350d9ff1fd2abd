"""Sequence mixers: Flax modules ``(x_BLD, state, positions) -> (y_BLD, state)``."""

from ssm_jax.nn.mixers.attention import Attention
from ssm_jax.nn.mixers.gss import GatedStateSpace
from ssm_jax.nn.mixers.mamba import Mamba
from ssm_jax.nn.mixers.mamba2 import Mamba2
from ssm_jax.nn.mixers.retention import Retention

__all__ = ["Attention", "GatedStateSpace", "Mamba", "Mamba2", "Retention"]
