"""Reading numpy's ``.npz``, a zip file of arrays, one tensor at a time."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ssm_jax.errors import LayoutError
from ssm_jax.interop.tensor import Tensor

_SUFFIX = ".npy"


def read_npz(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; headers are read now, values when loaded. Nothing pickled is ever read.

    Raises:
        LayoutError: the file is truncated or damaged, or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(_SUFFIX)]
            return {name.removesuffix(_SUFFIX): _tensor(path, archive, name) for name in names}
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise LayoutError(f"{path} is not a complete .npz file ({error}); make or download it again.") from error


def _tensor(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise LayoutError(f"{path} holds {name.removesuffix(_SUFFIX)!r} as Python objects; save it as float32.")

    def load() -> np.ndarray:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            return npy.read_array(file, allow_pickle=False)

    return Tensor(shape, dtype, load)
