"""Linear attention with scalar decays for NVIDIA GPUs: how its Triton kernels are launched, split over the length, and mapped.

One program runs a block of a head's values with the whole state of that block in registers (``_tuning``). Where heads, lanes and
blocks are too few to fill the chip, the length is cut into segments, as in ``selective_scan.triton``.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ssm_jax.ops import lanes, triton_call
from ssm_jax.ops.linear_attention import triton_kernels as kernels
from ssm_jax.ops.linear_attention import xla
from ssm_jax.ops.mesh import Dimension, over_mesh


class Tuning(NamedTuple):
    """tokens of a chunk, keys of a tile of the state, values of a program, and its warps."""

    chunk: int
    keys: int
    values: int
    num_warps: int


# By what decays are (a constant per head, or one per token) and the number of keys, up to and including; from the compiled code
# (benchmarks/results/static.json): no spills up to 128 keys. The two gradients of decays per token share their chunks.
TUNING: dict[tuple[str, bool], dict[int, Tuning]] = {
    ("forward", True): {64: Tuning(64, 64, 64, 4), 128: Tuning(64, 128, 64, 8), 256: Tuning(64, 128, 64, 8)},
    ("forward", False): {64: Tuning(64, 64, 64, 8), 128: Tuning(64, 128, 32, 8), 256: Tuning(64, 128, 64, 8)},
    ("queries", True): {64: Tuning(64, 64, 64, 4), 128: Tuning(64, 128, 64, 8), 256: Tuning(64, 128, 64, 8)},
    ("keys", True): {64: Tuning(64, 64, 64, 4), 128: Tuning(32, 128, 64, 8), 256: Tuning(32, 128, 32, 4)},
    ("queries", False): {64: Tuning(32, 64, 64, 4), 128: Tuning(32, 128, 32, 4)},
    ("keys", False): {64: Tuning(32, 64, 64, 4), 128: Tuning(32, 128, 32, 8)},
}
WIDE = Tuning(32, 128, 32, 8)
# Float32 products are exact rather than fast, and not for tensor cores.
FLOAT32 = Tuning(16, 64, 32, 4)
# Two programs for each of an H200's 132 multiprocessors.
FILLING_PROGRAMS = 264
MIN_SEGMENT = 512

_Dimensions = tuple[Dimension, ...]
_KEYS: _Dimensions = ("lanes", None, "channels", None)
_VALUES, _SCALARS = _KEYS, _KEYS[:3]
_HEADS: _Dimensions = ("lanes", "channels")
_STATE: _Dimensions = ("lanes", "channels", None, None)
_INPUTS = 9


def forward(*inputs: Any, chunk_size: int) -> tuple[Array, Array]:
    """y_BLHP and the last state_BHNP."""
    if inputs[5].dtype != jnp.float32:
        return xla.forward(*inputs, chunk_size=chunk_size)
    core = functools.partial(_forward, kind=inputs[2].dtype, chunk_size=chunk_size)
    folded = lanes.folding(core, (0,) * _INPUTS, (0, 0))
    y, last = over_mesh(folded, _dimensions(inputs), (_VALUES, _STATE))(*_prepared(inputs))
    return y, last


def backward(*arrays: Any, chunk_size: int) -> tuple[Array, ...]:
    """Gradients of q, k, v, the gains, the log decays, the state and the skip; where decays are constants, zeros of them and of the
    gains."""
    inputs, cotangents = arrays[:_INPUTS], arrays[_INPUTS:]
    if inputs[5].dtype != jnp.float32:
        return xla.backward(*arrays, chunk_size=chunk_size)
    core = functools.partial(_backward, chunk_size=chunk_size)
    folded = lanes.folding(core, (0,) * (_INPUTS + 2), (0,) * 7)
    keys, _, _, gains, decays, *_ = dimensions = _dimensions(inputs)
    of_keys: Dimension = "channels" if inputs[0].shape[2] == 1 else None
    out = (keys, keys, _VALUES, gains, decays, _STATE, _HEADS[1:])
    sums: _Dimensions = (of_keys, of_keys, None, None, None, None, "lanes")

    def summed(*arrays: Array | None) -> tuple[Array, ...]:
        *gradients, d_skip = folded(*arrays)
        return (*gradients, d_skip.sum(0))

    gradients = over_mesh(summed, (*dimensions, _VALUES, _STATE), out, sums)(*_prepared(inputs), *cotangents)
    like = (*inputs[:6], inputs[8])
    return tuple(
        gradient if array is None else gradient.astype(array.dtype)
        for gradient, array in zip(gradients, like, strict=True)
    )


def _dimensions(inputs: tuple[Any, ...]) -> tuple[_Dimensions, ...]:
    """Queries and keys lie over the devices as heads do, but for those of a single group, which every device has."""
    keys: _Dimensions = _KEYS if inputs[0].shape[2] > 1 else ("lanes", None, None, None)
    gains: _Dimensions = _SCALARS if inputs[4].ndim > 1 or inputs[3] is not None else ("lanes", None, None)
    decays: _Dimensions = _SCALARS if inputs[4].ndim > 1 else _HEADS
    return keys, keys, _VALUES, gains, decays, _STATE, ("lanes", None), _SCALARS, _HEADS


def _prepared(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """One type for what is multiplied, an axis of one lane for constants, and a type of resets that a kernel can load."""
    q, k, v, gain, log_decay, state, reset, scale, skip = inputs
    kind = jnp.result_type(q, k, v)
    if kind != jnp.bfloat16:  # A state may be larger than the largest float16.
        kind = jnp.float32
    log_decay = log_decay.astype(jnp.float32)
    return (
        q.astype(kind),
        k.astype(kind),
        v.astype(kind),
        None if gain is None else gain.astype(jnp.float32),
        log_decay[None] if log_decay.ndim == 1 else log_decay,
        state,
        None if reset is None else reset.astype(jnp.int8),
        None if scale is None else scale.astype(jnp.float32),
        None if skip is None else skip.astype(jnp.float32)[None],
    )


def _forward(*inputs: Any, kind: Any, chunk_size: int) -> tuple[Array, ...]:
    q, k, v, gain, log_decay, state, reset, scale, skip = inputs
    how = _constants(inputs, "forward", chunk_size)
    decays, ends = _segment_ends(k, v, inputs, how, reverse=False)
    return _call(
        kernels.forward,
        how,
        [q, k, v, gain, log_decay, state, reset, scale, skip, decays, ends],
        [jax.ShapeDtypeStruct(v.shape, kind), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
    )


def _backward(*arrays: Any, chunk_size: int) -> tuple[Array, ...]:
    inputs, (d_y, d_last) = arrays[:_INPUTS], arrays[_INPUTS:]
    q, k, v, gain, log_decay, state, reset, scale, skip = inputs
    d_y = d_y.astype(v.dtype)
    batch, length, heads, _ = v.shape
    groups, keys = q.shape[2:]
    how, of_keys = (_constants(inputs, kernel, chunk_size) for kernel in ("queries", "keys"))
    of_decays = not how.constants["CONSTANT"]
    chunks = -(-length // of_keys.constants["C"])

    def parts(how: _How, *shape: int) -> jax.ShapeDtypeStruct:
        """In the inputs' type where there is nothing to add up."""
        alone = how.grid[0] == 1 and groups == heads and len(shape) == 4
        return jax.ShapeDtypeStruct((how.grid[0], *shape), v.dtype if alone else jnp.float32)

    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    per_token = (batch, length, heads)
    states = jax.ShapeDtypeStruct((chunks, *state.shape), jnp.float32) if of_decays else nothing
    decays, ends = _segment_ends(k, v, inputs, how, reverse=False)
    d_q, reads, entering = _call(
        kernels.query_gradients,
        how,
        [q, k, v, gain, log_decay, state, reset, scale, d_y, decays, ends],
        [parts(how, batch, length, heads, keys), parts(how, *per_token) if of_decays else nothing, states],
        OF_DECAYS=of_decays,
    )
    decays, ends = _segment_ends(q, d_y, inputs, of_keys, reverse=True)
    d_k, d_v, d_gain, pairs, writes, kept, d_state, d_skip = _call(
        kernels.key_value_gradients,
        of_keys,
        [q, k, v, gain, log_decay, reset, scale, skip, d_y, d_last, entering, decays, ends],
        [
            parts(of_keys, batch, length, heads, keys),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            *[parts(of_keys, *per_token) if of_decays else nothing] * 3,
            parts(of_keys, batch, chunks, heads) if of_decays else nothing,
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            parts(of_keys, of_keys.constants["SEGMENTS"], batch, heads) if skip is not None else nothing,
        ],
        OF_DECAYS=of_decays,
    )
    d_skip = d_skip.sum((0, 1)) if skip is not None else jnp.zeros((batch, heads), jnp.float32)
    d_q, d_k = (d.sum(0).reshape(batch, length, groups, heads // groups, keys).sum(3) for d in (d_q, d_k))
    if not of_decays:
        no_gain = jnp.zeros((batch, length, heads) if gain is not None else (batch, 1, 1), jnp.float32)
        return d_q, d_k, d_v, no_gain, jnp.zeros((batch, heads), jnp.float32), d_state, d_skip
    pairs, reads, writes, kept = (x.sum(0) for x in (pairs, reads, writes, kept))
    d_log_decay = _decay_gradients(pairs, reads, writes, kept, reset, how.constants["C"])
    return d_q, d_k, d_v, d_gain.sum(0), d_log_decay, d_state, d_skip


def _decay_gradients(
    pairs_BLH: Array, reads_BLH: Array, writes_BLH: Array, kept_BMH: Array, reset_BL: Array | None, chunk: int
) -> Array:
    """A log decay's gradient is the sum of everything it scaled: pairs of tokens across it, what the state that entered the chunk
    gave from it on, what tokens before it gave to the state that leaves, and what of the one went into the other."""
    batch, length, heads = pairs_BLH.shape
    chunks = -(-length // chunk)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(batch, chunks, chunk, *x.shape[2:])

    later_TS = jnp.tri(chunk).T[None, None]
    before_TS = jnp.tri(chunk, k=-1)
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    going_on_BMT1 = jnp.ones((1, 1, chunk, 1))
    if reset_BL is not None:
        document = jnp.cumsum(cut(reset_BL.astype(jnp.float32)), axis=2)
        later_TS = later_TS * (document[..., :, None] == document[..., None, :])
        going_on_BMT1 = (document == 0)[..., None]
    later_BMTS = jnp.broadcast_to(later_TS, (batch, chunks, chunk, chunk))
    gradient = exact("bmts,bmsh->bmth", later_BMTS, cut(pairs_BLH) + cut(reads_BLH))
    gradient += exact("ts,bmsh->bmth", before_TS, cut(writes_BLH)) + kept_BMH[:, :, None] * going_on_BMT1
    return gradient.reshape(batch, chunks * chunk, heads)[:, :length]


class _How(NamedTuple):
    grid: tuple[int, int, int]
    num_warps: int
    constants: dict[str, Any]


def _tuning(kernel: str, inputs: tuple[Any, ...], chunk_size: int) -> Tuning:
    """A smaller chunk is obeyed, as far as matrix units can."""
    keys = inputs[0].shape[-1]
    table = TUNING[kernel, inputs[4].ndim == 2]
    tuning = FLOAT32 if inputs[0].dtype == jnp.float32 else next((t for most, t in table.items() if keys <= most), WIDE)
    chunk = max(16, min(tuning.chunk, 1 << (chunk_size.bit_length() - 1)))
    return tuning._replace(chunk=chunk, keys=max(16, min(tuning.keys, 1 << (keys - 1).bit_length())))


def _constants(inputs: tuple[Any, ...], kernel: str, chunk_size: int) -> _How:
    q, _, v, gain, log_decay, _, reset, scale, skip = inputs
    tuning = _tuning(kernel, inputs, chunk_size)
    batch, length, heads, values = v.shape
    groups, keys = q.shape[2:]
    width = max(16, min(tuning.values, 1 << (values - 1).bit_length()))
    blocks, chunks = -(-values // width), -(-length // tuning.chunk)
    wanted = min(-(-FILLING_PROGRAMS // (blocks * heads * batch)), max(1, chunks * tuning.chunk // MIN_SEGMENT))
    segment = -(-chunks // wanted)
    segments = -(-chunks // segment)
    constants = {
        "LANES": batch,
        "L": length,
        "H": heads,
        "G": groups,
        "N": keys,
        "P": values,
        "C": tuning.chunk,
        "BK": tuning.keys,
        "KT": -(-keys // tuning.keys),
        "BV": width,
        "SEGMENT": segment,
        "SEGMENTS": segments,
        "CONSTANT": log_decay.ndim == 2,
        "LOG_DECAY_LANE": 0 if log_decay.shape[0] == 1 else math.prod(log_decay.shape[1:]),
        "EVEN": length % tuning.chunk == 0 and keys % tuning.keys == 0 and values % width == 0,
        "HAS_GAIN": gain is not None,
        "HAS_SCALE": scale is not None,
        "HAS_SKIP": skip is not None,
        "SKIP_LANE": 0 if skip is None or skip.shape[0] == 1 else skip.shape[1],
        "HAS_RESET": reset is not None,
        "PRECISION": "ieee"
        if q.dtype == jnp.float32
        else "wide"
        if triton_call.interpreted(kernels.forward)
        else "tf32",
    }
    return _How((blocks, heads, batch * segments), tuning.num_warps, constants)


def _segment_ends(
    k: Array, v: Array, inputs: tuple[Any, ...], how: _How, *, reverse: bool
) -> tuple[Array | None, Array | None]:
    """[S, lanes, H] and [S, lanes, H, N, P]; None where one segment is all."""
    _, _, _, gain, log_decay, state, reset, scale, _ = inputs
    segments = how.constants["SEGMENTS"]
    if segments == 1:
        return None, None
    shapes = [jax.ShapeDtypeStruct((segments, *shape), jnp.float32) for shape in (state.shape[:2], state.shape)]
    decays, ends = _call(kernels.segment_ends, how, [k, v, gain, log_decay, reset, scale], shapes, REVERSE=reverse)
    return decays, ends


def _call(
    kernel: Any, how: _How, arrays: list[Any], outputs: list[jax.ShapeDtypeStruct], **more: Any
) -> tuple[Array, ...]:
    pointers = [arrays[0] if array is None else array for array in arrays]
    return triton_call.call(kernel, pointers, outputs, grid=how.grid, num_warps=how.num_warps, **how.constants, **more)
