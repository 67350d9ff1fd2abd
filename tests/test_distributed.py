"""One process needs nothing; several are found by their environment."""

import jax
import pytest

from ssm_jax import distributed
from ssm_jax.errors import ConfigError


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What ``jax.distributed.initialize`` is called with, in an environment without a cluster."""
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


def test_a_single_process_does_nothing(joined: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.initialize()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.initialize()
    assert joined == []
    assert distributed.is_main()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)


def test_the_environment_names_a_coordinator(joined: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ConfigError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        distributed.initialize()
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID is 'three'; it must be a number"):
        distributed.initialize()
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    distributed.initialize()
    assert joined == [("host:1234", 4, 3)]


@pytest.mark.parametrize(
    "environment",
    [{"SLURM_NTASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "8"}, {"TPU_WORKER_HOSTNAMES": "a,b"}],
)
def test_a_cluster_launch_is_left_to_jax(
    joined: list[tuple], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == [(None, None, None)]
