"""Weight folders: which files hold the tensors, and how a new folder appears at once or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ssm_jax.errors import LayoutError
from ssm_jax.interop.npz_file import read_npz
from ssm_jax.interop.safetensors_file import read_safetensors, write_safetensors
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.torch_file import read_torch, write_torch

_INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "weights.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
    "model.npz",
)
"""Where weights are looked for, in this order."""
WeightFile = Literal["safetensors", "pytorch_model.bin", "model.pt"]
_STRING_OR_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')

_FROM_TENSORFLOW = (
    "import numpy, tensorflow; r = tensorflow.train.load_checkpoint('.'); "
    "numpy.savez('model.npz', **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})"
)


def open_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, from the first of ``WEIGHT_FILES`` that exists; nothing is loaded.

    Raises:
        LayoutError: no weights, a missing shard, or a damaged file.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _open_shards(folder / name) if name.endswith(_INDEX_SUFFIX) else open_weight_file(folder / name)
    if (folder / "checkpoint").is_file() and any(folder.glob("*.index")):
        raise LayoutError(
            f"Folder {folder} holds a TensorFlow checkpoint, which only TensorFlow reads. Where that is installed, run there: "
            f'python -c "{_FROM_TENSORFLOW}"'
        )
    raise LayoutError(f"Folder {folder} holds no weights; one of these files is needed: {', '.join(WEIGHT_FILES)}.")


def open_weight_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one ``.safetensors``, ``.npz``, ``.bin`` or ``.pt`` file."""
    if path.suffix == ".npz":
        return read_npz(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], kind: WeightFile, max_shard_bytes: int) -> list[str]:
    """Writes the tensors as "safetensors" (in shards with an index when larger than asked) or as one pickled file of PyTorch's.

    Returns the names of the files.
    """
    if kind != "safetensors":
        write_torch(folder / kind, tensors)
        return [kind]
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return ["model.safetensors"]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / WEIGHT_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [*names, WEIGHT_FILES[0]]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, trailing commas allowed (a published config has one); raises LayoutError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(_STRING_OR_TRAILING_COMMA.sub(lambda found: found[1] or "", text))
    except OSError as error:
        raise LayoutError(f"{path} cannot be read ({error.strerror}); a folder of weights needs it.") from error
    except ValueError as error:
        raise LayoutError(f"{path} is not valid JSON ({error}); download it again or repair it.") from error
    if not isinstance(content, dict):
        raise LayoutError(f"{path} holds a {type(content).__name__}; it must hold a JSON object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises LayoutError unless ``path`` is free, an empty folder, or an exported folder that may be overwritten."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "config.json").is_file():
        raise LayoutError(f"{path} exists and is not a folder of weights; choose another path.")
    if not overwrite:
        raise LayoutError(f"{path} already holds a model; choose another path, or pass overwrite=True (--overwrite).")


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to write into, which takes the place of ``path`` when the block ends without an error.

    Raises:
        LayoutError: ``path`` is taken, or the file system refuses.
    """
    path = path.absolute()
    refuse_existing(path, overwrite)
    temporary, old = (path.parent / f".{path.name}.{kind}-{os.getpid()}" for kind in ("writing", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        raise LayoutError(f"{path} could not be written ({error.strerror or error}); nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _open_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LayoutError(f"{index} has no 'weight_map' of tensor names to files; download it again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise LayoutError(f"{index} lists the shard {name!r}, which is not beside it; download the missing file.")
        tensors |= open_weight_file(shard)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise LayoutError(f"{index} lists {absent[0]!r}, which its shard does not hold; download the folder again.")
    return tensors


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Consecutive tensors in groups of at most ``max_bytes``, or of one tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
