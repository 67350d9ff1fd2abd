"""What every implementation of retention is given, and the scale, which depends on a token's place in its document alone."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Memory(NamedTuple):
    """What retention keeps of a document.

    kv_BHNP: sum_m gamma^(n-m) k_m v_m^T over the tokens read. tokens_B: how many those are, int32.
    """

    kv_BHNP: Array
    tokens_B: Array


class Inputs(NamedTuple):
    """The arguments of one call after normalisation.

    ``memory`` has the type that everything is computed in. ``reset_BL`` is False at absent tokens. ``lengths_B`` is None when
    every token is present.
    """

    q_BLHN: Array
    k_BLHN: Array
    v_BLHP: Array
    log_decay_H: Array
    memory: Memory
    reset_BL: Array | None
    lengths_B: Array | None


def places(inputs: Inputs) -> Array:
    """The number of tokens of the same document before each token, those of earlier calls included: int32 [B, L]."""
    length = inputs.q_BLHN.shape[1]
    offsets_L = jnp.arange(length, dtype=jnp.int32)
    going_on_BL = inputs.memory.tokens_B[:, None] + offsets_L
    if inputs.reset_BL is None:
        return going_on_BL
    start_BL = lax.cummax(jnp.where(inputs.reset_BL, offsets_L, -1), axis=1)
    return jnp.where(start_BL < 0, going_on_BL, offsets_L - start_BL)


def tokens_after(inputs: Inputs, places_BL: Array) -> Array:
    """The number of tokens read of each lane's document once the call is over."""
    if inputs.lengths_B is None:
        return places_BL[:, -1] + 1
    last_B = jnp.take_along_axis(places_BL, jnp.maximum(inputs.lengths_B - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(inputs.lengths_B > 0, last_B + 1, inputs.memory.tokens_B)


def scale(places_BL: Array, log_decay_H: Array) -> Array:
    """1 / sqrt(S_n) with S_n = 1 + gamma + ... + gamma^n = (1 - gamma^(n+1)) / (1 - gamma), [B, L, H].

    A decay of exactly 1 counts the tokens.
    """
    count_BL1 = (places_BL + 1).astype(log_decay_H.dtype)[..., None]
    flat_H = log_decay_H == 0
    log_H = jnp.where(flat_H, -1.0, log_decay_H)
    sum_BLH = jnp.where(flat_H, count_BL1, jnp.expm1(count_BL1 * log_H) / jnp.expm1(log_H))
    return lax.rsqrt(sum_BLH)
