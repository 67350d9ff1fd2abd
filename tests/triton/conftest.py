"""Kernels in Triton's interpreter: run with ``TRITON_INTERPRET=1``, which makes every launch of the process an interpreted one."""

import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops import triton_call

# The main environment has no Triton and selects none of these; where they are selected, nothing collected is a failure.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

FOLDER = Path(__file__).parent
MARGIN, SENTINEL = 1024, 77


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.triton)
            # Triton's own, and the reason why it needs numpy < 2.4.
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    import os

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("set TRITON_INTERPRET=1: these tests run kernels in Triton's interpreter")
    if reason := triton_call.missing():
        pytest.fail(reason)


@pytest.fixture(autouse=True, scope="session")
def _repairs() -> Iterator[None]:
    """The interpreter rounds to bfloat16 as a GPU does, to the nearest, instead of cutting digits off; and does not prepare the
    language again for every call of a function in a kernel, which is half of its time."""
    from triton.runtime import interpreter

    convert, prepare, launch = interpreter._convert_float, interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def rounded(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (str(source), str(target)) == ("fp32", "bf16"):
            return values.astype(jnp.bfloat16).view(np.uint16)
        return convert(values, source, target, mode)

    def prepare_once(function: Any) -> Any:
        if id(function.__globals__) not in prepared:
            prepared.add(id(function.__globals__))
            return prepare(function)
        return None

    def launch_afresh(*args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        yield


@pytest.fixture(autouse=True)
def _loads_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels load nothing before or behind their arrays: on a CPU that harms nobody, on a GPU it may be nobody's memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    launch, make, load = triton_call._interpret, triton_call._Host.__init__, InterpreterBuilder.create_masked_load
    here = threading.local()

    def launch_with_its_own(*args: Any) -> tuple[np.ndarray, ...]:
        here.sizes = {}
        return launch(*args)

    def known(self: Any, array: np.ndarray) -> None:
        make(self, array)
        here.sizes[array.ctypes.data] = array.nbytes

    def inside(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        wanted = pointers.data[mask.data.astype(bool)]
        if wanted.size:
            first, last = int(wanted.min()), int(wanted.max())
            start = max((start for start in here.sizes if start <= first), default=0)
            assert last < start + here.sizes.get(start, 0), "a load outside of every array"
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(triton_call, "_interpret", launch_with_its_own)
    monkeypatch.setattr(triton_call._Host, "__init__", known)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", inside)


@pytest.fixture(autouse=True)
def _bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels store nothing before or behind their outputs."""
    poisoned = triton_call._poisoned
    buffers = []

    def with_margins(output: jax.ShapeDtypeStruct) -> np.ndarray:
        inner = poisoned(output)
        buffer = np.full(inner.size + 2 * MARGIN, SENTINEL, inner.dtype)
        buffers.append(buffer)
        buffer[MARGIN:-MARGIN] = inner.reshape(-1)
        return buffer[MARGIN:-MARGIN].reshape(inner.shape)

    monkeypatch.setattr(triton_call, "_poisoned", with_margins)
    yield
    for buffer in buffers:
        assert (np.r_[buffer[:MARGIN], buffer[-MARGIN:]] == SENTINEL).all()
