"""Packages that only some inputs need."""

import importlib
from typing import Any

from ssm_jax.errors import DataError


def import_extra(module: str, needed_by: str) -> Any:
    """The module; raises DataError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{needed_by} needs the package {package!r}; install it with pip install 'ssm_jax[data]'."
        ) from error
