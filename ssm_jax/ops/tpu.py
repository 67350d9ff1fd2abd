"""What kernels for TPUs share: how they are run elsewhere, and how arrays are cut into their registers of 8 x 128 numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SUBLANES, LANES = 8, 128


class ChannelBlocks(NamedTuple):
    """``number`` blocks of ``groups`` (at most 8) times 128 channels: each block fills the registers of one program."""

    number: int
    groups: int

    @property
    def size(self) -> int:
        return self.groups * LANES

    @property
    def channels(self) -> int:
        return self.number * self.size


def channel_blocks(channels: int) -> ChannelBlocks:
    """The fewest blocks that hold all channels, each no larger than needed: 1536 are two of 768, not 1024 and half of 1024."""
    groups = -(-channels // LANES)
    number = -(-groups // SUBLANES)
    return ChannelBlocks(number, -(-groups // number))


def fill(array: Array, axis: int, size: int, value: float = 0.0) -> Array:
    """``array`` with ``value`` appended to ``axis`` up to ``size``."""
    if array.shape[axis] == size:
        return array
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, padding, constant_values=value)


def compiled_or_interpreted(kernel: Callable[..., Any], *arrays: Array | None) -> Any:
    """``kernel(*arrays, interpret=...)``: interpreted where the program is lowered for a CPU, however it got there."""

    def run(interpret: bool) -> Callable[..., Any]:
        return lambda *args: kernel(*args, interpret=interpret)

    return jax.lax.platform_dependent(*arrays, cpu=run(True), default=run(False))
