"""The causal convolution as XLA operations: K shifted multiply-adds over the window and the inputs, one after the other."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from ssm_jax.ops.causal_conv.inputs import Inputs, activate, activation_slope
from ssm_jax.ops.resets import clear

_EXACT = lax.Precision.HIGHEST


def forward(inputs: Inputs, *, activation: str | None) -> tuple[Array, Array]:
    """y_BLD and the new window."""
    extended, context, kernel, bias = _prepare(inputs)
    y = _convolve(extended, context, kernel, bias)
    next_window = _next_window(extended, context, inputs.lengths, len(kernel))
    return activate(y, activation).astype(inputs.x_BLD.dtype), next_window


def backward(
    inputs: Inputs, d_y: Array, d_window: Array, *, activation: str | None
) -> tuple[Array, Array, Array, Array]:
    """Gradients of x, kernel, bias and window, in their dtypes."""
    x, lengths = inputs.x_BLD, inputs.lengths
    extended, context, kernel, bias = _prepare(inputs)
    taps, length = len(kernel), x.shape[1]
    slope = activation_slope(_convolve(extended, context, kernel, bias), activation)
    d_sum = d_y.astype(extended.dtype) * slope
    _, pull = jax.vjp(lambda extended: _next_window(extended, context, lengths, taps), extended)
    (d_extended,) = pull(d_window)
    margins = ((0, 0), (taps - 1, taps - 1))
    padded = jnp.pad(d_sum, (*margins, (0, 0)))
    padded_context = None if context is None else jnp.pad(context, margins)
    d_kernel = []
    for tap in range(taps):
        lag, start = taps - 1 - tap, taps - 1 - tap
        reaching = slice(start, start + length + taps - 1)
        within = None if padded_context is None else padded_context[:, reaching]
        d_extended += kernel[tap] * _within(within, lag, padded[:, reaching])
        d_kernel.append(
            jnp.einsum("btd,btd->d", _within(context, lag, d_sum), extended[:, tap : tap + length], precision=_EXACT)
        )
    return (
        d_extended[:, taps - 1 :].astype(x.dtype),
        jnp.stack(d_kernel).astype(inputs.kernel_KD.dtype),
        jnp.einsum("btd->d", d_sum).astype(inputs.bias_D.dtype),
        d_extended[:, : taps - 1],
    )


def _prepare(inputs: Inputs) -> tuple[Array, Array | None, Array, Array]:
    """The window and the inputs in one array, the context of each token, and the parameters in buffers of their own.

    A parameter that is sliced from a stack of layers would be fused, slice and all, into the loops that use it, which XLA:CPU
    does not vectorise then; a matmul with the identity is never fused.
    """
    x, kernel, bias, window, reset, lengths = inputs
    taps = len(kernel)
    parameters = jnp.concatenate([kernel, bias[None]]).astype(window.dtype)
    if x.shape[1] > 1:
        parameters = lax.dot(jnp.eye(taps + 1, dtype=window.dtype), parameters, precision=_EXACT)
    starts = None if reset is None else reset[:, 0] if lengths is None else reset[:, 0] & (lengths > 0)
    extended = jnp.concatenate([clear(window, starts), x.astype(window.dtype)], axis=1)
    return extended, None if reset is None else _context(reset, taps), parameters[:-1], parameters[-1]


def _convolve(extended: Array, context: Array | None, kernel: Array, bias: Array) -> Array:
    taps = len(kernel)
    length = extended.shape[1] - taps + 1
    y = bias
    for tap in range(taps):
        y = y + kernel[tap] * _within(context, taps - 1 - tap, extended[:, tap : tap + length])
    return y


def _context(reset: Array, taps: int) -> Int[Array, "B L"]:
    """How many of the K-1 tokens before each one are of its document; those before the row count, the window has them."""
    context, unbroken = jnp.zeros(reset.shape, jnp.int32), jnp.ones_like(reset)
    for lag in range(1, taps):
        unbroken &= ~jnp.pad(reset, ((0, 0), (lag - 1, 0)))[:, : reset.shape[1]]
        context += unbroken
    return context


def _within(context: Array | None, lag: int | Array, x: Array) -> Array:
    """x where ``lag`` tokens back is still the same document, else zero."""
    return x if context is None else jnp.where((lag <= context)[..., None], x, 0)


def _next_window(extended: Array, context: Array | None, lengths: Array | None, taps: int) -> Array:
    """The K-1 inputs that end with the last present one, of its document; the old window where none is present."""
    window = taps - 1
    lags = jnp.arange(window)[::-1]
    if lengths is None:
        return _within(None if context is None else context[:, -1:], lags, extended[:, extended.shape[1] - window :])
    rows = lengths[:, None] + jnp.arange(window)
    inputs = jnp.take_along_axis(extended, rows[..., None], axis=1)
    if context is None:
        return inputs
    last = jnp.take_along_axis(context, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    return _within(jnp.where(lengths[:, None] == 0, window, last), lags, inputs)
