"""Configuration: frozen dataclasses, filled from YAML and ``key.sub=value`` overrides.

There is one rule: a key that no dataclass field has is an error that names the nearest valid key, and a value of the
wrong type is an error that names the key and the type. Nothing is ignored.
"""

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from ssm_jax.errors import ConfigError, UserError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: plain YAML 1.1 reads ``3e-4`` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """A YAML scalar, list or mapping, as written on the command line."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError naming the file if it is missing or is not a mapping."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"Config file {path} cannot be read ({error.strerror}); check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Config file {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"Config file {path} holds a {type(content).__name__}; it must hold `key: value` lines.")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``content`` with ``a.b=value`` assignments applied in order; values are YAML."""
    result = _copy(content)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"Override {override!r} is not of the form key.sub=value.")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"Override {override!r}: {parent!r} holds the value {child!r}, not a section.")
            node = child
        try:
            node[leaf] = parse_value(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"Override {override!r}: the value is not valid YAML.") from error
    return result


def from_dict(cls: type[T], content: Mapping[str, Any], path: str = "") -> T:
    """Builds the dataclass ``cls`` from a mapping, checking every key and every type.

    Raises:
        ConfigError: unknown key (with the nearest valid one), missing key, wrong type, or a value the class refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise ConfigError(_unknown_key(path + str(key), str(key), fields))
        values[key] = _convert(value, hints[key], path + key)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"Config key {path + name!r} is required; set {path + name}=...")
    try:
        return cls(**values)
    except ValueError as error:
        section = f"Config section {path.rstrip('.')!r}: " if path else ""
        raise ConfigError(f"{section}{error}.") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain mapping of a dataclass, ready for YAML or JSON; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))


def dump_yaml(config: Any) -> str:
    """The resolved config as YAML, keys in field order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def suggest(name: str, valid: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` when something is close, else the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(sorted(valid))}."


def main(run: Callable[[Sequence[str]], None]) -> None:
    """Runs a script's ``run(argv)``: a UserError becomes one line on stderr and exit status 2."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _unknown_key(where: str, key: str, fields: Mapping[str, Any]) -> str:
    return f"Config key {where!r} is unknown; {suggest(key, list(fields))}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, args, where)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise ConfigError(f"Config key {where!r} is {value!r}; {suggest(str(value), [str(arg) for arg in args])}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where + ".")
        raise _wrong_type(value, f"a section with the keys of {hint.__name__}", where)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, args, where)
    if origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return {key: _convert(item, args[1] if args else Any, f"{where}.{key}") for key, item in value.items()}
        raise _wrong_type(value, "a mapping", where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise _wrong_type(value, getattr(hint, "__name__", str(hint)), where)


def _convert_union(value: Any, hint: Any, args: tuple[Any, ...], where: str) -> Any:
    for arg in args:
        try:
            return _convert(value, arg, where)
        except ConfigError as error:
            if dataclasses.is_dataclass(arg) and isinstance(value, Mapping):
                raise error
    raise _wrong_type(value, " or ".join(_said(arg) for arg in args), where)


def _said(hint: Any) -> str:
    """A type as the reader of a message would call it."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(value, "a list", where)
    fixed = origin is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise _wrong_type(value, f"a list of {len(args)} values", where)
    hints = args if fixed else (args[0] if args else Any,) * len(value)
    return origin(
        _convert(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _wrong_type(value: Any, expected: str, where: str) -> ConfigError:
    return ConfigError(f"Config key {where!r} is {value!r} ({type(value).__name__}); it must be {expected}.")
