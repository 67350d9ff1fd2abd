"""Golden folders, copied and changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ssm_jax
from ssm_jax.interop.folder import open_weights
from ssm_jax.interop.safetensors_file import write_safetensors
from ssm_jax.interop.tensor import Tensor
from ssm_jax.typing import Params
from tests.conformance.golden import GOLDENS


def copy_golden(
    folder: str,
    target: Path,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Path:
    """A copy of a golden folder with its config and its tensors (then one ``model.safetensors``) changed in place."""
    target.mkdir(parents=True)
    for file in (GOLDENS / folder).iterdir():
        if file.name != "io.safetensors":
            shutil.copy(file, target)
    if config:
        content = json.loads((target / "config.json").read_text())
        config(content)
        (target / "config.json").write_text(json.dumps(content))
    if tensors:
        change_tensors(target, tensors)
    return target


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes the tensors of a folder in place; they are one ``model.safetensors`` then."""
    arrays = {name: np.array(tensor.load()) for name, tensor in open_weights(folder).items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink(missing_ok=True)
    change(arrays)
    write_safetensors(folder / "model.safetensors", as_tensors(arrays))


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def random_params(model: ssm_jax.models.LanguageModel, seed: int = 0) -> Params:
    """Normal numbers in every leaf."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def assert_same(got: Params, expected: Params) -> None:
    """Bit for bit, types included."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
