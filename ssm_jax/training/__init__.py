"""Training: config, state, step, loop."""

from ssm_jax.training.config import RunConfig, load_run_config
from ssm_jax.training.loop import train
from ssm_jax.training.state import TrainState
from ssm_jax.training.step import make_step

__all__ = ["RunConfig", "TrainState", "load_run_config", "make_step", "train"]
