"""Retention as the published code trains it: scores of a whole sequence, divided by their sum.

    A_nm = (q_n . k_m) gamma^(n-m) / sqrt(S_n), m <= n;   y_n = sum_m A_nm v_m / Z_n
    "sum_abs":  Z_n = clip(sum_m |A_nm|, 1, 5e4)          (torchscale since November 2023, syncdoth, DenseRetNet)
    "abs_sum":  Z_n = max(1, |sum_m A_nm|)                (the paper, section 2.1, and torchscale 0.3.0)

Z is a constant for the gradient. It divides every value of a head by one number, which the norm after retention takes out again but
for its epsilon, and it exists in this form alone: no recurrence can carry a sum of absolute values. So these forms are for
parity with what a checkpoint saw in training.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from ssm_jax.ops.retention.inputs import Inputs, places, scale

Normaliser = Literal["abs_sum", "sum_abs"]
_QUERIES = 256


def whole(inputs: Inputs, normaliser: Normaliser) -> Array:
    """y_BLHP, from no earlier state. Scores exist for 256 queries at a time, in the backward pass too."""
    dtype = inputs.memory.kv_BHNP.dtype
    places_BL, length = places(inputs), inputs.q_BLHN.shape[1]
    k, v = (x.astype(dtype) for x in (inputs.k_BLHN, inputs.v_BLHP))
    start_BL = jnp.arange(length) - places_BL

    @jax.checkpoint
    def block(q_BTHN: Array, index_T: Array, scale_BTH: Array, start_BT: Array) -> Array:
        lag_TS = index_T[:, None] - jnp.arange(length)
        seen_BTS = (lag_TS >= 0) & (jnp.arange(length) >= start_BT[..., None])
        decay_HTS = jnp.exp(inputs.log_decay_H[:, None, None] * jnp.maximum(lag_TS, 0))
        scores = jnp.einsum("bthn,bshn->bhts", q_BTHN, k) * decay_HTS * jnp.swapaxes(scale_BTH, 1, 2)[..., None]
        scores = jnp.where(seen_BTS[:, None], scores, 0)
        y_BTHP = jnp.einsum("bhts,bshp->bthp", scores, v)
        return y_BTHP / jnp.swapaxes(lax.stop_gradient(_normaliser(scores, normaliser)), 1, 2)[..., None]

    count = math.ceil(length / _QUERIES)
    size = math.ceil(length / count)

    def cut(x: Array, axis: int = 1) -> Array:
        x = jnp.moveaxis(x, axis, 0)
        x = jnp.pad(x, [(0, count * size - length)] + [(0, 0)] * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(count, size, *x.shape[1:]), 1, 1 + axis)

    q = inputs.q_BLHN.astype(dtype)
    blocks = (cut(q), cut(jnp.arange(length), 0), cut(scale(places_BL, inputs.log_decay_H)), cut(start_BL))
    y = jnp.moveaxis(lax.map(lambda parts: block(*parts), blocks), 0, 1)
    return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :length].astype(inputs.v_BLHP.dtype)


def _normaliser(scores_BHTS: Array, kind: Normaliser) -> Array:
    if kind == "sum_abs":
        return jnp.clip(jnp.sum(jnp.abs(scores_BHTS), axis=-1), 1.0, 5e4)
    return jnp.maximum(jnp.abs(jnp.sum(scores_BHTS, axis=-1)), 1.0)
