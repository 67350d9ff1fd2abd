"""Causal depthwise convolution with a few taps: y_t = activation(bias + sum_j kernel_j * x_{t-K+1+j}).

It is a recurrence whose state is the window of the last K-1 inputs. A tap that reaches across a document start reads zero.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ssm_jax.ops import dispatch
from ssm_jax.ops.resets import clear
from ssm_jax.typing import Lengths, Reset

_EXACT = lax.Precision.HIGHEST


def causal_conv(
    x_BLD: Float[Array, "B L D"],
    kernel_KD: Float[Array, "K D"],
    bias_D: Float[Array, "D"] | None = None,
    state: Float[Array, "B K-1 D"] | None = None,
    reset: Reset | None = None,
    *,
    lengths: Lengths | None = None,
    activation: Literal["silu"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B K-1 D"]]:
    """Convolves each channel with its own taps; ``kernel_KD[K-1]`` multiplies the current token.

    Args:
        state: the window: the last K-1 inputs before the call, oldest first. None: zeros.
        reset: True marks the first token of a document; taps that reach further back read zero.
        lengths: tokens per row; those after are absent, leave the window untouched, and have undefined outputs.
        activation: "silu" multiplies the result by its sigmoid.

    Returns:
        y in x's dtype, computed in float32, and the new window in float32: the last K-1 present inputs, with zeros instead of
        inputs of an earlier document than the last one's.

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
    """
    batch, _, width = x_BLD.shape
    wide = jnp.promote_types(x_BLD.dtype, jnp.float32)
    if bias_D is None:
        bias_D = jnp.zeros((width,), wide)
    if state is None:
        state = jnp.zeros((batch, kernel_KD.shape[0] - 1, width), wide)
    starts = None if reset is None else reset[:, 0] if lengths is None else reset[:, 0] & (lengths > 0)
    window = clear(state.astype(wide), starts)
    arrays = (x_BLD, kernel_KD, bias_D, window, reset, lengths)
    if implementation == "reference":
        return reference(*arrays, activation=activation)
    return _differentiable(activation, implementation, *arrays)


def _activate(y: Array, activation: str | None) -> Array:
    return y / (1 + jnp.exp(-y)) if activation == "silu" else y


def _activation_slope(y: Array, activation: str | None) -> Array | float:
    if activation is None:
        return 1.0
    sigmoid = 1 / (1 + jnp.exp(-y))
    return sigmoid * (1 + y * (1 - sigmoid))


def reference(
    x: Array,
    kernel: Array,
    bias: Array,
    window: Array,
    reset: Array | None,
    lengths: Array | None,
    *,
    activation: str | None,
) -> tuple[Array, Array]:
    """One token after the other, the window sliding along."""
    batch, length, _ = x.shape
    kernel, bias = kernel.astype(window.dtype), bias.astype(window.dtype)
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    lengths = jnp.full((batch,), length) if lengths is None else lengths

    def step(window: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x_t, reset_t, present_t = inputs
        kept = jnp.where(reset_t[:, None, None], 0, window)
        taps = jnp.concatenate([kept, x_t[:, None].astype(window.dtype)], axis=1)
        y_t = _activate(jnp.sum(taps * kernel, axis=1) + bias, activation)
        return jnp.where(present_t[:, None, None], taps[:, 1:], window), y_t

    present = jnp.arange(length) < lengths[:, None]
    window, y = lax.scan(step, window, (jnp.moveaxis(x, 1, 0), reset.T, present.T))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), window


def xla(
    x: Array,
    kernel: Array,
    bias: Array,
    window: Array,
    reset: Array | None,
    lengths: Array | None,
    *,
    activation: str | None,
) -> tuple[Array, Array]:
    """K shifted multiply-adds over the window and the inputs, one after the other."""
    extended, context, kernel, bias = _prepare(x, kernel, bias, window, reset)
    y = _convolve(extended, context, kernel, bias)
    return _activate(y, activation).astype(x.dtype), _next_window(extended, context, lengths, len(kernel))


def _prepare(
    x: Array, kernel: Array, bias: Array, window: Array, reset: Array | None
) -> tuple[Array, Array | None, Array, Array]:
    """The window and the inputs in one array, the context of each token, and the parameters in buffers of their own.

    A parameter that is sliced from a stack of layers would be fused, slice and all, into the loops that use it, which XLA:CPU
    does not vectorise then; a matmul with the identity is never fused.
    """
    taps = len(kernel)
    parameters = jnp.concatenate([kernel, bias[None]]).astype(window.dtype)
    if x.shape[1] > 1:
        parameters = lax.dot(jnp.eye(taps + 1, dtype=window.dtype), parameters, precision=_EXACT)
    extended = jnp.concatenate([window, x.astype(window.dtype)], axis=1)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(activation: str | None, implementation: str | None, *arrays: Array | None) -> tuple[Array, Array]:
    return dispatch.call("causal_conv", implementation, *arrays, activation=activation)


def _forward(
    activation: str | None, implementation: str | None, *arrays: Array | None
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    return _differentiable(activation, implementation, *arrays), arrays


def _backward(
    activation: str | None,
    implementation: str | None,
    arrays: tuple[Any, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Array | None, ...]:
    """Keeps the inputs alone: the forward pass is cheaper to run again than its K shifted copies are to store."""
    del implementation
    x, kernel, bias, window, reset, lengths = arrays
    d_y, d_window = cotangents
    extended, context, wide_kernel, wide_bias = _prepare(x, kernel, bias, window, reset)
    taps, length = len(kernel), x.shape[1]
    slope = _activation_slope(_convolve(extended, context, wide_kernel, wide_bias), activation)
    d_sum = d_y.astype(window.dtype) * slope
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
        d_extended += wide_kernel[tap] * _within(within, lag, padded[:, reaching])
        d_kernel.append(
            jnp.einsum("btd,btd->d", _within(context, lag, d_sum), extended[:, tap : tap + length], precision=_EXACT)
        )
    return (
        d_extended[:, taps - 1 :].astype(x.dtype),
        jnp.stack(d_kernel).astype(kernel.dtype),
        jnp.einsum("btd->d", d_sum).astype(bias.dtype),
        d_extended[:, : taps - 1],
        None,
        None,
    )


_differentiable.defvjp(_forward, _backward)

dispatch.register("causal_conv", "reference", reference)
dispatch.register("causal_conv", "xla", xla)
