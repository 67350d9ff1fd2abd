"""Reading and writing PyTorch's ``.bin`` / ``.pt`` files without PyTorch and without executing anything.

Such a file is a zip archive: ``<root>/data.pkl``, a pickle that rebuilds tensors from numbered storages, and
``<root>/data/<key>``, the raw storages. Unpickling may call any importable function, so the reader resolves exactly the
globals that a plain state dict needs, each to an inert stand-in, and refuses everything else by name.
"""

import collections
import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.tensor import BFLOAT16, Tensor, raw_bytes

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_UNREADABLE = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError,
    MemoryError, OSError, RuntimeError, TypeError, ValueError)  # fmt: skip
"""What the standard library raises on hostile or damaged archives and pickles."""
_LARGEST_PICKLE = 1 << 28
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_TO_SAFETENSORS = (
    'convert it where you trust it: python -c "import sys, torch; from safetensors.torch import save_file; '
    "save_file({k: v.contiguous().clone() for k, v in torch.load(sys.argv[1], map_location='cpu').items()}, "
    "'model.safetensors')\" FILE"
)


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict saved by ``torch.save``, by name; values are read when loaded.

    Raises:
        LayoutError: not such a file, damaged, or its pickle asks for anything but plain tensors.
    """
    if not zipfile.is_zipfile(path):
        raise LayoutError(
            f"{path} is not a zip archive: it is damaged, or from before PyTorch 1.6; download it again or {_TO_SAFETENSORS}."
        )
    try:
        return _read_archive(path)
    except _UNREADABLE as error:
        raise LayoutError(f"{path} is not a readable PyTorch file ({error}); download it again.") from error


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a state dict that ``torch.load(path, weights_only=True)`` reads, loading one tensor at a time.

    Names that map to the same ``Tensor`` object share one storage, as tied weights do.
    """
    root = path.stem
    unique = {id(tensor): tensor for tensor in tensors.values()}
    keys = {identity: str(number) for number, identity in enumerate(unique)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _pickle_state_dict(tensors, keys))
        archive.writestr(f"{root}/byteorder", b"little")
        for identity, tensor in unique.items():
            entry = zipfile.ZipInfo(f"{root}/data/{keys[identity]}")
            entry.file_size = tensor.nbytes
            with archive.open(entry, "w") as file:
                file.write(raw_bytes(tensor.load()).data)
        archive.writestr(f"{root}/version", b"3\n")


# Named tuples, because a pickle can change the attributes of any other object that it has its hands on.
class _Global(NamedTuple):
    """An inert stand-in for an importable name."""

    name: str
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class _View(NamedTuple):
    """A tensor as the pickle describes it: a strided window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor is malformed")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _storage_class(name: str) -> _Global:
    def refuse(*_: Any) -> None:
        raise pickle.UnpicklingError(f"it calls torch.{name}")

    return _Global(name, refuse)


_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): _Global("_rebuild_tensor_v2", _view),
    ("torch._utils", "_rebuild_parameter"): _Global("_rebuild_parameter", lambda data, *_: data),
    ("collections", "OrderedDict"): _Global("OrderedDict", lambda: collections.OrderedDict()),
    **{("torch", name): _storage_class(name) for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Resolves only ``_GLOBALS``; never imports."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise LayoutError(
                f"{self.path} asks to run {module}.{name}, which plain weights never need; {_TO_SAFETENSORS}."
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel = pid
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in _STORAGES:
            raise pickle.UnpicklingError("a storage is malformed")
        return _Storage(str(key), _STORAGES[storage.name], int(numel))


def _read_archive(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its entries are compressed, which torch.save never does")
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it has no data.pkl")
        root = roots[0]
        if sizes[f"{root}data.pkl"] > _LARGEST_PICKLE:
            raise ValueError("its data.pkl is larger than any state dict's")
        if sizes.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        content = _Unpickler(archive.read(f"{root}data.pkl"), path).load()
    if not isinstance(content, dict) or not all(
        isinstance(v, _View) and isinstance(k, str) for k, v in content.items()
    ):
        raise LayoutError(f"{path} holds more than a state dict (name -> tensor); save model.state_dict() alone.")
    for view in content.values():
        if sizes.get(f"{root}data/{view.storage.key}") != view.storage.numel * view.storage.dtype.itemsize:
            raise ValueError(f"storage {view.storage.key} is missing or cut off")
    return {name: _tensor(path, root, view) for name, view in content.items()}


def _tensor(path: Path, root: str, view: _View) -> Tensor:
    dtype = view.storage.dtype

    def load() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive:  # checks the storage's CRC
                flat = np.frombuffer(archive.read(f"{root}data/{view.storage.key}"), dtype)
        except _UNREADABLE as error:
            raise LayoutError(f"{path} is damaged ({error}); download it again.") from error
        strides = [stride * dtype.itemsize for stride in view.strides]
        return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False)

    return Tensor(view.shape, dtype, load)


def _pickle_state_dict(tensors: Mapping[str, Tensor], keys: Mapping[int, str]) -> bytes:
    """Protocol-2 opcodes by hand, because ``pickle`` writes a global only if it can import it."""

    def tuple_of(*items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    parts = [b"\x80\x02}("]
    for name, tensor in tensors.items():
        numel, strides = math.prod(tensor.shape), _strides(tensor.shape)
        kind = _global("torch", _STORAGE_OF[tensor.dtype])
        storage = tuple_of(_text("storage"), kind, _text(keys[id(tensor)]), _text("cpu"), _int(numel)) + b"Q"
        hooks = _global("collections", "OrderedDict") + b")R"
        dims = (tuple_of(*map(_int, tensor.shape)), tuple_of(*map(_int, strides)))
        call = _global("torch._utils", "_rebuild_tensor_v2") + tuple_of(storage, _int(0), *dims, b"\x89", hooks) + b"R"
        parts += [_text(name), call]
    return b"".join([*parts, b"u."])


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def _int(value: int) -> bytes:
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + data
