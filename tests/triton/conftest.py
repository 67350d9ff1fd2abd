"""Kernels in Triton's interpreter: run with ``TRITON_INTERPRET=1``, which makes every launch of the process an interpreted one."""

from pathlib import Path

import pytest

from ssm_jax.ops import triton_call

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.triton)
            # Triton's own, and the reason why it needs numpy < 2.4.
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    import os

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("set TRITON_INTERPRET=1: these tests run kernels in Triton's interpreter")
    if reason := triton_call.missing():
        pytest.fail(reason)
