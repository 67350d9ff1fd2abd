"""From a run folder or a checkpoint to a model and its parameters."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssm_jax import optim
from ssm_jax.checkpoint import manifest, store
from ssm_jax.errors import CheckpointError
from ssm_jax.models import LanguageModel, build, config_from_dict
from ssm_jax.optim import relora
from ssm_jax.optim.relora.trees import flat, nested
from ssm_jax.typing import Params, PyTree

CHECKPOINTS, FROZEN = "checkpoints", "frozen"
LOW_RANK = "relora"
"""Where the note of a checkpoint describes its low-rank paths."""


def is_checkpoint(path: str | Path) -> bool:
    """True for a run folder with checkpoints and for a single checkpoint's folder."""
    path = Path(path)
    return (path / manifest.MANIFEST).is_file() or (path / CHECKPOINTS).is_dir()


def load_model(
    path: str | Path,
    step: int | None = None,
    *,
    shardings: PyTree | None = None,
    overrides: Mapping[str, Any] | None = None,
    **config_overrides: Any,
) -> tuple[LanguageModel, Params]:
    """The model and the parameters, as saved, of a run folder (its last good checkpoint, or ``step``) or of one checkpoint: their
    moving average where the run kept one, and with low-rank paths (ReLoRA) merged into them.

    ``shardings``: one sharding, or a tree like the parameters; default one device. ``config_overrides`` change fields of the
    model's config that leave the parameters as they are, such as ``dtype="bfloat16"``; ``overrides`` too, whatever their names.

    Raises:
        CheckpointError: nothing there, or missing, incomplete or damaged files, by name.
    """
    folder = find_checkpoint(path, step)
    info = store.read_info(folder)
    model = build(config_from_dict(info["model"]), **(overrides or {}), **config_overrides)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    placed = with_shardings(shapes, shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    trainable, frozen = optim.split(placed, info["freeze"], info["train"])
    if info.get(LOW_RANK) is not None:
        return model, _merged(folder, info[LOW_RANK], trainable, frozen)
    item = "params" if info.get("ema") is None else "ema"
    params = store.restore(folder, {item: trainable})[0][item]
    if frozen:
        require_frozen(folder, info)
        params = optim.merge(params, store.restore(folder.parent / FROZEN, {"params": frozen})[0]["params"])
    return model, params


def _merged(folder: Path, stored: Mapping[str, Any], trainable: Params, constant: Params) -> Params:
    """The parameters of a checkpoint with low-rank paths. All arguments are shapes with shardings."""
    spec = relora.Spec.from_dict(stored)
    split = functools.partial(relora.init, spec=spec, frozen_dtype=stored["frozen_dtype"])
    kernels, adapted = jax.eval_shape(split, trainable)
    placed = {path: leaf.sharding for path, leaf in flat(trainable).items()}
    for leaf in spec.leaves:
        placed[leaf.a_path], placed[leaf.b_path] = relora.factor_shardings(leaf, placed[leaf.path])

    def with_places(shapes: Params) -> Params:
        return nested(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
                for path, leaf in flat(shapes).items()
            }
        )

    wanted = {"params": with_places(adapted), "frozen": optim.merge(constant, with_places(kernels))}
    items, _ = store.restore(folder, wanted)
    leaves = flat(items["frozen"])
    frozen = nested({leaf.path: leaves.pop(leaf.path) for leaf in spec.leaves})
    export = functools.partial(relora.export, spec=spec)
    wanted_places = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    params: Params = jax.jit(export, out_shardings=wanted_places)(frozen, items["params"])
    return optim.merge(params, nested(leaves))


def require_frozen(folder: Path, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the frozen leaves beside a checkpoint are those that it was saved with."""
    beside = folder.parent / FROZEN
    if manifest.digest(beside) != info.get("frozen"):
        raise CheckpointError(
            f"{beside} holds other frozen parameters than checkpoint {folder} was saved with; restore them."
        )


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, given that or a run folder.

    Raises:
        CheckpointError: no such checkpoint, with the steps that there are.
    """
    path = Path(path)
    if (path / manifest.MANIFEST).is_file() and step is None:
        return path
    root = path / CHECKPOINTS
    if step is not None and step not in store.steps(root):
        there = ", ".join(map(str, store.steps(root))) or "none"
        raise CheckpointError(f"{path} has no checkpoint of step {step}; it has: {there}.")
    folder = store.latest_good(root, set_aside=False) if step is None else store.folder_of(root, step)
    if folder is None:
        raise CheckpointError(f"{path} is neither a run folder with a checkpoint nor a checkpoint; check the path.")
    return folder


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays with shardings: one for all leaves, or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
