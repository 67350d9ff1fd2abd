"""Text generation: ``generate`` for batches, ``stream`` for a terminal."""

from ssm_jax.generation.decoder import Decoder, make_decoder
from ssm_jax.generation.generate import generate
from ssm_jax.generation.stream import stream

__all__ = ["Decoder", "generate", "make_decoder", "stream"]
