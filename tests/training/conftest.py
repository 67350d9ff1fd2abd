"""Small prepared data, and the settings of a run that takes seconds."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from ssm_jax.data.prepare import Form, Settings, prepare
from ssm_jax.data.sources import TextFile
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.training import load_run_config, train

Overrides = Callable[..., list[str]]
Run = Callable[..., dict[str, Any]]


def prepare_bytes(
    folder: Path, name: str = "prepared", word: str = "line", seq_len: int = 32, form: Form = "rows"
) -> Path:
    """Twelve short files as prepared data; returns its folder."""
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(f"{word} {j} of file {i}: {i * j}\n" for j in range(15)))
    files = [TextFile(path, path.name) for path in sorted(folder.glob("*.txt"))]
    prepare(files, folder / name, ByteTokenizer(), Settings(form=form, seq_len=seq_len, validation_percent=20.0))
    return folder / name


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of one shape compile once; processes that a test starts share the cache through the environment."""
    folder = str(tmp_path_factory.mktemp("compilation_cache"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_bytes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files as whole documents of about 300 tokens."""
    return prepare_bytes(tmp_path_factory.mktemp("articles"), form="documents")


@pytest.fixture(scope="session")
def overrides(data: Path) -> Overrides:
    """``key.sub=value`` for a run into a folder; ``optim__lr=1`` changes a key, None drops it."""

    def make(output: Path, **changes: Any) -> list[str]:
        settings = {
            "output": output,
            "model.family": "mamba",
            "model.d_model": 8,
            "model.n_layers": 1,
            "data.path": data,
            "batch.size": 8,
            "train.steps": 6,
            "optim.lr": 0.01,
            "optim.warmup_steps": 2,
            "mesh.data": 1,
            "mesh.fsdp": 8,
            "eval.every": 3,
            "eval.batches": 2,
            "checkpoint.every": 2,
            "log.tensorboard": "false",
        }
        settings.update({key.replace("__", "."): value for key, value in changes.items()})
        return [f"{key}={value}" for key, value in settings.items() if value is not None]

    return make


@pytest.fixture
def run(overrides: Overrides, tmp_path: Path) -> Run:
    """Trains in ``run`` below the test's folder, with changes of the settings above."""

    def start(**changes: Any) -> dict[str, Any]:
        return train(load_run_config(None, overrides(changes.pop("output", tmp_path / "run"), **changes)))

    return start
