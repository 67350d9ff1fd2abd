"""PyTorch modules for the families that no maintained package has, as ``transformers`` models.

    import ssm_jax.interop  # makes them known to the Auto classes
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("exported/books")

Each has the original's parameter names and config keys. What it computes is exact: forward in one call or in several, steps with a
cache, and ``generate`` agree at every length, padded or not. The files need ``torch`` and ``transformers`` 5 and nothing else, and
are written to be read. Importing this package imports neither; its names load on first use.
"""

import importlib
from typing import Any

_HOME = {
    "RetNetConfig": "configs",
    "DenseGauRetNetConfig": "configs",
    "DenseMambaConfig": "configs",
    "BakaConfig": "configs",
    "GatedStateSpacesConfig": "configs",
    "RetNetForCausalLM": "retnet",
    "DenseGauRetNetForCausalLM": "dense_retnet",
    "DenseMambaForCausalLM": "dense_mamba",
    "BakaForCausalLM": "baka",
    "GatedStateSpacesForCausalLM": "gss",
    "RecurrentCache": "cache",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
