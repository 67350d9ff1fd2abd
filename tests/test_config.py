"""Configuration: YAML, overrides, and what is said when they are wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from ssm_jax import config
from ssm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    names: tuple[str, ...] = ()
    limit: int | None = None
    on: bool = False


def test_values_arrive_typed() -> None:
    got = config.from_dict(
        Outer, {"steps": 3, "inner": {"rate": 1, "betas": [0.5, 0.6]}, "names": ["a", "b"], "limit": 4, "on": True}
    )
    assert got == Outer(3, Inner(1.0, (0.5, 0.6)), ("a", "b"), 4, True)
    assert isinstance(got.inner.rate, float)


def test_to_dict_and_back_is_the_identity(tmp_path: Path) -> None:
    original = Outer(3, Inner(float("inf"), kind="linear"), ("x",))
    path = tmp_path / "c.yaml"
    path.write_text(config.dump_yaml(original))
    assert config.from_dict(Outer, config.read_yaml(path)) == original


def test_numbers_with_exponents_are_numbers() -> None:
    assert config.parse_value("3e-4") == 3e-4
    assert config.parse_value("1_000") == 1000
    assert config.parse_value("[1, 2.5]") == [1, 2.5]
    assert config.parse_value("e4") == "e4"


def test_overrides_apply_in_order_and_leave_the_source_alone() -> None:
    source = {"steps": 1, "inner": {"rate": 0.5}}
    assert config.apply_overrides(source, ["inner.rate=3e-4", "steps=2", "steps=7", "inner.kind=linear"]) == {
        "steps": 7,
        "inner": {"rate": 3e-4, "kind": "linear"},
    }
    assert source == {"steps": 1, "inner": {"rate": 0.5}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": 1, "inner": {"rat": 1}}, r"Config key 'inner.rat' is unknown; did you mean 'rate'\?"),
        ({"steps": 1, "zzz": 1}, "Config key 'zzz' is unknown; valid names: inner, limit, names, on, steps"),
        ({}, "Config key 'steps' is required"),
        ({"steps": "many"}, r"Config key 'steps' is 'many' \(str\); it must be int"),
        ({"steps": True}, r"Config key 'steps' is True \(bool\)"),
        ({"steps": 1, "on": 1}, r"Config key 'on' is 1 \(int\); it must be bool"),
        ({"steps": 1, "inner": {"betas": [0.9]}}, "'inner.betas' is .* it must be a list of 2 values"),
        ({"steps": 1, "inner": {"kind": "cosin"}}, r"'inner.kind' is 'cosin'; did you mean 'cosine'\?"),
        ({"steps": 1, "inner": 4}, "'inner' is 4 .* it must be a section with the keys of Inner"),
        ({"steps": 1, "limit": "x"}, "'limit' is 'x'"),
        ({"steps": 1, "names": [1]}, r"'names\[0\]' is 1"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.from_dict(Outer, content)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "not of the form key.sub=value"),
        ("steps.x=1", "'steps' holds the value 1"),
        ("a=[1", "not valid YAML"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.apply_overrides({"steps": 1}, [override])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read \(No such file"):
        config.read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="list.yaml holds a list; it must hold `key: value` lines"):
        config.read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="broken.yaml is not valid YAML"):
        config.read_yaml(tmp_path / "broken.yaml")


def test_a_script_prints_one_line_and_exits_with_2() -> None:
    code = (
        "from ssm_jax.config import main\nfrom ssm_jax.errors import DataError\n"
        "def run(argv):\n    raise DataError('File x is empty; give text.')\nmain(run)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: File x is empty; give text.\n"
