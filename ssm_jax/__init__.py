"""State-space and retention language models in JAX.

The public names load on first use, so that ``import ssm_jax`` is cheap.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "build": "ssm_jax.models",
    "count_parameters": "ssm_jax.models",
    "to_nnx": "ssm_jax.models",
    "take_lanes": "ssm_jax.nn.state",
    "generate": "ssm_jax.generation",
    "stream": "ssm_jax.generation",
    "from_pretrained": "ssm_jax.interop",
    "save_pretrained": "ssm_jax.interop",
}
_SUBPACKAGES = ("checkpoint", "data", "evaluation", "generation", "interop", "models", "nn", "ops", "optim", "training")

__all__ = sorted([*_HOME, *_SUBPACKAGES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ssm_jax.{name}")
    raise AttributeError(f"module 'ssm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
