"""Choosing the next token: greedy, or drawn after temperature, top-k and top-p (in this order).

Top-k and top-p are thresholds, found by bisection over the bits of the float32 logits instead of by a sort: exact, 32 passes
over the vocabulary (on a CPU far cheaper than a sort), and k and p stay traced values, so that changing them compiles nothing.
A threshold treats equal logits alike: tokens that tie with the last one kept are kept too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

Scalar = Float[Array, ""]
NOT_A_TOKEN = -1
"""What is chosen where a logit is NaN."""


class Sampling(NamedTuple):
    """Sampling settings as arrays; a field that is None is switched off. ``temperature`` None is greedy."""

    temperature: Scalar | None = None
    top_k: Int[Array, ""] | None = None
    top_p: Scalar | None = None


def sample(
    logits_BV: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""], step: Int[Array, ""]
) -> Int[Array, "B"]:
    """The next token of each lane.

    Drawn by the Gumbel-max rule: argmax(logits / temperature + g). The noise of lane i at ``step`` is a function of
    (key, i, step) alone, so a lane draws the same whatever the other lanes are. ``NOT_A_TOKEN`` where a logit is NaN.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.temperature is None:
        return _argmax(logits_BV)
    # The largest logit becomes 0, so that a tiny temperature overflows to -inf below it and never to +inf or nan.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = logits_BV / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    if sampling.top_k is not None:
        logits_BV = jnp.where(top_k_mask(logits_BV, sampling.top_k), logits_BV, -jnp.inf)
    if sampling.top_p is not None:
        logits_BV = jnp.where(top_p_mask(logits_BV, sampling.top_p), logits_BV, -jnp.inf)

    def noise(lane: Int[Array, ""]) -> Float[Array, "V"]:
        lane_key = jax.random.fold_in(jax.random.fold_in(key, lane), step)
        return jax.random.gumbel(lane_key, logits_BV.shape[1:], jnp.float32)

    batch = logits_BV.shape[0]
    return _argmax(logits_BV + jax.vmap(noise)(jnp.arange(batch)))


def top_k_mask(logits_BV: Float[Array, "B V"], k: Int[Array, ""]) -> Bool[Array, "B V"]:
    """True for the ``k`` largest logits of each row, and for those equal to the smallest of them."""
    ranks_BV = _ranks(logits_BV)

    def enough(least_B1: UInt32[Array, "B 1"]) -> Bool[Array, "B 1"]:
        return jnp.sum(ranks_BV >= least_B1, axis=-1, keepdims=True) >= k

    return ranks_BV >= _largest(enough, logits_BV.shape[0])


def top_p_mask(logits_BV: Float[Array, "B V"], p: Scalar) -> Bool[Array, "B V"]:
    """True for the smallest set of most likely tokens of total probability >= ``p``, and for ties with its last one.

    ``p`` = 1 keeps every token, also those that are lost in the rounding of the total.
    """
    ranks_BV, probabilities_BV = _ranks(logits_BV), jax.nn.softmax(logits_BV, axis=-1)

    def enough(least_B1: UInt32[Array, "B 1"]) -> Bool[Array, "B 1"]:
        kept_BV = jnp.where(ranks_BV >= least_B1, probabilities_BV, 0.0)
        return (jnp.sum(kept_BV, axis=-1, keepdims=True) >= p) & (p < 1)

    return ranks_BV >= _largest(enough, logits_BV.shape[0])


def _argmax(x_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The first place of the largest value, in two plain reductions: several times faster on a CPU than one over pairs.

    ``NOT_A_TOKEN`` for a row with a NaN.
    """
    last = x_BV.shape[-1] - 1
    largest_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    places_BV = jnp.where(x_BV == largest_B1, jnp.arange(last + 1), last)
    places_B = jnp.min(places_BV, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isnan(largest_B1[:, 0]), NOT_A_TOKEN, places_B)


def _ranks(x_BV: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the floats: negative numbers reversed and below the positive ones; -0 = 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x_BV == 0, 0.0, x_BV), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[Array], Array], batch: int) -> UInt32[Array, "B 1"]:
    """The largest integer of each row for which ``holds``, which is true at 0 and never becomes true again once false."""

    def try_bit(i: Int[Array, ""], found_B1: UInt32[Array, "B 1"]) -> UInt32[Array, "B 1"]:
        candidate_B1 = found_B1 | jax.lax.shift_right_logical(jnp.uint32(1 << 31), i.astype(jnp.uint32))
        return jnp.where(holds(candidate_B1), candidate_B1, found_B1)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((batch, 1), jnp.uint32))
