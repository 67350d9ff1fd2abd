"""Typed reading of published config files: errors name the key; the caller adds the file."""

import math
from collections.abc import Mapping
from typing import Any

from ssm_jax.errors import LayoutError

_REQUIRED = object()


def integer(content: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> int:
    """An integer; 2.0 counts as one."""
    value = _get(content, key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise LayoutError(f"{key!r} is {value!r}; it must be an integer.")
    return value


def number(content: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> float:
    """A number, infinity in any spelling included."""
    return _number(_get(content, key, default), key)


def boolean(content: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> bool:
    """true or false."""
    value = _get(content, key, default)
    if not isinstance(value, bool):
        raise LayoutError(f"{key!r} is {value!r}; it must be true or false.")
    return value


def text(content: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> str:
    """A string."""
    value = _get(content, key, default)
    if not isinstance(value, str):
        raise LayoutError(f"{key!r} is {value!r}; it must be a string.")
    return value


def limits(content: Mapping[str, Any], key: str) -> tuple[float, float]:
    """Bounds [low, high], (0, inf) when absent; an upper bound of null is infinite."""
    value = content.get(key, [0.0, math.inf])
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise LayoutError(f"{key!r} is {value!r}; it must be [low, high].")
    low, high = value
    return _number(low, key), math.inf if high is None else _number(high, key)


def expect(content: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """Raises LayoutError unless ``key`` is absent or has one of the values that ssm_jax computes."""
    if key in content and content[key] not in allowed:
        raise LayoutError(f"{key!r} is {content[key]!r}; ssm_jax has only {' or '.join(map(repr, allowed))}.")


def _get(content: Mapping[str, Any], key: str, default: Any) -> Any:
    if key not in content and default is _REQUIRED:
        raise LayoutError(f"{key!r} is missing.")
    return content.get(key, default)


def _number(value: Any, key: str) -> float:
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, str) and value.lower().lstrip("+") in ("inf", "infinity"):
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise LayoutError(f"{key!r} is {value!r}; it must be a number.")
    return float(value)
