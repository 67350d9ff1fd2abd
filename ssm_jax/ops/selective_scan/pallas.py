"""The selective scan on a TPU: every state entry of 1024 channels is one register, and a token a few instructions for each.

Programs run over lanes and blocks of channels side by side, and over time one after the other, states in fast memory between them.
The arrays of the caller are read and written as they are, in their own dtype; only a number of channels that is no multiple of 128,
or a chunk that is none of 16 tokens, costs a copy. What is summed over channels or lanes is written once per
block of channels, or lane, and added up afterwards: the same in every run.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssm_jax.ops.lanes import folding
from ssm_jax.ops.mesh import Dimension, over_mesh
from ssm_jax.ops.selective_scan import xla
from ssm_jax.ops.selective_scan.inputs import Inputs
from ssm_jax.ops.selective_scan.pallas_kernels import (
    COLUMNS,
    PITCH,
    ROWS,
    TOGETHER,
    Plan,
    backward_kernel,
    forward_kernel,
)
from ssm_jax.ops.tpu import LANES, SUBLANES, ChannelBlocks, channel_blocks, compiled_or_interpreted, fill

MOST_TOKENS = 256
"""Of one step of a program, whose arrays are loaded while those of the step before are worked on."""
MOST_BYTES_OF_STATES = 16 * 2**20
"""Of one chunk's states, which the backward pass holds in fast memory."""
FAST_MEMORY = 60 * 2**20

Dimensions = tuple[Dimension, ...]
SEQUENCE: Dimensions = ("lanes", None, "channels")
MAP: Dimensions = ("lanes", None, None)
CHANNEL: Dimensions = ("lanes", "channels")
KEPT_STATES: Dimensions = (None, "lanes", None, "channels")
DIMENSIONS: dict[str, Dimensions] = {
    "x_BLE": SEQUENCE,
    "dt_BLE": SEQUENCE,
    "A_NE": SEQUENCE,
    "B_BLN": MAP,
    "C_BLN": MAP,
    "D_E": CHANNEL,
    "z_BLE": SEQUENCE,
    "dt_bias_E": CHANNEL,
    "state_BNE": SEQUENCE,
    "reset_BL": ("lanes", None),
    "lengths_B": ("lanes",),
}
"""Of every input, parameters with an axis for the lane before."""


def forward(inputs: Inputs, *, dt_softplus: bool, chunk_size: int) -> tuple[Array, Array, Array]:
    """y_BLE, the last state_BNE, and the states_KBNE that enter the chunks. What no kernel is written for runs ``xla``."""
    if not _suits(inputs, chunk_size):
        return xla.forward(inputs, dt_softplus=dt_softplus, chunk_size=chunk_size)
    function = functools.partial(_forward, softplus=dt_softplus, chunk=chunk_size)
    out_dimensions = (SEQUENCE, SEQUENCE, KEPT_STATES)
    run = folding(over_mesh(function, tuple(DIMENSIONS.values()), out_dimensions), [0] * len(inputs), (0, 0, 1))
    y, state, states = run(*_per_lane(inputs))
    return y, state, states


def backward(
    inputs: Inputs, states_KBNE: Array, d_y_BLE: Array, d_state_BNE: Array, *, dt_softplus: bool, chunk_size: int
) -> Inputs:
    """Gradients with respect to ``inputs``, from the states that entered the chunks; None for reset and lengths."""
    if not _suits(inputs, chunk_size):
        return xla.backward(inputs, states_KBNE, d_y_BLE, d_state_BNE, dt_softplus=dt_softplus, chunk_size=chunk_size)
    names = [
        name
        for name, value in zip(Inputs._fields, inputs, strict=True)
        if value is not None and name not in ("reset_BL", "lengths_B")
    ]
    function = functools.partial(_backward, names=names, softplus=dt_softplus, chunk=chunk_size)
    run = over_mesh(
        function,
        (*DIMENSIONS.values(), KEPT_STATES, SEQUENCE, SEQUENCE),
        [DIMENSIONS[name] for name in names],
        ["channels" if name in ("B_BLN", "C_BLN") else None for name in names],
    )
    folded = folding(run, (*[0] * len(inputs), 1, 0, 0), [0] * len(names))
    found = folded(*_per_lane(inputs), states_KBNE, d_y_BLE, d_state_BNE)
    gradients = dict(zip(names, found, strict=True))
    summed: dict[str, Any] = {
        name: gradients[name].sum(0) for name in ("A_NE", "D_E", "dt_bias_E") if name in gradients
    }
    absent: dict[str, Any] = dict.fromkeys(Inputs._fields)
    return Inputs(**{**absent, **gradients, **summed})


