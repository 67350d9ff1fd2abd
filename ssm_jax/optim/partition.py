"""Trained and frozen leaves: one parameter tree split in two by path patterns, and put together again.

Both halves are nested dicts without the other's leaves, so a frozen parameter has no gradient and no optimizer state.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from ssm_jax.config import suggest
from ssm_jax.errors import ConfigError
from ssm_jax.typing import Params


def paths(params: Params) -> list[str]:
    """``a/b/c`` for every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def split(params: Params, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> tuple[Params, Params]:
    """(trainable, frozen): leaves whose path any ``freeze`` pattern finds (``re.search``) are frozen.

    ``train`` instead freezes everything that no pattern of it finds; giving both is an error.

    Raises:
        ConfigError: a pattern that is invalid or matches nothing, nothing left to train.
    """
    if freeze and train:
        raise ConfigError("Config keys 'optim.freeze' and 'optim.train' are both set; keep one.")
    names = paths(params)
    key = "optim.train" if train else "optim.freeze"
    matched = {name for pattern in (*freeze, *train) for name in _matches(pattern, names, key)}
    trainable = {name for name in names if (name in matched) == bool(train)}
    if not trainable:
        raise ConfigError(f"Config key {key!r} leaves no parameter to train; narrow its patterns.")
    return _select(params, trainable, ""), _select(params, set(names) - trainable, "")


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of ``split``."""
    merged = dict(trainable)
    for key, value in frozen.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def _matches(pattern: str, names: Sequence[str], key: str) -> list[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ConfigError(f"Config key {key!r}: {pattern!r} is not a regular expression ({error}).") from error
    if not found:
        raise ConfigError(f"Config key {key!r}: {pattern!r} matches no parameter; {suggest(pattern, list(names))}")
    return found


def _select(node: Params, names: set[str], prefix: str) -> Params:
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            child = _select(value, names, f"{prefix}{key}/")
            if child:
                kept[key] = child
        elif prefix + key in names:
            kept[key] = value
    return kept
