"""Launching a Triton kernel from JAX: compiled by jax-triton for a GPU, or by Triton's interpreter on a CPU.

``TRITON_INTERPRET=1`` in the environment, set before Triton is imported, makes every launch of the process an interpreted one:
slow, exact, and meant for tests. Nothing here imports Triton or jax-triton before the first launch.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from ssm_jax.errors import ImplementationError

CAPABILITY_WITHOUT_GPU = 90
# What CUDA launches along each axis of a grid.
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)


class Launch(NamedTuple):
    """One kernel with everything that its machine code depends on. Arrays are known by shape and dtype alone."""

    kernel: Any
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    num_warps: int
    constants: Mapping[str, Any]


_recorders: list[list[Launch]] = []
# The interpreter keeps the program that runs in global variables; devices run their callbacks in threads.
_interpreter = threading.Lock()


def missing() -> str | None:
    """Why a Triton kernel cannot be launched here; None if it can, as far as the installed packages tell."""
    install = "pip install 'ssm_jax[triton]'"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {install}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if importlib.util.find_spec("jax_triton") is None:
        return f"jax-triton is not installed: {install}"
    return None


def call(
    kernel: Any,
    arguments: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    **constants: Any,
) -> tuple[Array, ...]:
    """Runs ``kernel`` (a ``triton.jit`` function) over ``grid``.

    Args:
        arguments, outputs: in the order of the kernel's pointers, arguments first.
        constants: its ``tl.constexpr`` parameters, by name.

    Returns:
        The outputs. What the kernel does not write in them is undefined.

    Raises:
        ImplementationError: the grid is larger than GPUs take.
    """
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arguments)
    for recorder in _recorders:
        recorder.append(Launch(kernel, shapes, tuple(outputs), grid, num_warps, constants))
    if not outputs or any(size == 0 for size in grid):
        raise ValueError(f"a launch over {grid} with {len(outputs)} outputs does nothing")
    if any(size > most for size, most in zip(grid, GRID_LIMITS, strict=False)):
        raise ImplementationError(
            f"A Triton kernel over {grid} (channels, rows of the batch and what is mapped over them, parts of the length) is "
            f"more than the {GRID_LIMITS} that GPUs launch at once; use smaller batches or implementation='xla'."
        )
    if interpreted(kernel):
        run = functools.partial(_interpret, kernel, tuple(outputs), grid, constants)
        return tuple(jax.pure_callback(run, tuple(outputs), *arguments))
    return _compiled(kernel, arguments, outputs, grid, num_warps, constants)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that are traced within: for what reads compiled kernels without running them."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


def _compiled(
    kernel: Any,
    arguments: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    constants: Mapping[str, Any],
) -> tuple[Array, ...]:
    import jax_triton

    parameters = inspect.signature(jax_triton.triton_call).parameters
    how: dict[str, Any] = {"out_shape" if "out_shape" in parameters else "out_type": list(outputs)}
    if "compute_capability" in parameters and not any(device.platform == "gpu" for device in jax.local_devices()):
        how["compute_capability"] = CAPABILITY_WITHOUT_GPU
    results = jax_triton.triton_call(
        *arguments, kernel=kernel, grid=grid, num_warps=num_warps, num_stages=1, **how, **constants
    )
    return tuple(results)


def interpreted(kernel: Any) -> bool:
    """Whether Triton was imported with its interpreter on."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


def _interpret(
    kernel: Any,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    *arguments: Any,
) -> tuple[np.ndarray, ...]:
    """Outputs begin as NaNs, so that what a kernel forgets to write shows."""
    results = tuple(_poisoned(output) for output in outputs)
    pointers = [_Host(np.ascontiguousarray(array)) for array in (*arguments, *results)]
    with _interpreter, np.errstate(all="ignore"):
        kernel[grid](*pointers, **constants)
    return results


def _poisoned(output: jax.ShapeDtypeStruct) -> np.ndarray:
    try:
        return np.full(output.shape, np.nan, output.dtype)
    except ValueError:
        return np.full(output.shape, np.iinfo(output.dtype).max, output.dtype)


class _Host:
    """A NumPy array in the form in which Triton's interpreter takes PyTorch's tensors, without PyTorch."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = _NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Host":
        return self

    def cpu(self) -> "_Host":
        return self

    def new_empty(self, size: int, device: str) -> "_Host":
        del size, device
        return self

    def set_(self, *of: Any) -> None:
        """Storage, offset and shape are its own."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, other: "_Host") -> None:
        """It is the same memory."""


_NAMES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int32": "int32",
    "int8": "int8",
}
