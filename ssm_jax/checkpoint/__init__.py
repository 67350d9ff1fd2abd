"""Checkpoints: saved whole or not at all, verified by checksum, restored onto any mesh."""

from ssm_jax.checkpoint.model import find_checkpoint, is_checkpoint, load_model
from ssm_jax.checkpoint.store import latest_good, restore, save, steps

__all__ = ["find_checkpoint", "is_checkpoint", "latest_good", "load_model", "restore", "save", "steps"]
