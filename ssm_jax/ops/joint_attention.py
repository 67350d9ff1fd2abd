"""Softmax attention to keys that are held in several arrays, without putting them into one.

y_t = sum_j w_tj v_j,   w_t = softmax over the seen keys j of all parts of q_t . k_j / sqrt(P)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Part(NamedTuple):
    """Keys and values of one array, and which of them each query sees."""

    k_BHSP: Float[Array, "B H S P"]
    v_BHSQ: Float[Array, "B H S Q"]
    seen_BTS: Bool[Array, "B T S"]


def joint_attention(q_BTHP: Float[Array, "B T H P"], parts: Sequence[Part]) -> Float[Array, "B T H Q"]:
    """One softmax over all parts, float32, in q's dtype; 0 for a query that sees no key.

    Values that a query does not see have the weight zero and must be finite.
    """
    wide = jnp.promote_types(q_BTHP.dtype, jnp.float32)
    q_BHTP = jnp.swapaxes(q_BTHP, 1, 2)
    scale = 1 / math.sqrt(q_BTHP.shape[-1])
    scores = [
        jnp.where(
            part.seen_BTS[:, None],
            jnp.einsum("bhtp,bhsp->bhts", q_BHTP, part.k_BHSP.astype(q_BTHP.dtype), preferred_element_type=wide)
            * scale,
            -jnp.inf,
        )
        for part in parts
    ]
    largest = jnp.max(jnp.stack([jnp.max(score, axis=-1) for score in scores]), axis=0)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0, largest))[..., None]
    weights = [jnp.exp(score - largest) for score in scores]
    total = sum((jnp.sum(weight, axis=-1) for weight in weights), jnp.zeros((), wide))
    inverse = 1 / jnp.where(total == 0, 1, total)[..., None]
    y_BHTQ = sum(
        (
            jnp.einsum(
                "bhts,bhsq->bhtq",
                (weight * inverse).astype(q_BTHP.dtype),
                part.v_BHSQ.astype(q_BTHP.dtype),
                preferred_element_type=wide,
            )
            for weight, part in zip(weights, parts, strict=True)
        ),
        jnp.zeros((), wide),
    )
    return jnp.swapaxes(y_BHTQ, 1, 2).astype(q_BTHP.dtype)
