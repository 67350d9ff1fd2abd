"""Reading and writing ``.safetensors`` one tensor at a time.

The format: eight bytes, the header's length as a little-endian integer; a JSON header, name -> {dtype, shape,
data_offsets}; then the row-major values. The package's own numpy functions know no bfloat16 and take whole models.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.tensor import BFLOAT16, Tensor, raw_bytes

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; values are mapped from disk when loaded.

    Raises:
        LayoutError: the file is truncated or damaged, or holds a type that ssm_jax has no use for.
    """
    try:
        header, start = _read_header(path)
        return {name: _tensor(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LayoutError(f"{path} is not a complete safetensors file ({error}); copy or download it again.") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors, loading one at a time, with the metadata that every PyTorch reader accepts."""
    # Wide types first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            file.write(raw_bytes(tensor.load()).data)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"its header claims {length} of {size} bytes")
        return json.loads(file.read(length)), 8 + length


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise LayoutError(f"{path} holds {name!r} as {entry['dtype']}; save it as F32, F16 or BF16.")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    fits = 0 <= begin <= end <= path.stat().st_size - start and end - begin == math.prod(shape) * dtype.itemsize
    if not fits or min(shape, default=0) < 0:
        raise ValueError(f"the values of {name!r} do not fit in it")

    def load() -> np.ndarray:
        if begin == end:
            return np.empty(shape, dtype)
        return np.memmap(path, np.uint8, "r", start + begin, (end - begin,)).view(dtype).reshape(shape)

    return Tensor(shape, dtype, load)
