"""Softmax attention to the last few tokens read: y_t = sum_j w_tj v_j, w_t = softmax_j(q_t . k_j / sqrt(P)), 0 <= t - j <= reach_t.

The tokens of a document follow one another, so that this one inequality says everything: causality, a limited context, blocks
that do not see each other, and documents packed into one row (``reach_t`` is then the position within block or document).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q_BLHP: Float[Array, "B L H P"],
    k_BSGP: Float[Array, "B S G P"],
    v_BSGP: Float[Array, "B S G P"],
    reach_BL: Int[Array, "B L"],
    *,
    window: int,
) -> Float[Array, "B L H P"]:
    """Attention of each query to the ``reach_BL`` keys before its own and to its own, in q's dtype; float32 softmax.

    Head h looks at the keys and values of group h // (H / G).

    A key out of reach has no influence at all, a NaN included, forward or backward. A key or value in reach that is not finite
    makes the result NaN.

    Args:
        k_BSGP, v_BSGP: S >= L, time-ordered; G divides H; the last L are those of the queries.
        reach_BL: 0 <= reach < window. What reaches before the first key sees the keys that are there.
        window: W. Up to W queries make one product with all keys; more are taken W at a time with the 2 W keys that end with
            theirs, so that time and memory grow with L W and not with L S.
    """
    length = q_BLHP.shape[1]
    if length <= window:
        return _attend(q_BLHP, k_BSGP, v_BSGP, reach_BL)
    blocks = -(-length // window)
    after = blocks * window - length

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, window, *x.shape[2:])

    def bands(x_BSGP: Array) -> Array:
        before = window + length - x_BSGP.shape[1]  # negative: more keys than any query reaches
        x_BSGP = x_BSGP[:, max(-before, 0) :]
        x = split(jnp.pad(x_BSGP, ((0, 0), (max(before, 0), after), (0, 0), (0, 0))))
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    q = split(jnp.pad(q_BLHP, ((0, 0), (0, after), (0, 0), (0, 0))))
    reach = split(jnp.pad(reach_BL, ((0, 0), (0, after))))
    y = jax.vmap(_attend, in_axes=1, out_axes=1)(q, bands(k_BSGP), bands(v_BSGP), reach)
    return y.reshape(q.shape[0], blocks * window, *q.shape[3:])[:, :length]


def attention_step(
    q_BHP: Float[Array, "B H P"],
    k_BGSP: Float[Array, "B G S P"],
    v_BGSP: Float[Array, "B G S P"],
    place_B: Int[Array, "B"],
) -> Float[Array, "B H P"]:
    """``attention`` of one token to the rows 0 ... ``place_B`` of S keys, its own among them, laid out for matrix-vector products.

    Values in the other rows must be finite: their weight is zero, and nothing else is done about them.
    """
    wide = jnp.promote_types(q_BHP.dtype, jnp.float32)
    seen_BS = jnp.arange(k_BGSP.shape[2]) <= place_B[:, None]
    q_BGRP = _grouped(q_BHP, k_BGSP.shape[1])
    scores = jnp.einsum("bgrp,bgsp->bgrs", q_BGRP, k_BGSP, preferred_element_type=wide) / math.sqrt(q_BHP.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen_BS[:, None, None], scores, -jnp.inf), axis=-1)
    y_BGRP = jnp.einsum("bgrs,bgsp->bgrp", weights, v_BGSP, preferred_element_type=wide)
    return y_BGRP.reshape(q_BHP.shape).astype(q_BHP.dtype)


def _attend(q_BLHP: Array, k_BSGP: Array, v_BSGP: Array, reach_BL: Array) -> Array:
    """All queries with all keys. The last query is the last key's."""
    wide = jnp.promote_types(q_BLHP.dtype, jnp.float32)
    length, keys = q_BLHP.shape[1], k_BSGP.shape[1]
    distance_LS = jnp.arange(keys - length, keys)[:, None] - jnp.arange(keys)
    seen_BLS = (distance_LS >= 0) & (distance_LS <= reach_BL[..., None])

    # In a product with a weight of exactly zero a NaN is still a NaN, so that broken rows are replaced and then accounted for.
    (q, broken_q), (k, broken_k), (v, broken_v) = _mended(q_BLHP), _mended(k_BSGP), _mended(v_BSGP)
    # The operands are transposed first: in the order of the inputs the compiler would transpose the scores.
    q_BGRLP = jnp.moveaxis(_grouped(q, k.shape[2]), 1, 3)
    k_BGSP, v_BGSP = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    shape_BGRLS = (*q_BGRLP.shape[:4], keys)
    q_BGTP = q_BGRLP.reshape(*q_BGRLP.shape[:2], -1, q.shape[-1])
    scores_BGTS = jnp.einsum("bgtp,bgsp->bgts", q_BGTP, k_BGSP, preferred_element_type=wide) / math.sqrt(q.shape[-1])
    scores = jnp.where(seen_BLS[:, None, None], scores_BGTS.reshape(shape_BGRLS), -jnp.inf)
    weights_BGTS = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(scores_BGTS.shape)
    y_BGTP = jnp.einsum("bgts,bgsp->bgtp", weights_BGTS, v_BGSP, preferred_element_type=wide)
    y_BLGRP = jnp.moveaxis(y_BGTP.reshape(q_BGRLP.shape), 3, 1)
    broken_BL = broken_q | jnp.any(seen_BLS & (broken_k | broken_v)[:, None], axis=-1)
    return jnp.where(broken_BL[..., None, None], jnp.nan, y_BLGRP.reshape(q_BLHP.shape)).astype(q_BLHP.dtype)


def _grouped(q: Float[Array, "*lead H P"], groups: int) -> Float[Array, "*lead G R P"]:
    """The heads by the group whose keys they share, R = H / G each."""
    return q.reshape(*q.shape[:-2], groups, -1, q.shape[-1])


def _mended(x_BLHP: Float[Array, "B L H P"]) -> tuple[Float[Array, "B L H P"], Bool[Array, "B L"]]:
    """The rows with zeros for what is not finite, and which rows had any."""
    finite = jnp.isfinite(x_BLHP)
    return jnp.where(finite, x_BLHP, 0), ~jnp.all(finite, axis=(2, 3))
