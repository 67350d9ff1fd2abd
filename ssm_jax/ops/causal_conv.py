"""Causal depthwise convolution with a few taps: y_t = activation(bias + sum_j kernel_j * x_{t-K+1+j}).

It is a recurrence whose state is the window of the last K-1 inputs. A tap that reaches across a document start reads zero.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ssm_jax.ops import dispatch
from ssm_jax.typing import Lengths, Reset


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
    arrays = (x_BLD, kernel_KD, bias_D, state.astype(wide), reset, lengths)
    if implementation == "reference":
        return reference(*arrays, activation=activation)
    return _differentiable(activation, implementation, *arrays)


def _activate(y: Array, activation: str | None) -> Array:
    return jax.nn.silu(y) if activation == "silu" else y


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
    taps, length = kernel.shape[0], x.shape[1]
    kernel, bias = kernel.astype(window.dtype), bias.astype(window.dtype)
    extended = jnp.concatenate([window, x.astype(window.dtype)], axis=1)
    reaches = _reaches(reset, taps, length)
    y = jnp.broadcast_to(bias, x.shape)
    for lag in range(taps):
        tap = taps - 1 - lag
        y += kernel[tap] * _masked(extended[:, tap : tap + length], reaches and reaches[lag])
    return _activate(y, activation).astype(x.dtype), _next_window(extended, reaches, lengths, taps, length)


def _reaches(reset: Array | None, taps: int, length: int) -> list[Bool[Array, "B L"]] | None:
    """[lag][b, t]: token t and the one ``lag`` before it are of one document. Beyond the row the window decides."""
    if reset is None:
        return None
    reaches = [jnp.ones_like(reset)]
    for lag in range(1, taps):
        starts = jnp.pad(reset, ((0, 0), (lag - 1, 0)))[:, :length]
        reaches.append(reaches[-1] & ~starts)
    return reaches


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def _next_window(extended: Array, reaches: list[Array] | None, lengths: Array | None, taps: int, length: int) -> Array:
    """The K-1 inputs that end with the last present one; what lies ``lag`` before it counts if it is of its document."""
    window = taps - 1
    if lengths is None:
        mask = None if reaches is None else jnp.stack([reaches[lag][:, -1] for lag in reversed(range(window))], axis=1)
        return _masked(extended[:, length:], mask)
    rows = lengths[:, None] + jnp.arange(window)
    kept = jnp.take_along_axis(extended, rows[..., None], axis=1)
    if reaches is None:
        return kept
    last = jnp.maximum(lengths - 1, 0)[:, None]
    mask = jnp.concatenate([jnp.take_along_axis(reaches[lag], last, axis=1) for lag in reversed(range(window))], axis=1)
    return _masked(kept, mask | (lengths == 0)[:, None])


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
    arrays: tuple[Array | None, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Array | None, ...]:
    """Keeps the inputs alone: the forward pass is cheaper to run again than its K shifted copies are to store."""
    del implementation
    differentiable, masks = arrays[:4], arrays[4:]
    _, pullback = jax.vjp(lambda *inputs: xla(*inputs, *masks, activation=activation), *differentiable)
    return *pullback(cotangents), None, None


_differentiable.defvjp(_forward, _backward)

dispatch.register("causal_conv", "reference", reference)
dispatch.register("causal_conv", "xla", xla)
