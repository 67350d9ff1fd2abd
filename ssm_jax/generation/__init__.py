"""Text generation: ``generate`` for batches, ``stream`` for a terminal."""

from ssm_jax.generation.generate import generate
from ssm_jax.generation.stream import stream

__all__ = ["generate", "stream"]
