"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_FINE = 256


def rotate(
    x_BLHP: Float[Array, "B L H P"], place_BL: Int[Array, "B L"], base: float, limit: int
) -> Float[Array, "B L H P"]:
    """Turns each pair (x_i, x_{i + P/2}) by the angle place * base^(-2 i / P); computed in float32, returned in x's dtype.

    The place is split into a multiple of 256 and the rest, whose sines come from tables made in float64; the formula for sums
    joins them. A float32 product would be off by 1e-4 at place 1,000.

    Args:
        place_BL: 0 <= place < limit.

    Raises:
        ValueError: the head width P is odd.
    """
    width = x_BLHP.shape[-1]
    if width % 2:
        raise ValueError(f"rotary positions turn pairs, and head_dim is {width}; choose an even one")
    frequencies = base ** (-2.0 * np.arange(width // 2) / width)

    def table(step: int, count: int, place: Array) -> tuple[Array, Array]:
        angles = step * np.arange(count)[:, None] * frequencies
        cos, sin = (jnp.asarray(values, jnp.float32)[place][:, :, None] for values in (np.cos(angles), np.sin(angles)))
        return cos, sin

    cos_a, sin_a = table(_FINE, -(-limit // _FINE), place_BL // _FINE)
    cos_b, sin_b = table(1, _FINE, place_BL % _FINE)
    cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
    one, other = jnp.split(x_BLHP.astype(jnp.promote_types(x_BLHP.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x_BLHP.dtype)
