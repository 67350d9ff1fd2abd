"""Our own checkpoints as a source and a target of conversion."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssm_jax.interop import tokenizer_files
from ssm_jax.interop.folder import new_folder
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.models import LanguageModel, build, config_from_dict, config_to_dict
from ssm_jax.typing import Params

LAYOUT = "ssm_jax"


def is_native(path: Path) -> bool:
    """Whether a folder is a run of ours or one of its checkpoints."""
    from ssm_jax import checkpoint

    return checkpoint.is_checkpoint(path)


def read_model(path: Path) -> dict[str, Any]:
    """``family`` and config fields of a run's or checkpoint's model."""
    from ssm_jax import checkpoint
    from ssm_jax.checkpoint import store

    return dict(store.read_info(checkpoint.find_checkpoint(path))["model"])


def digest(path: Path) -> str:
    """What changes when any file of the checkpoint that would be read does, or its frozen leaves."""
    from ssm_jax import checkpoint
    from ssm_jax.checkpoint import manifest

    return manifest.digest(checkpoint.find_checkpoint(path))


def read_native(path: Path, shardings: Any, overrides: dict[str, Any]) -> tuple[LanguageModel, Params]:
    """The model and parameters of a run folder or checkpoint; ``shardings`` and ``overrides`` as in ``from_pretrained``."""
    from ssm_jax import checkpoint
    from ssm_jax.checkpoint import store

    if callable(shardings):
        config = config_from_dict(store.read_info(checkpoint.find_checkpoint(path))["model"])
        shardings = shardings(abstract_params(build(config, **overrides)))
    stored = {key: value for key, value in overrides.items() if key != "param_dtype"}
    model, params = checkpoint.load_model(path, shardings=shardings, overrides=stored)
    if overrides.get("param_dtype", model.config.param_dtype) == model.config.param_dtype:
        return model, params
    model = build(model.config, param_dtype=overrides["param_dtype"])
    return model, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(model.config.param_dtype)), params)


def write_native(model: LanguageModel, params: Params, path: Path, tokenizer: Any, overwrite: bool) -> None:
    """A run folder with one checkpoint, of step 0 and without optimizer state."""
    from ssm_jax import checkpoint

    info = {"model": config_to_dict(model.config), "freeze": [], "train": []}
    with new_folder(path, overwrite) as folder:
        checkpoint.save(folder / "checkpoints", 0, {"params": params}, info)
        if tokenizer is not None:
            (folder / "tokenizer").mkdir()
            tokenizer_files.write(tokenizer, folder / "tokenizer")
