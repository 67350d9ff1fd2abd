"""A tensor whose shape and type are known and whose values are read when asked."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One named tensor of a weight file, or one about to be written.

    shape, dtype: known from a header or a parameter tree, before any value is touched.
    load: reads or makes the values; nothing is kept, so a caller that goes through tensors one by one holds one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """The values as a flat uint8 array, row-major, little-endian hosts only (as every platform of JAX is)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that begins on a cache line: JAX on a CPU takes such an array over instead of copying it twice."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
