"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Frequencies = np.ndarray
"""Radians per position of every turned pair, float64 [N]; constants of a program."""


def geometric(width: int, base: float) -> Frequencies:
    """base^(-2 i / P), i < P / 2: the usual ones. ``width`` is P."""
    return np.asarray(base ** (-2.0 * np.arange(_pairs(width)) / width), np.float64)


def geometric_to_end(width: int, base: float) -> Frequencies:
    """base^(-i / (P / 2 - 1)), i < P / 2: the last is 1 / base exactly, as in RetNet's code."""
    return np.asarray(base ** -np.linspace(0.0, 1.0, _pairs(width)), np.float64)


def rotate(
    x_BLHP: Float[Array, "B L H P"],
    position_BL: Int[Array, "#B #L"],
    frequencies: Frequencies,
    *,
    interleaved: bool = False,
) -> Float[Array, "B L H P"]:
    """Turns each pair (x_i, x_{i + N}), i < N, by the angle position * frequency_i; in float32, returned in x's dtype.

    N is the number of frequencies; where a head has more than 2 N entries, those behind stay as they are.
    ``interleaved``: the pairs are (x_{2i}, x_{2i + 1}). Angles are within 1e-6 rad at every int32 position.
    """
    angle_BLN = _angles(position_BL, frequencies)
    cos_BL1N, sin_BL1N = jnp.cos(angle_BLN)[:, :, None], jnp.sin(angle_BLN)[:, :, None]
    width = 2 * len(frequencies)
    x = x_BLHP[..., :width].astype(jnp.promote_types(x_BLHP.dtype, jnp.float32))
    one, other = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    turned = (one * cos_BL1N - other * sin_BL1N, other * cos_BL1N + one * sin_BL1N)
    joined = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    joined = joined.astype(x_BLHP.dtype)
    return jnp.concatenate([joined, x_BLHP[..., width:]], axis=-1) if width < x_BLHP.shape[-1] else joined


def _angles(position_BL: Int[Array, "#B #L"], frequencies: Frequencies) -> Float[Array, "#B #L N"]:
    """position * frequency modulo 2 pi, in [-pi, pi).

    Turns are counted in units of 2^-32, so that the product with an integer wraps where a turn is complete and loses nothing; a
    product in float32 would be off by 0.06 rad at position 2^20. The part of a frequency below one unit is added in float32.
    """
    units = frequencies * (2.0**32 / (2 * np.pi))
    whole = np.round(units)
    wrapped = position_BL.astype(jnp.uint32)[..., None] * jnp.asarray(whole.astype(np.uint64).astype(np.uint32))
    rest = position_BL.astype(jnp.float32)[..., None] * jnp.asarray(units - whole, jnp.float32)
    turned = jax.lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) + rest
    return turned * jnp.float32(2 * np.pi / 2.0**32)


def _pairs(width: int) -> int:
    if width % 2:
        raise ValueError(f"rotary positions turn pairs, and head_dim is {width}; choose an even one")
    return width // 2
