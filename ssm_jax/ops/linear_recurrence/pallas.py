"""The linear recurrence on a TPU: h is one full register of 8 x 128 channels, and a token one multiplication and one addition.

The compiler keeps [tokens, channels] in tiles of 8 x 128. Read across tiles, with a stride of one tile, 8 groups of 128 channels of
one token fill a register; nothing is transposed in memory. Blocks of tokens follow each other on one core, h waits in scratch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssm_jax.ops.lanes import folding
from ssm_jax.ops.linear_recurrence.xla import xla
from ssm_jax.ops.mesh import Dimension, over_mesh
from ssm_jax.ops.tpu import LANES, SUBLANES, ChannelBlocks, channel_blocks, compiled_or_interpreted, fill

MOST_TOKENS = 256


def pallas(a: Array, b: Array, state: Array, *, reverse: bool = False, chunk_size: int | None = None) -> Array:
    """Real float32. Everything else runs ``xla``, and so does an ``a`` that is shared by some channels: it is never copied."""
    if a.dtype != jnp.float32 or b.dtype != jnp.float32 or a.shape[2:] != b.shape[2:]:
        return xla(a, b, state, reverse=reverse, chunk_size=chunk_size)
    lanes: tuple[Dimension, ...] = ("lanes", None, "channels")
    run = over_mesh(functools.partial(_run, reverse=reverse), (lanes, lanes, ("lanes", "channels")), (lanes,))
    flat = (a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1), state.reshape(state.shape[0], -1))
    (h,) = folding(run, (0, 0, 0), (0,))(*flat)
    return h.reshape(b.shape)


def _run(a_BLE: Array, b_BLE: Array, state_BE: Array, *, reverse: bool) -> tuple[Array]:
    batch, length, channels = b_BLE.shape
    blocks = channel_blocks(channels)
    steps = -(-length // MOST_TOKENS)
    tiles = -(-length // (steps * SUBLANES))
    filled = steps * tiles * SUBLANES

    def tiled(v: Array, value: float) -> Array:
        """[B, L, E] as [B, tile, (group, token of the tile), 128]: how it lies in memory already."""
        v = fill(fill(v, 1, filled, value), 2, blocks.channels)
        v = v.reshape(v.shape[0], steps * tiles, SUBLANES, -1, LANES)
        return v.transpose(0, 1, 3, 2, 4).reshape(v.shape[0], steps * tiles, -1, LANES)

    kernel = functools.partial(_call, reverse=reverse, steps=steps, tiles=tiles, blocks=blocks)
    state = fill(state_BE, 1, blocks.channels).reshape(batch, blocks.number, blocks.groups, LANES)
    # A filled-up token hands h on: it comes first where the direction is reversed.
    h = compiled_or_interpreted(kernel, tiled(a_BLE, 1.0), tiled(b_BLE, 0.0), state)
    h = h.reshape(batch, steps * tiles, -1, SUBLANES, LANES).transpose(0, 1, 3, 2, 4)
    return (h.reshape(batch, filled, blocks.channels)[:, :length, :channels],)


def _call(
    a: Array, b: Array, state: Array, *, reverse: bool, steps: int, tiles: int, blocks: ChannelBlocks, interpret: bool
) -> Array:
    def sequence(v: Array) -> pl.BlockSpec:
        def index(lane: Any, block: Any, step: Any) -> tuple[Any, ...]:
            return lane if v.shape[0] > 1 else 0, steps - 1 - step if reverse else step, block, 0

        return pl.BlockSpec((None, tiles, SUBLANES * blocks.groups, LANES), index)

    return pl.pallas_call(
        functools.partial(_kernel, reverse=reverse, unroll=not interpret),
        out_shape=jax.ShapeDtypeStruct(b.shape, b.dtype),
        grid=(b.shape[0], blocks.number, steps),
        in_specs=[
            sequence(a),
            sequence(b),
            pl.BlockSpec((None, None, blocks.groups, LANES), lambda lane, block, step: (lane, block, 0, 0)),
        ],
        out_specs=sequence(b),
        scratch_shapes=[pltpu.VMEM((blocks.groups, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(a, b, state)


def _kernel(a: Any, b: Any, state: Any, out: Any, h: Any, *, reverse: bool, unroll: bool) -> None:
    tiles, groups = a.shape[0], h.shape[0]
    together = max(n for n in (1, 2, 4, 8) if tiles % n == 0)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        h[...] = state[...]

    def some_tiles(i: Any, h_t: Array) -> Array:
        def token(s: Any, h_t: Array) -> Array:
            t = i * together * SUBLANES + s
            t = tiles * SUBLANES - 1 - t if reverse else t
            at = (t >> 3, pl.ds(t & 7, groups, stride=SUBLANES), slice(None))
            h_t = a[at] * h_t + b[at]
            out[at] = h_t
            return h_t

        return lax.fori_loop(0, together * SUBLANES, token, h_t, unroll=unroll)

    h[...] = lax.fori_loop(0, tiles // together, some_tiles, h[...])
