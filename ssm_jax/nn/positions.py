"""What a ``positions`` array means to a mixer (design: one input for packing, padding, ragged lanes and refill)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssm_jax.typing import Lengths, Positions, Reset


def resets(positions: Positions | None) -> Reset | None:
    """True at the first token of each document (position 0)."""
    return None if positions is None else positions == 0


def lengths(positions: Positions | None) -> Lengths | None:
    """Number of present tokens per row; -1 marks absent ones, allowed only as a suffix."""
    return None if positions is None else jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)


def resolve(start: Int[Array, "B"], length: int, positions: Positions | None) -> Positions:
    """The position of every token: as given, or going on from ``start``."""
    return start[:, None] + jnp.arange(length, dtype=jnp.int32) if positions is None else positions


def next_positions(start: Int[Array, "B"], length: int, positions: Positions | None) -> Int[Array, "B"]:
    """Position of the token that would follow: the last present one plus one; unchanged where none is present."""
    count = lengths(positions)
    if positions is None or count is None:
        return start + jnp.int32(length)
    last = jnp.take_along_axis(positions, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(count > 0, last + 1, start)


def last_present(x_BLD: Float[Array, "B L D"], positions: Positions | None) -> Float[Array, "B 1 D"]:
    """The row's last present token, kept as a length-1 axis; undefined for a row with none."""
    count = lengths(positions)
    if count is None:
        return x_BLD[:, -1:]
    return jnp.take_along_axis(x_BLD, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
