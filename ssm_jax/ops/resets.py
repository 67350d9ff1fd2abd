"""What a document start does to a carried state, for ops whose recurrence multiplies by a zero there."""

import jax.numpy as jnp
from jaxtyping import Array, Bool


def clear(state: Array, starts_B: Bool[Array, "B"] | None) -> Array:
    """``state`` [B, ...], zero in the lanes that start a document with their first token: by selection, because zero times NaN
    is NaN, and a lane that broke must be usable for the next document."""
    if starts_B is None:
        return state
    return jnp.where(starts_B.reshape(-1, *[1] * (state.ndim - 1)), 0, state)
