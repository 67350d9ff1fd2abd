"""Eight virtual CPU devices, runtime shape checks on the package, warnings as errors (pyproject.toml)."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Small programs spend their time in the compiler: without its last optimisations the suite takes less than half as long.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("ssm_jax", "beartype.beartype")
