"""Programs compiled for hardware that is not there: ``pip install -e '.[test,aot]'`` and ``pytest -m compile tests/compile``."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NEEDED = ("jax_plugins.xla_cuda13", "libtpu", "triton", "jax_triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.compile)


@pytest.fixture(autouse=True, scope="session")
def _compilers() -> None:
    absent = [name for name in NEEDED if _absent(name)]
    if absent:
        pytest.fail(f"{', '.join(absent)} cannot be imported; these tests need pip install 'ssm_jax[test,aot]'")


def _absent(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
