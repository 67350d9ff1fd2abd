"""Reading the values that the public ReLoRA code produced; see the README beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssm_jax.interop.safetensors_file import read_safetensors

FOLDER = Path(__file__).parents[2] / "goldens/relora"


def names(kind: str) -> list[str]:
    found = sorted(path.stem for path in FOLDER.glob(f"{kind}_*.json"))
    assert found
    return found


def settings(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, np.ndarray]:
    stored = read_safetensors(FOLDER / f"{name}.safetensors")
    return {key: np.array(tensor.load()) for key, tensor in stored.items()}
