"""Checkpoints on disk: named pytrees through Orbax, a YAML note, and a manifest that is written last.

``root/00000100/{arrays/<item>/..., info.yaml, MANIFEST.json}``. A save fills ``00000100.partial`` and renames it when
complete, so a folder with a plain step name was finished once; whether it still is what was saved, the manifest tells.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from ssm_jax import distributed
from ssm_jax.checkpoint import manifest
from ssm_jax.config import read_yaml
from ssm_jax.errors import CheckpointError
from ssm_jax.typing import PyTree

_ARRAYS, _INFO, _PARTIAL, _DAMAGED = "arrays", "info.yaml", ".partial", ".damaged"


def folder_of(root: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(root) / f"{step:08d}"


def steps(root: str | Path) -> list[int]:
    """Steps with a finished checkpoint, ascending. Nothing is read or verified."""
    root = Path(root)
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit()) if root.is_dir() else []


def save(
    root: str | Path,
    step: int,
    items: Mapping[str, PyTree],
    info: Mapping[str, Any],
    keep: int | None = None,
    keep_every: int | None = None,
) -> Path:
    """Saves named pytrees and a plain mapping as the checkpoint of ``step``; returns its folder.

    Then drops all but the last ``keep`` checkpoints (None keeps all) and those at multiples of ``keep_every``, and what
    interrupted saves left behind.

    Raises:
        CheckpointError: the file system refused; the former checkpoints are untouched.
    """
    folder = folder_of(root, step)
    write_folder(folder, items, info)
    if not distributed.is_main():
        return folder
    for partial in Path(root).glob(f"*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)
    for old in steps(root)[:-keep] if keep else []:
        if old != step and not (keep_every and old % keep_every == 0):
            shutil.rmtree(folder_of(root, old))
    return folder


def write_folder(folder: Path, items: Mapping[str, PyTree], info: Mapping[str, Any]) -> None:
    """Writes one checkpoint folder, whatever its name; replaces an existing one only when the new one is complete.

    All processes write their parts of the arrays; the main one does the rest.
    """
    from orbax.checkpoint import v1 as ocp

    partial = folder.with_name(folder.name + _PARTIAL)

    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items)) if hasattr(leaf, "nbytes"))
        free = shutil.disk_usage(partial).free
        if free < needed:  # found out here, it costs one sentence and not a thousand lines of Orbax's threads
            raise OSError(f"{needed:,} bytes are needed and {free:,} are free")

    def write_arrays() -> None:
        ocp.save_checkpointables((partial / _ARRAYS).absolute(), _without_empty(dict(items)))

    def finish() -> None:
        (partial / _INFO).write_text(yaml.safe_dump(dict(info), sort_keys=False), encoding="utf-8")
        manifest.write(partial, {name: _describe(tree) for name, tree in items.items()})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)

    for stage, by_all in ((begin, False), (write_arrays, True), (finish, False)):
        problem: Exception | None = None
        try:
            if by_all or distributed.is_main():
                stage()
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a full disk as ValueError
            problem = error
        if distributed.everywhere(problem):
            continue
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:200] if problem else "in another process"
        raise CheckpointError(
            f"Checkpoint {folder} could not be written ({reason}); earlier checkpoints are untouched."
        ) from problem


def restore(folder: str | Path, abstract: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """(items, info) of one checkpoint. ``abstract`` gives shape, dtype and sharding of every leaf of the wanted items.

    The shardings may differ from those at saving.

    Raises:
        CheckpointError: missing, incomplete or damaged (the file is named), or arrays that do not fit ``abstract``.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder)
    content = manifest.verify(folder)
    for name, tree in abstract.items():
        _require_fit(folder, name, _describe(tree), content["arrays"].get(name, {}))
    try:
        items = ocp.load_checkpointables((folder / _ARRAYS).absolute(), _without_empty(dict(abstract)))
        items = jax.tree.map(_or_empty, dict(abstract), items)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"Checkpoint {folder} cannot be read ({reason}); use another step.") from error
    return items, read_yaml(folder / _INFO)


def read_info(folder: str | Path) -> dict[str, Any]:
    """The YAML note of a checkpoint.

    Raises:
        CheckpointError: missing or incomplete checkpoint.
    """
    folder = Path(folder)
    manifest.read(folder)
    if not (folder / _INFO).is_file():
        raise CheckpointError(f"Checkpoint file {folder / _INFO} is missing; use another step.")
    return read_yaml(folder / _INFO)


def latest_good(root: str | Path, *, set_aside: bool) -> Path | None:
    """The newest checkpoint that passes verification, or None if there is none at all.

    Every damaged one on the way is reported on stderr and, with ``set_aside``, renamed to ``<step>.damaged``.

    With several processes the main one verifies, and all return what it found.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    found, problem = -1, None
    if distributed.is_main():
        try:
            found = _latest_good_step(Path(root), set_aside)
        except CheckpointError as error:
            problem = error
    if not distributed.everywhere(problem):
        raise problem or CheckpointError(f"The main process found no good checkpoint in {root}.")
    step = distributed.from_main(found)
    return None if step < 0 else folder_of(root, step)


def _latest_good_step(root: Path, set_aside: bool) -> int:
    """-1 if there is no checkpoint."""
    found = steps(root)
    for step in reversed(found):
        folder = folder_of(root, step)
        try:
            manifest.verify(folder)
            if step != found[-1]:
                print(f"warning: using step {step} instead", file=sys.stderr)
            return step
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr)
            if set_aside:
                aside = _free_name(folder)
                os.replace(folder, aside)
                print(f"warning: set it aside as {aside}", file=sys.stderr)
    damaged = list(root.glob(f"*{_DAMAGED}*")) if root.is_dir() else []
    if found or damaged:
        raise CheckpointError(
            f"All {len(found) or len(damaged)} checkpoint(s) in {root} are damaged; restore one from a backup or start anew "
            "in another folder."
        )
    return -1


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}{_DAMAGED}{suffix}") for suffix in ("", *map(str, range(2, 1000))))
    return next(name for name in names if not name.exists())


def _describe(tree: PyTree) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _without_empty(tree: PyTree) -> PyTree:
    """Arrays without elements are no arrays to Orbax; they are told by the manifest and made again."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _or_empty(wanted: Any, found: Any) -> jax.Array:
    if wanted.size:
        return found
    part = np.zeros(wanted.sharding.shard_shape(wanted.shape), wanted.dtype)
    return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda _: part)


def _require_fit(folder: Path, item: str, wanted: Mapping[str, str], stored: Mapping[str, str]) -> None:
    for name in sorted({*wanted, *stored}):
        if wanted.get(name) != stored.get(name):
            raise CheckpointError(
                f"Checkpoint {folder} does not fit: {item}/{name} is {stored.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here; use the config that it was saved with."
            )
