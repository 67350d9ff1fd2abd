"""Several processes as one program. A single process needs no call, no network and no cluster."""

import os
from collections.abc import Mapping

import jax

from ssm_jax.errors import ConfigError


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes if the arguments or the environment tell of any; else does nothing.

    The environment: ``JAX_COORDINATOR_ADDRESS`` (host:port) with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, or a SLURM, Open MPI
    or Cloud TPU launch of more than one process. Must come before the first use of a device.

    Raises:
        ConfigError: a coordinator without a process count and index.
    """
    if jax.distributed.is_initialized():
        return
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and not cluster_launch(os.environ):
        return
    count = num_processes if num_processes is not None else _number("JAX_NUM_PROCESSES")
    index = process_id if process_id is not None else _number("JAX_PROCESS_ID")
    if address is not None and not cluster_launch(os.environ) and (count is None or index is None):
        raise ConfigError(f"Coordinator {address} was named alone; set JAX_NUM_PROCESSES and JAX_PROCESS_ID as well.")
    jax.distributed.initialize(address, count, index)


def cluster_launch(environment: Mapping[str, str]) -> bool:
    """True if a launcher that JAX can ask for the coordinator started more than one process."""
    counts = (environment.get("SLURM_NTASKS", "1"), environment.get("OMPI_COMM_WORLD_SIZE", "1"))
    return any(count.isdigit() and int(count) > 1 for count in counts) or "," in environment.get(
        "TPU_WORKER_HOSTNAMES", ""
    )


def process_index() -> int:
    """Index of this process, 0 when there is only one."""
    return jax.process_index()


def process_count() -> int:
    """Number of processes of this program."""
    return jax.process_count()


def is_main() -> bool:
    """True in the one process that writes logs and files."""
    return jax.process_index() == 0


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"Environment variable {variable} is {text!r}; it must be a number.")
    return int(text)
