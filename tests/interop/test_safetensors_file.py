"""Our reader and writer of the format against the ``safetensors`` package, and damaged files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ssm_jax.errors import LayoutError
from ssm_jax.interop.safetensors_file import read_safetensors, write_safetensors
from ssm_jax.interop.tensor import Tensor

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.normal(size=(3, 5)).astype(np.float32),
    "half": RNG.normal(size=(7,)).astype(np.float16),
    "brain": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "double": RNG.normal(size=(2, 1, 2)),
    "ids": np.arange(5),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def assert_holds(tensors: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> None:
    assert set(tensors) == set(arrays)
    for name, expected in arrays.items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
        np.testing.assert_array_equal(tensor.load(), expected, strict=True)


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"note": "kept out"})
    assert_holds(read_safetensors(tmp_path / "a.safetensors"), ARRAYS)


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, as_tensors(ARRAYS))
    theirs = load_file(path)
    for name in set(ARRAYS) - {"brain"}:
        np.testing.assert_array_equal(theirs[name], ARRAYS[name], strict=True)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("brain").get_dtype() == "BF16"
    assert_holds(read_safetensors(path), ARRAYS)


def test_transposed_values_are_written_row_major(tmp_path: Path) -> None:
    arrays = {"t": ARRAYS["matrix"].T, "column": ARRAYS["matrix"][:, 1]}
    write_safetensors(tmp_path / "a.safetensors", as_tensors(arrays))
    assert_holds(read_safetensors(tmp_path / "a.safetensors"), arrays)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, as_tensors(ARRAYS))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LayoutError, match=r"cut\.safetensors is not a complete safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 3},
        [],
    ],
)
def test_a_header_that_does_not_add_up_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(LayoutError, match=r"odd\.safetensors is not a complete"):
        read_safetensors(path)


def test_a_type_without_a_use_is_refused_by_name(tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "fp8.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2))
    with pytest.raises(LayoutError, match=r"'w' as F8_E4M3"):
        read_safetensors(path)
