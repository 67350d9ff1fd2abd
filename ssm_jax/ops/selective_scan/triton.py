"""The selective scan for NVIDIA GPUs: how its Triton kernels are launched, split over the length, mapped over lanes and devices.

One program runs 32 channels of one lane (``TUNING``). Where lanes and channels are too few to fill the chip, the length is cut into
segments that run at once: first each one's decay and what it ends with from nothing (``segment_ends``), a second pass over x, dt
and B; then the scan itself, which begins every segment with what the segments before it, composed, make of the state.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ssm_jax.ops import lanes, triton_call
from ssm_jax.ops.mesh import Dimension, over_mesh
from ssm_jax.ops.selective_scan import triton_kernels as kernels
from ssm_jax.ops.selective_scan import xla
from ssm_jax.ops.selective_scan.inputs import Inputs


class Tuning(NamedTuple):
    """channels of a program, its warps, and tokens that are unrolled. From the compiled code (benchmarks/results/static.json)."""

    channels: int
    num_warps: int
    unroll: int


TUNING = {"forward": Tuning(32, 1, 4), "segment_ends": Tuning(32, 1, 4), "backward": Tuning(32, 1, 4)}
# 8 warps for each of an H200's 132 multiprocessors: what hides the latency of a scan's loads.
FILLING_PROGRAMS = 1056
MIN_SEGMENT = 256

_ROW: tuple[Dimension, ...] = ("lanes", None, "channels")
_MAP: tuple[Dimension, ...] = ("lanes", None, None)
_STATE: tuple[Dimension, ...] = ("lanes", None, "channels")
_STATES: tuple[Dimension, ...] = (None, "lanes", None, "channels")
_VECTOR: tuple[Dimension, ...] = ("lanes", "channels")
_INPUTS: tuple[tuple[Dimension, ...], ...] = (
    _ROW, _ROW, _STATE, _MAP, _MAP, _VECTOR, _ROW, _VECTOR, _STATE, ("lanes", None), ("lanes",),
)  # fmt: skip


def forward(inputs: Inputs, *, dt_softplus: bool, chunk_size: int) -> tuple[Array, Array, Array]:
    """y_BLE, the last state_BNE, and the states_KBNE that enter the chunks."""
    if inputs.state_BNE.dtype != jnp.float32:
        return xla.forward(inputs, dt_softplus=dt_softplus, chunk_size=chunk_size)
    core = functools.partial(_forward, dt_softplus=dt_softplus, chunk_size=chunk_size)
    folded = lanes.folding(core, (0,) * len(Inputs._fields), (0, 0, 1))
    y, state, states = over_mesh(folded, _INPUTS, (_ROW, _STATE, _STATES))(*_with_lanes(inputs))
    return y, state, states


def backward(
    inputs: Inputs, states_KBNE: Array, d_y_BLE: Array, d_state_BNE: Array, *, dt_softplus: bool, chunk_size: int
) -> Inputs:
    """Gradients with respect to ``inputs``, from the states that entered the chunks; None for reset and lengths."""
    if inputs.state_BNE.dtype != jnp.float32:
        return xla.backward(inputs, states_KBNE, d_y_BLE, d_state_BNE, dt_softplus=dt_softplus, chunk_size=chunk_size)
    core = functools.partial(_backward, dt_softplus=dt_softplus, chunk_size=chunk_size)
    folded = lanes.folding(core, (*(0,) * len(Inputs._fields), 1, 0, 0), (0,) * 9)

    def summed(*arrays: Array | None) -> tuple[Array, ...]:
        """Over the lanes of this device: parameters are shared."""
        d_x, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_state = folded(*arrays)
        return d_x, d_dt, d_A.sum(0), d_B, d_C, d_D.sum(0), d_z, d_bias.sum(0), d_state

    out = (_ROW, _ROW, _STATE[1:], _MAP, _MAP, _VECTOR[1:], _ROW, _VECTOR[1:], _STATE)
    sums: tuple[Dimension, ...] = (None, None, "lanes", "channels", "channels", "lanes", None, "lanes", None)
    mapped = over_mesh(summed, (*_INPUTS, _STATES, _ROW, _STATE), out, sums)
    gradients = mapped(*_with_lanes(inputs), states_KBNE, d_y_BLE, d_state_BNE)
    return Inputs._make((*(_like(d, array) for d, array in zip(gradients, inputs[:9], strict=True)), None, None))


def _like(d: Array, array: Any) -> Any:
    """The gradient of an input that is there, in its dtype."""
    return None if array is None else d.astype(array.dtype)


def _with_lanes(inputs: Inputs) -> Inputs:
    """Parameters get an axis of one lane, and resets a type that a kernel can load. B and C, which every program reads, are widened
    once instead of in each of them."""
    D, bias = (None if v is None else v[None] for v in (inputs.D_E, inputs.dt_bias_E))
    reset = None if inputs.reset_BL is None else inputs.reset_BL.astype(jnp.int8)
    B, C = inputs.B_BLN.astype(jnp.float32), inputs.C_BLN.astype(jnp.float32)
    return inputs._replace(A_NE=inputs.A_NE[None], B_BLN=B, C_BLN=C, D_E=D, dt_bias_E=bias, reset_BL=reset)


def _forward(*arrays: Any, dt_softplus: bool, chunk_size: int) -> tuple[Array, ...]:
    """``arrays`` are ``Inputs`` with a lane axis everywhere."""
    inputs = Inputs(*arrays)
    batch, length, channels = inputs.x_BLE.shape
    tuning = TUNING["forward"]
    chunks = -(-length // chunk_size)
    segment = _segment(batch, channels, chunks, chunk_size, tuning)
    decays, ends = _segment_ends(inputs, segment, dt_softplus, chunk_size, reverse=False)
    none = inputs.A_NE
    state = jax.ShapeDtypeStruct(inputs.state_BNE.shape, jnp.float32)
    pointers = [none if array is None else array for array in (*inputs, decays, ends)]
    y, last, states = triton_call.call(
        kernels.forward,
        pointers,
        [
            jax.ShapeDtypeStruct(inputs.x_BLE.shape, inputs.x_BLE.dtype),
            state,
            jax.ShapeDtypeStruct((chunks, *state.shape) if chunks > 1 else (1,), jnp.float32),
        ],
        grid=(-(-channels // tuning.channels), batch, -(-chunks // segment)),
        num_warps=tuning.num_warps,
        **_constants(inputs, tuning, segment, chunk_size, dt_softplus),
        HAS_D=inputs.D_E is not None,
        D_LANE=_lane_stride(inputs.D_E),
    )
    return y, last, states if chunks > 1 else inputs.state_BNE[None]


def _segment_ends(
    inputs: Inputs, segment: int, dt_softplus: bool, chunk_size: int, *, reverse: bool
) -> tuple[Array | None, Array | None]:
    """[S, lanes, N, E] twice; None where one segment is all."""
    batch, length, channels = inputs.x_BLE.shape
    segments = math.ceil(math.ceil(length / chunk_size) / segment)
    if segments == 1:
        return None, None
    tuning = TUNING["segment_ends"]
    none = inputs.A_NE
    maps = inputs.C_BLN if reverse else inputs.B_BLN
    arrays = (inputs.x_BLE, inputs.dt_BLE, inputs.A_NE, maps, inputs.z_BLE, inputs.dt_bias_E, *inputs[9:])
    states = jax.ShapeDtypeStruct((segments, *inputs.state_BNE.shape), jnp.float32)
    decays, ends = triton_call.call(
        kernels.segment_ends,
        [none if array is None else array for array in arrays],
        [states, states],
        grid=(-(-channels // tuning.channels), batch, segments),
        num_warps=tuning.num_warps,
        **_constants(inputs, tuning, segment, chunk_size, dt_softplus),
        REVERSE=reverse,
    )
    return decays, ends


def _backward(*arrays: Any, dt_softplus: bool, chunk_size: int) -> tuple[Array, ...]:
    """Gradients in the order of ``Inputs``, those of parameters per lane."""
    inputs = Inputs(*arrays[:11])
    states, d_y, d_last = arrays[11:]
    batch, length, channels = inputs.x_BLE.shape
    entries = inputs.B_BLN.shape[-1]
    tuning = TUNING["backward"]
    chunks = -(-length // chunk_size)
    segment = _segment(batch, channels, chunks, chunk_size, tuning)
    segments, blocks = -(-chunks // segment), -(-channels // tuning.channels)
    decays, ends = _segment_ends(inputs._replace(x_BLE=d_y), segment, dt_softplus, chunk_size, reverse=True)
    constants = _constants(inputs, tuning, segment, chunk_size, dt_softplus)
    none = inputs.A_NE
    pointers = (*inputs[:8], *inputs[9:], states, d_y, d_last, decays, ends)
    kept = (chunk_size // constants["UNROLL"], constants["NP"], tuning.channels)

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    d_row = jax.ShapeDtypeStruct(inputs.x_BLE.shape, inputs.x_BLE.dtype)
    d_x, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_state, _ = triton_call.call(
        kernels.backward,
        [none if array is None else array for array in pointers],
        [
            d_row,
            jax.ShapeDtypeStruct(d_row.shape, inputs.dt_BLE.dtype),
            float32(segments, batch, entries, channels),
            float32(blocks, batch, length, entries),
            float32(blocks, batch, length, entries),
            float32(segments, batch, channels),
            d_row if inputs.z_BLE is not None else float32(1),
            float32(segments, batch, channels),
            float32(batch, entries, channels),
            float32(segments * batch * blocks, *kept),
        ],
        grid=(blocks, batch, segments),
        num_warps=tuning.num_warps,
        **constants,
        HAS_D=inputs.D_E is not None,
        D_LANE=_lane_stride(inputs.D_E),
    )
    d_z = d_z if inputs.z_BLE is not None else jnp.zeros((batch, 1, 1), jnp.float32)
    return d_x, d_dt, d_A.sum(0), d_B.sum(0), d_C.sum(0), d_D.sum(0), d_z, d_bias.sum(0), d_state


def _segment(batch: int, channels: int, chunks: int, chunk_size: int, tuning: Tuning) -> int:
    """Chunks of a segment: all of them where there are programs enough."""
    programs = -(-channels // tuning.channels) * batch
    segments = min(-(-FILLING_PROGRAMS // programs), max(1, chunks * chunk_size // MIN_SEGMENT))
    return -(-chunks // segments)


def _constants(inputs: Inputs, tuning: Tuning, segment: int, chunk_size: int, dt_softplus: bool) -> dict[str, Any]:
    batch, length, channels = inputs.x_BLE.shape
    entries = inputs.B_BLN.shape[-1]
    return {
        "LANES": batch,
        "L": length,
        "E": channels,
        "N": entries,
        "NP": 1 << (entries - 1).bit_length(),
        "BE": tuning.channels,
        "CHUNK": chunk_size,
        "SEGMENT": segment,
        "UNROLL": math.gcd(tuning.unroll, chunk_size),
        "SOFTPLUS": dt_softplus,
        "RAGGED": inputs.lengths_B is not None or length % chunk_size != 0,
        "HAS_Z": inputs.z_BLE is not None,
        "HAS_BIAS": inputs.dt_bias_E is not None,
        "HAS_RESET": inputs.reset_BL is not None,
        "HAS_LENGTHS": inputs.lengths_B is not None,
        "A_LANE": _lane_stride(inputs.A_NE),
        "BIAS_LANE": _lane_stride(inputs.dt_bias_E),
    }


def _lane_stride(parameter: Array | None) -> int:
    return 0 if parameter is None or parameter.shape[0] == 1 else math.prod(parameter.shape[1:])
