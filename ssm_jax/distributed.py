"""Several processes as one program. A single process needs no call, no network and no cluster."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssm_jax.errors import ConfigError, UserError
from ssm_jax.typing import PyTree

_PATIENCE_S = 1.0


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


@contextlib.contextmanager
def failing_alone() -> Iterator[None]:
    """Around the work of a process that others wait for: an error ends it at once, with its message and status.

    Otherwise JAX would first wait minutes for the others to finish, who wait for this one. They end by the launcher's hand, or when
    they miss its heartbeat. With one process nothing changes.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(_PATIENCE_S)  # if it is that another one went away, that one is to be seen first
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def barrier(name: str) -> None:
    """Returns in every process when all have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_main(value: int) -> int:
    """The main process's value, in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def everywhere(error: Exception | None) -> bool:
    """True in every process if none of them comes with an error: so that one that failed leaves nobody waiting."""
    if jax.process_count() == 1:
        return error is None
    from jax.experimental import multihost_utils

    return not bool(np.any(multihost_utils.process_allgather(np.int32(error is not None))))


def preempted(step: int) -> bool:
    """True in every process, at the same step, after any of them got SIGTERM. Needs ``initialize`` to have joined processes."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))


def local_copy(tree: PyTree, mesh: Mesh) -> PyTree:
    """Whole arrays on this process's first device, from arrays on a mesh of all processes; as they are with one process."""
    if jax.process_count() == 1:
        return tree
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.addressable_data(0)), whole)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"Environment variable {variable} is {text!r}; it must be a number.")
    return int(text)
