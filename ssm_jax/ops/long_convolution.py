"""Causal convolution with a kernel as long as the sequence, by FFT: y_t = sum_{j <= t} K_{t-j} x_j for every channel.

Differentiated by hand, so that only x and K are kept: with * the correlation over time, dx = K * dy and dK = x * dy.

Documents: a sum over lags stops at the start of a document. One FFT cannot stop, so each document of the row is convolved on its
own, all rows at once: the first document of every row, then the second, and so on. What does not belong to the document is zero
before it enters the FFT, so nothing crosses a boundary, exactly. A document of one token is a product with K_0, without an FFT.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ssm_jax.ops.fft import irfft, rfft

_ALONE = -1


def long_convolution(
    x: Float[Array, "*rows L H"], kernel: Float[Array, "L H"], reset: Bool[Array, "*rows L"] | None = None
) -> Float[Array, "*rows L H"]:
    """y_t = sum of K_{t-j} x_j over j <= t, back to the last token with ``reset`` (itself included), channel by channel.

    The FFT has at least 2 L - 1 points, so that nothing wraps around. float32 (float64 for float64 inputs).

    Args:
        reset: True at the first token of a document; None where every row is one document.
    """
    segments = None if reset is None else _segments(reset)
    return _convolution(x, kernel, segments)


def fast_size(least: int) -> int:
    """The smallest of 2^a times 1, 3, 5, 9 or 15, a >= 1, that is not below ``least``: sizes that FFTs are fast for."""
    sizes = (2 ** int(np.ceil(np.log2(max(least / part, 2)))) * part for part in (1, 3, 5, 9, 15))
    return min(size for size in sizes if size >= least)


def _segments(reset: Array) -> Array:
    """0 from the start on, one more at each document; _ALONE for a document of one token."""
    next_reset = jnp.concatenate([reset[..., 1:], jnp.ones_like(reset[..., :1])], axis=-1)
    alone = reset & next_reset
    return jnp.where(alone, _ALONE, jnp.cumsum(reset & ~alone, axis=-1, dtype=jnp.int32))


def _range(segments: Array) -> tuple[Array, Array]:
    """The first and the one after the last that there is; rows that begin with a document have no 0."""
    last = jnp.max(segments)
    return jnp.min(jnp.where(segments == _ALONE, last + 1, segments)), last + 1


@jax.custom_vjp
def _convolution(x: Array, kernel: Array, segments: Int[Array, "*rows L"] | None) -> Array:
    spectrum = _spectrum(kernel)

    def convolve(x: Array) -> Array:
        return _signal(_spectrum(x) * spectrum, x.shape[-2])

    if segments is None:
        return convolve(x)
    alone = (segments == _ALONE)[..., None]

    def add(segment: Array, y: Array) -> Array:
        here = (segments == segment)[..., None]
        return jnp.where(here, convolve(jnp.where(here, x, 0)), y)

    return lax.fori_loop(*_range(segments), add, jnp.where(alone, kernel[0] * x, 0))


def _forward(x: Array, kernel: Array, segments: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _convolution(x, kernel, segments), (x, kernel, segments)


def _backward(residuals: tuple[Array, Array, Array | None], dy: Array) -> tuple[Array, Array, None]:
    x, kernel, segments = residuals
    length, rows = x.shape[-2], tuple(range(x.ndim - 2))
    conjugate = jnp.conj(_spectrum(kernel))

    def correlate(x: Array, dy: Array) -> tuple[Array, Array]:
        d_spectrum = _spectrum(dy)
        return _signal(d_spectrum * conjugate, length), jnp.sum(jnp.conj(_spectrum(x)) * d_spectrum, axis=rows)

    if segments is None:
        dx, d_kernel = correlate(x, dy)
        return dx, _signal(d_kernel, length), None
    alone = (segments == _ALONE)[..., None]
    d_first = jnp.sum(jnp.where(alone, x * dy, 0), axis=(*rows, x.ndim - 2))
    zero = jnp.zeros_like(conjugate)

    def add(segment: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, d_kernel = sums
        here = (segments == segment)[..., None]
        more, more_kernel = correlate(jnp.where(here, x, 0), jnp.where(here, dy, 0))
        return jnp.where(here, more, dx), d_kernel + more_kernel

    start = (jnp.where(alone, kernel[0] * dy, 0), zero)
    dx, d_kernel = lax.fori_loop(*_range(segments), add, start)
    return dx, _signal(d_kernel, length).at[0].add(d_first), None


_convolution.defvjp(_forward, _backward)


def _spectrum(x: Float[Array, "*rows L H"]) -> Array:
    """Over time, which comes last here: [*rows, H, points / 2 + 1]."""
    return rfft(jnp.swapaxes(x, -1, -2), fast_size(2 * x.shape[-2] - 1))


def _signal(spectrum: Array, length: int) -> Float[Array, "*rows L H"]:
    signal = irfft(spectrum, fast_size(2 * length - 1))[..., :length]
    return jnp.swapaxes(signal, -1, -2)
