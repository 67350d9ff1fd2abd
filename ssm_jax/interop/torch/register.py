"""Makes the models here known to the Auto classes of ``transformers``, without importing it.

``import ssm_jax.interop`` must stay cheap, and work without PyTorch; importing the Auto classes takes seconds, and imports PyTorch.
But whoever uses them imports their two modules. So configs and models are registered right after these have run: at once if they
have, else by a finder that waits for their names. (Each after its own: the base class of our models imports the Auto configs, and
the models cannot be defined before it.)
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
_MODELS = {
    "RetNet": "retnet",
    "DenseGauRetNet": "dense_retnet",
    "DenseMamba": "dense_mamba",
    "Baka": "baka",
    "GatedStateSpaces": "gss",
}
"""How the names of a model's classes begin, and its file here."""


def register() -> None:
    """Now or as soon as ``transformers`` is there. Without PyTorch nothing happens; a second call does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path) or not importlib.util.find_spec("torch"):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _ACTIONS:
        if name in sys.modules:
            _act(name)


def _register_configs() -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    configs = importlib.import_module("ssm_jax.interop.torch.configs")
    for name in _MODELS:
        config = getattr(configs, f"{name}Config")
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
            continue
        # register would replace it without a word, as others may do to ours later.
        theirs = CONFIG_MAPPING[config.model_type]
        warnings.warn(
            f"transformers already has a model type {config.model_type!r}, by {theirs.__module__}, and keeps it; "
            f"load folders of ssm_jax with ssm_jax.interop.torch.{name}ForCausalLM.from_pretrained.",
            stacklevel=2,
        )


def _register_models() -> None:
    from transformers import AutoModelForCausalLM

    configs = importlib.import_module("ssm_jax.interop.torch.configs")
    for name, file in _MODELS.items():
        models = importlib.import_module(f"ssm_jax.interop.torch.{file}")
        AutoModelForCausalLM.register(getattr(configs, f"{name}Config"), getattr(models, f"{name}ForCausalLM"))


_ACTIONS: dict[str, Callable[[], None]] = {
    f"{_AUTO}configuration_auto": _register_configs,
    f"{_AUTO}modeling_auto": _register_models,
}


def _act(name: str) -> None:
    try:
        _ACTIONS[name]()
    except Exception as error:
        # An old transformers, say. Whoever imports it for another model must still be able to.
        warnings.warn(f"The models of ssm_jax.interop.torch are not known to transformers: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``_ACTIONS`` as the import system does, and acts after they have run."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ACTIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                _act(fullname)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]  # of this one loader, on purpose
        return spec
