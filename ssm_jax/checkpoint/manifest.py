"""The integrity record of a checkpoint: what lies in the folder, written last.

Orbax commits atomically but loads arrays with flipped bits without an error; the checksums here do not.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ssm_jax.errors import CheckpointError

MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 20


def write(folder: Path, arrays: dict[str, Any]) -> None:
    """Writes ``MANIFEST.json``: size and sha256 of every other file of the folder, and a description of the arrays."""
    files = {name: _describe(folder / name) for name in _files(folder)}
    temporary = folder / (MANIFEST + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"files": files, "arrays": arrays}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def read(folder: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        CheckpointError: no folder, no manifest (the save never finished), or a manifest that is not JSON.
    """
    if not folder.is_dir():
        raise CheckpointError(f"Checkpoint {folder} does not exist; check the path.")
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"files": dict(content["files"]), "arrays": dict(content["arrays"])}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"Checkpoint {folder} is incomplete: {MANIFEST} is missing, so its save never finished; use another step."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint file {folder / MANIFEST} is damaged; use another step.") from error


def digest(folder: Path) -> str:
    """What changes when any file of the folder does: the checksum of its manifest."""
    read(folder)
    return _describe(folder / MANIFEST)["sha256"][:16]


def verify(folder: Path) -> dict[str, Any]:
    """Reads every file and compares it with the manifest, which is returned.

    Raises:
        CheckpointError: the first file that is missing, truncated or changed, by name.
    """
    content = read(folder)
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"Checkpoint file {path} is missing; use another step.")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"Checkpoint file {path} has {size} bytes instead of {expected['size']}; use another step."
            )
        if _describe(path) != expected:
            raise CheckpointError(f"Checkpoint file {path} is damaged (its checksum differs); use another step.")
    return content


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST, MANIFEST + ".tmp"))


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
