"""The causal convolution for NVIDIA GPUs: how its Triton kernels are launched, cut over the length, mapped over lanes and devices.

One program runs a few channels of one lane through a segment of the length: as long a one as still leaves programs enough to fill
the chip, because every segment reads K-1 tokens around it again, and leaves its own parts of the parameters' gradients.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ssm_jax.ops import lanes, triton_call
from ssm_jax.ops.causal_conv import triton_kernels as kernels
from ssm_jax.ops.causal_conv import xla
from ssm_jax.ops.causal_conv.inputs import Inputs
from ssm_jax.ops.mesh import Dimension, over_mesh


class Tuning(NamedTuple):
    """Channels of a program, its warps, and tokens that are unrolled. From the compiled code (benchmarks/results/static.json)."""

    channels: int
    num_warps: int
    unroll: int


# By the bytes of an input. More taps than 4 take half the channels, for the registers.
TUNING = {
    ("forward", 2): Tuning(256, 1, 4),
    ("forward", 4): Tuning(128, 1, 4),
    ("backward", 2): Tuning(128, 1, 8),
    ("backward", 4): Tuning(128, 1, 4),
}
# 15 warps for each of an H200's 132 multiprocessors: those that the backward pass has registers for.
RESIDENT_PROGRAMS = 1980
MIN_SEGMENT = 32
# What a segment costs besides its tokens, in tokens: those around it, and its parts of the parameters' gradients.
SEGMENT_OVERHEAD = 16

_ROW: tuple[Dimension, ...] = ("lanes", None, "channels")
_VECTOR: tuple[Dimension, ...] = ("lanes", "channels")
_INPUTS: tuple[tuple[Dimension, ...], ...] = (_ROW, _ROW, _VECTOR, _ROW, ("lanes", None), ("lanes",))


def forward(inputs: Inputs, *, activation: str | None) -> tuple[Array, Array]:
    """y_BLD and the new window."""
    if not _suits(inputs):
        return xla.forward(inputs, activation=activation)
    folded = lanes.folding(functools.partial(_forward, activation=activation), (0,) * 6, (0, 0))
    y, window = over_mesh(folded, _INPUTS, (_ROW, _ROW))(*_with_lanes(inputs))
    return y, window


def backward(
    inputs: Inputs, d_y: Array, d_window: Array, *, activation: str | None
) -> tuple[Array, Array, Array, Array]:
    """Gradients of x, kernel, bias and window, in their dtypes."""
    if not _suits(inputs):
        return xla.backward(inputs, d_y, d_window, activation=activation)
    folded = lanes.folding(functools.partial(_backward, activation=activation), (0,) * 8, (0,) * 4)

    def summed(*arrays: Array | None) -> tuple[Array, ...]:
        """Over the lanes of this device: parameters are shared."""
        d_x, d_kernel, d_bias, d_old = folded(*arrays)
        return d_x, d_kernel.sum(0), d_bias.sum(0), d_old

    sums: tuple[Dimension, ...] = (None, "lanes", "lanes", None)
    mapped = over_mesh(summed, (*_INPUTS, _ROW, _ROW), (_ROW, _ROW[1:], _VECTOR[1:], _ROW), sums)
    d_x, d_kernel, d_bias, d_old = mapped(*_with_lanes(inputs), d_y, d_window)
    return d_x, d_kernel.astype(inputs.kernel_KD.dtype), d_bias.astype(inputs.bias_D.dtype), d_old


def _suits(inputs: Inputs) -> bool:
    """Not double precision, and not one tap, which is no convolution: XLA's fusion is all it needs."""
    return inputs.window.dtype == jnp.float32 and len(inputs.kernel_KD) > 1


def _with_lanes(inputs: Inputs) -> Inputs:
    """Parameters get an axis of one lane, and resets a type that a kernel can load."""
    reset = None if inputs.reset is None else inputs.reset.astype(jnp.int8)
    return inputs._replace(kernel_KD=inputs.kernel_KD[None], bias_D=inputs.bias_D[None], reset=reset)


def _forward(*arrays: Any, activation: str | None) -> tuple[Array, ...]:
    """``arrays`` are ``Inputs`` with a lane axis everywhere."""
    inputs = Inputs(*arrays)
    x, window = inputs.x_BLD, inputs.window
    grid, tuning, constants = _launch("forward", inputs, activation)
    return triton_call.call(
        kernels.forward,
        [x if array is None else array for array in inputs],
        [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(window.shape, jnp.float32)],
        grid=grid,
        num_warps=tuning.num_warps,
        **constants,
    )


def _backward(*arrays: Any, activation: str | None) -> tuple[Array, ...]:
    """Gradients of x, kernel, bias and window, those of parameters per lane."""
    inputs = Inputs(*arrays[:6])
    x, window = inputs.x_BLD, inputs.window
    batch, _, width = x.shape
    taps = inputs.kernel_KD.shape[1]
    grid, tuning, constants = _launch("backward", inputs, activation)
    d_x, d_kernel, d_bias, d_window = triton_call.call(
        kernels.backward,
        [x if array is None else array for array in arrays],
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((grid[2], batch, taps, width), jnp.float32),
            jax.ShapeDtypeStruct((grid[2], batch, width), jnp.float32),
            jax.ShapeDtypeStruct(window.shape, jnp.float32),
        ],
        grid=grid,
        num_warps=tuning.num_warps,
        **constants,
        LANES=batch,
    )
    return d_x, d_kernel.sum(0), d_bias.sum(0), d_window


def _launch(name: str, inputs: Inputs, activation: str | None) -> tuple[tuple[int, int, int], Tuning, dict[str, Any]]:
    """The grid, and what both kernels are compiled for."""
    batch, length, width = inputs.x_BLD.shape
    taps = inputs.kernel_KD.shape[1]
    tuning = TUNING[name, inputs.x_BLD.dtype.itemsize]
    if taps > 4:
        tuning = tuning._replace(channels=tuning.channels // 2)
    blocks = -(-width // tuning.channels)
    segment = _segment(blocks * batch, length, tuning.unroll)
    return (
        (blocks, batch, -(-length // segment)),
        tuning,
        {
            "L": length,
            "E": width,
            "K": taps,
            "BE": tuning.channels,
            "SEGMENT": segment,
            "UNROLL": tuning.unroll,
            "REST": min(2, length),
            "SILU": activation == "silu",
            "HAS_RESET": inputs.reset is not None,
            "HAS_LENGTHS": inputs.lengths is not None,
            "KERNEL_LANE": _lane_stride(inputs.kernel_KD),
            "BIAS_LANE": _lane_stride(inputs.bias_D),
        },
    )


def _segment(programs: int, length: int, unroll: int) -> int:
    """Tokens of a segment, so that the waves in which programs run take the fewest tokens one after the other."""

    def tokens(segments: int) -> int:
        return -(-programs * segments // RESIDENT_PROGRAMS) * (-(-length // segments) + SEGMENT_OVERHEAD)

    segments = min(range(1, max(1, length // MIN_SEGMENT) + 1), key=tokens)
    segment = -(-length // segments)
    return segment if segments == 1 else -(-segment // unroll) * unroll


def _lane_stride(parameter: Array) -> int:
    return 0 if parameter.shape[0] == 1 else math.prod(parameter.shape[1:])
