"""Eight virtual CPU devices, runtime shape checks on the package, warnings as errors (pyproject.toml)."""

import gc
import importlib.metadata
import os
from pathlib import Path

import hypothesis
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Small programs spend their time in the compiler: without its last optimisations the suite takes less than half as long. The
# older of two emitters of fused loops compiles twice as fast; later versions of jaxlib have no other than the slow one, and stop
# at a flag that they do not know.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []),
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("ssm_jax", "beartype.beartype")

# How long an example takes says what else the machine does.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 15_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between two files, drops compiled programs once there are many.

    Every one holds about five memory mappings, a process may have 65,530, and XLA's compiler dies of the next one.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    if MAPPINGS.is_file() and len(MAPPINGS.read_bytes().splitlines()) > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