def _suits(inputs: Inputs, chunk_size: int) -> bool:
    """One token is a closed form for the compiler; registers hold 32 bits; a chunk's states fit, and its tokens in 128 lanes."""
    sequences = [inputs.x_BLE, inputs.dt_BLE, inputs.z_BLE]
    length, entries = inputs.x_BLE.shape[1], inputs.A_NE.shape[0]
    return (
        length > 1
        and inputs.state_BNE.dtype == jnp.float32
        and all(v is None or v.dtype in (jnp.float32, jnp.bfloat16) for v in sequences)
        and chunk_size <= LANES
        and chunk_size * entries * SUBLANES * LANES * 4 <= MOST_BYTES_OF_STATES
    )


def _per_lane(inputs: Inputs) -> Inputs:
    """Parameters as those of one lane, which stands for all."""
    D, dt_bias = (None if v is None else v[None] for v in (inputs.D_E, inputs.dt_bias_E))
    return inputs._replace(A_NE=inputs.A_NE[None], D_E=D, dt_bias_E=dt_bias)


def _forward(*arrays: Any, softplus: bool, chunk: int) -> tuple[Array, Array, Array]:
    inputs = Inputs(*arrays)
    batch, length, channels = inputs.x_BLE.shape
    plan, blocks, steps = _plan(inputs, softplus, chunk)
    given = _operands(inputs, plan, blocks, steps)
    outputs = {
        "y": jax.ShapeDtypeStruct(given["x"].shape, inputs.x_BLE.dtype),
        "last": jax.ShapeDtypeStruct(given["state"].shape, jnp.float32),
        "states": jax.ShapeDtypeStruct((steps * plan.chunks, batch, plan.entries, blocks.channels), jnp.float32),
    }
    tile = (ROWS * PITCH, LANES)
    scratch = {"dt_scratch": tile, "u_scratch": tile, "y_scratch": tile, "bc_scratch": (plan.columns, ROWS, LANES)}
    if plan.resets:
        scratch["kept_scratch"] = (1, ROWS, LANES)
    found = _call(forward_kernel, plan, blocks, steps, given, outputs, scratch, backwards=False)
    y = _without_filling(found["y"], plan, length, channels)
    return y, _unpack_state(found["last"], plan, blocks, channels), found["states"][..., :channels]


