"""How tokens are chosen, checked before anything is compiled."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ssm_jax.errors import GenerationError
from ssm_jax.generation.sampler import Sampling
from ssm_jax.models import LanguageModel

PREFILL_CHUNK = 2048
"""Tokens of a prompt that are read at once."""


class Settings(NamedTuple):
    """What may change between calls without compiling anything. ``eos_id`` is -1 for none."""

    sampling: Sampling
    key: Key[Array, ""]
    eos_id: Int[Array, ""]
    pad_id: Int[Array, ""]


def check_settings(
    model: LanguageModel,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_id: int | None,
    key: Key[Array, ""] | None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Settings:
    """The settings as arrays; raises GenerationError for one that is out of range."""
    vocab_size = model.config.vocab_size
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise GenerationError(f"temperature is {temperature}; it must be 0 (greedy) or positive.")
    if top_k is not None and top_k < 1:
        raise GenerationError(f"top_k is {top_k}; it must be at least 1, or None for no limit.")
    if top_p is not None and not 0 < top_p <= 1:
        raise GenerationError(f"top_p is {top_p}; it must be above 0 and at most 1, or None for no limit.")
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise GenerationError(
            f"eos_id is {eos_id}, outside the vocabulary of {vocab_size} tokens; give the tokenizer's."
        )
    if prefill_chunk < 1:
        raise GenerationError(f"prefill_chunk is {prefill_chunk}; it must be at least 1.")
    if key is not None and not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise GenerationError(f"key is {key!r}, no key of jax.random; pass key=jax.random.key(0).")
    if temperature == 0:
        sampling, key = Sampling(), jax.random.key(0)
    elif key is None:
        raise GenerationError("temperature > 0 draws at random and needs a key; pass key=jax.random.key(0).")
    else:
        limit = None if top_k is None else jnp.int32(min(top_k, vocab_size))
        sampling = Sampling(jnp.float32(temperature), limit, None if top_p is None else jnp.float32(top_p))
    return Settings(sampling, key, eos_id=jnp.int32(-1 if eos_id is None else eos_id), pad_id=jnp.int32(eos_id or 0))