def _backward(*arrays: Any, names: Sequence[str], softplus: bool, chunk: int) -> tuple[Array, ...]:
    *given_inputs, states, d_y, d_state = arrays
    inputs = Inputs(*given_inputs)
    batch, length, channels = inputs.x_BLE.shape
    plan, blocks, steps = _plan(inputs, softplus, chunk)
    given = _operands(inputs._replace(state_BNE=d_state), plan, blocks, steps)
    given["d_last"] = given.pop("state")
    given["states"] = fill(states, 3, blocks.channels)
    given["d_y"] = _filled(d_y, plan, blocks.channels)
    places, rows = given["x"].shape[1], plan.entry_rows

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    outputs = {
        **{f"d_{name}": jax.ShapeDtypeStruct(given[name].shape, given[name].dtype) for name in ("x", "dt")},
        "d_A": float32(batch, *given["A"].shape[1:]),
        "d_bc": float32(batch, blocks.number, steps * plan.chunks, 2 * rows, LANES),
        "s": float32(batch, blocks.number, places, LANES),
        "d_state": float32(*given["d_last"].shape),
    }
    if "z" in given:
        outputs["d_z"] = jax.ShapeDtypeStruct(given["z"].shape, given["z"].dtype)
    for name in {"D", "dt_bias"} & given.keys():
        outputs[f"d_{name}"] = float32(batch, SUBLANES, blocks.channels)
    chunk_tokens = (plan.filled * PITCH, LANES)
    scratch = {
        "h": (rows * PITCH, LANES),
        "p": (plan.filled * plan.entries, blocks.groups, LANES),
        **dict.fromkeys(("dt_scratch", "u_scratch", "dy_scratch", "d_dt_scratch", "d_u_scratch"), chunk_tokens),
        "y_scratch": (ROWS * PITCH, LANES),
        "bc_scratch": (plan.filled // ROWS * plan.columns, ROWS, LANES),
        "products": (ROWS * 2 * TOGETHER * PITCH, LANES),
    }
    if plan.resets:
        scratch["kept_scratch"] = (plan.filled // ROWS, ROWS, LANES)
    found = _call(backward_kernel, plan, blocks, steps, given, outputs, scratch, backwards=True)
    cut = functools.partial(_without_filling, plan=plan, length=length, channels=channels)
    d_A = jnp.moveaxis(found["d_A"], 1, 2).reshape(batch, plan.entries, -1)[..., :channels]
    # [B, block, K, (B and C, n), token] to twice [B, L, n].
    d_bc = found["d_bc"].sum(1).reshape(batch, -1, 2, rows, LANES)[:, :, :, : plan.entries, :chunk]
    d_bc = jnp.moveaxis(d_bc, (1, 4), (2, 3)).reshape(batch, 2, -1, plan.entries)[:, :, :length]
    s = cut(found["s"].sum((1, 3))[..., None], channels=1)
    gradients = {
        "x_BLE": cut(found["d_x"]),
        "dt_BLE": cut(found["d_dt"]),
        "A_NE": d_A,
        "B_BLN": d_bc[:, 0].astype(inputs.B_BLN.dtype),
        "C_BLN": (d_bc[:, 1] + s * inputs.B_BLN).astype(inputs.C_BLN.dtype),
        **({"z_BLE": cut(found["d_z"])} if "z" in given else {}),
        **{f"{name}_E": found[f"d_{name}"].sum(1)[:, :channels] for name in {"D", "dt_bias"} & given.keys()},
        "state_BNE": _unpack_state(found["d_state"], plan, blocks, channels),
    }
    return tuple(gradients[name] for name in names)


def _plan(inputs: Inputs, softplus: bool, chunk: int) -> tuple[Plan, ChannelBlocks, int]:
    length, channels = inputs.x_BLE.shape[1:]
    filled = -(-chunk // ROWS) * ROWS
    count = -(-length // chunk)
    together = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * filled <= MOST_TOKENS))
    blocks = channel_blocks(channels)
    resets = inputs.reset_BL is not None
    masked = inputs.lengths_B is not None or count * filled != length
    plan = Plan(inputs.A_NE.shape[1], blocks.groups, chunk, filled, together, softplus, resets, masked, compiled=True)
    return plan, blocks, count // together


def _operands(inputs: Inputs, plan: Plan, blocks: ChannelBlocks, steps: int) -> dict[str, Array]:
    """What both kernels read, filled up to whole chunks and blocks of channels."""
    batch, length, _ = inputs.x_BLE.shape
    maps = [inputs.B_BLN, inputs.C_BLN, *([] if inputs.reset_BL is None else [inputs.reset_BL[..., None]])]
    A = fill(inputs.A_NE / math.log(2), 2, blocks.channels)
    lengths = jnp.full(batch, length) if inputs.lengths_B is None else inputs.lengths_B
    operands = {
        "lengths": lengths.astype(jnp.int32),
        "x": _filled(inputs.x_BLE, plan, blocks.channels),
        "dt": _filled(inputs.dt_BLE, plan, blocks.channels),
        "z": None if inputs.z_BLE is None else _filled(inputs.z_BLE, plan, blocks.channels),
        "bc": _in_parts(_filled(jnp.concatenate([v.astype(jnp.float32) for v in maps], axis=2), plan)),
        "masks": jnp.asarray(-(np.arange(LANES) % COLUMNS == np.arange(COLUMNS)[:, None]).astype(np.int32)),
        "A": jnp.moveaxis(A.reshape(*A.shape[:2], blocks.number, blocks.groups, LANES), 2, 1),
        "D": None if inputs.D_E is None else fill(inputs.D_E, 1, blocks.channels)[:, None],
        "dt_bias": None if inputs.dt_bias_E is None else fill(inputs.dt_bias_E, 1, blocks.channels)[:, None],
        "state": _pack_state(inputs.state_BNE, plan, blocks),
    }
    return {name: array for name, array in operands.items() if array is not None}


def _in_parts(v: Array) -> Array:
    """Every number as the sum of three of bfloat16: 128 lanes hold the first, second and third parts of ``COLUMNS`` columns."""
    v = fill(v, 2, -(-v.shape[2] // COLUMNS) * COLUMNS)
    parts = []
    for _ in range(3):
        # Not a conversion there and back, which the compiler may leave out.
        parts.append(jax.lax.reduce_precision(v, exponent_bits=8, mantissa_bits=7))
        v = v - parts[-1]
    stacked = jnp.stack([part.reshape(*v.shape[:2], -1, COLUMNS) for part in parts], axis=3)
    stacked = fill(stacked.reshape(*v.shape[:2], -1, 3 * COLUMNS), 3, LANES)
    return stacked.reshape(*v.shape[:2], -1).astype(jnp.bfloat16)


def _filled(v: Array, plan: Plan, channels: int | None = None) -> Array:
    """Each chunk of a sequence filled up to whole tiles, the last one to a whole chunk before."""
    batch, length, size = v.shape
    count = -(-length // plan.chunk)
    v = fill(fill(v, 1, count * plan.chunk), 2, channels or size)
    if plan.filled == plan.chunk:
        return v
    return fill(v.reshape(batch, count, plan.chunk, -1), 2, plan.filled).reshape(batch, count * plan.filled, -1)


def _without_filling(v: Array, plan: Plan, length: int, channels: int) -> Array:
    if plan.filled != plan.chunk:
        v = v.reshape(v.shape[0], -1, plan.filled, v.shape[2])[:, :, : plan.chunk].reshape(v.shape[0], -1, v.shape[2])
    return v[:, :length, :channels]


def _pack_state(state_BNE: Array, plan: Plan, blocks: ChannelBlocks) -> Array:
    """[B, N, E] to [B, block, (n, group), 128], with ``PITCH`` rows for every entry."""
    batch, entries, _ = state_BNE.shape
    v = fill(state_BNE, 2, blocks.channels).reshape(batch, entries, blocks.number, blocks.groups, LANES)
    v = fill(fill(jnp.moveaxis(v, 2, 1), 3, PITCH), 2, plan.entry_rows)
    return v.reshape(batch, blocks.number, -1, LANES)


def _unpack_state(v: Array, plan: Plan, blocks: ChannelBlocks, channels: int) -> Array:
    v = v.reshape(v.shape[0], blocks.number, -1, PITCH, LANES)[:, :, : plan.entries, : blocks.groups]
    return jnp.moveaxis(v, 1, 2).reshape(v.shape[0], plan.entries, -1)[..., :channels]


def _call(
    kernel: Callable[[Plan, dict[str, Any]], None],
    plan: Plan,
    blocks: ChannelBlocks,
    steps: int,
    given: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, tuple[int, ...]],
    *,
    backwards: bool,
) -> dict[str, Array]:
    """The kernel over (lane, block of channels, step of time), its references by name."""
    names = [*given, *outputs, *scratch]

    def run(*arrays: Array, interpret: bool) -> list[Array]:
        def body(*refs: Any) -> None:
            kernel(plan._replace(compiled=not interpret), dict(zip(names, refs, strict=True)))

        def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
            return _block(name, shape, plan, blocks, (lambda c: steps - 1 - c) if backwards else (lambda c: c))

        call = pl.pallas_call(
            body,
            out_shape=list(outputs.values()),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(given["x"].shape[0], blocks.number, steps),
                in_specs=[spec(name, array.shape) for name, array in given.items() if name != "lengths"],
                out_specs=[spec(name, out.shape) for name, out in outputs.items()],
                scratch_shapes=[
                    pltpu.VMEM(shape, jnp.int32 if name == "kept_scratch" else jnp.float32)
                    for name, shape in scratch.items()
                ],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=FAST_MEMORY
            ),
            interpret=interpret,
        )
        return list(call(*arrays))

    found = compiled_or_interpreted(run, *given.values())
    return dict(zip(outputs, found, strict=True))


def _block(
    name: str, shape: tuple[int, ...], plan: Plan, blocks: ChannelBlocks, at: Callable[[Any], Any]
) -> pl.BlockSpec:
    """Which part of an array a program's step sees. Its first axis are the lanes, where 1 may stand for all; ``at`` turns time."""

    def index(*rest: Callable[[Any, Any], Any]) -> Callable[..., tuple[Any, ...]]:
        return lambda b, e, c, _: (b if shape[0] > 1 else 0, *(part(e, at(c)) for part in rest))

    def zero(e: Any, c: Any) -> int:
        return 0

    def block(e: Any, c: Any) -> Any:
        return e

    def step(e: Any, c: Any) -> Any:
        return c

    if name in ("x", "dt", "z", "y", "d_x", "d_dt", "d_z", "d_y"):
        return pl.BlockSpec((None, plan.places, blocks.size), index(step, block))
    if name == "bc":
        return pl.BlockSpec((None, plan.places, shape[2]), index(step, zero))
    if name == "masks":
        return pl.BlockSpec(shape, lambda b, e, c, _: (0, 0))
    if name == "s":
        return pl.BlockSpec((None, None, plan.places, LANES), index(block, step, zero))
    if name == "d_bc":
        return pl.BlockSpec((None, None, plan.chunks, *shape[3:]), index(block, step, zero, zero))
    if name == "states":
        return pl.BlockSpec((plan.chunks, None, plan.entries, blocks.size), lambda b, e, c, _: (at(c), b, 0, e))
    if name in ("D", "dt_bias", "d_D", "d_dt_bias"):
        return pl.BlockSpec((None, shape[1], blocks.size), index(zero, block))
    return pl.BlockSpec((None, None, *shape[2:]), index(block, *[zero] * (len(shape) - 2)))
