"""TPU kernels compiled for chips that are not there: their cost in bundles, memory, and what devices exchange."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import static_tpu
from ssm_jax.ops import linear_recurrence
from ssm_jax.ops.selective_scan import selective_scan

RECORDED = json.loads(static_tpu.RESULTS.read_text())["tpu"]
BATCH, LENGTH, CHUNK, DEVICES = 4, 512, 32, {"data": 2, "tensor": 2}


@pytest.fixture(autouse=True, scope="module")
def _no_questions_to_a_cloud() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield


@pytest.mark.parametrize("row", static_tpu.rows(), ids=lambda row: static_tpu.name_of(*row))
def test_no_kernel_costs_more_than_recorded(row: tuple[str, str, str, bool]) -> None:
    assert static_tpu.measure(*row)["bundles_per_step"] <= RECORDED[static_tpu.name_of(*row)]["bundles_per_step"]


def test_what_is_recorded_is_measured() -> None:
    assert {static_tpu.name_of(*row) for row in static_tpu.rows()} == set(RECORDED)


def compiled(chip: str, mesh_sizes: dict[str, int], function: Any, arguments: dict[str, Any], specs: Any) -> Any:
    """``function`` of keyword arguments given as (shape, dtype), for a mesh of TPUs."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=static_tpu.CHIPS[chip])
    devices = np.array(topology.devices[: int(np.prod(list(mesh_sizes.values())))])
    mesh = Mesh(devices.reshape(tuple(mesh_sizes.values())), tuple(mesh_sizes), axis_types=(AxisType.Auto,) * 2)
    given = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*specs[name])))
        for name, (shape, dtype) in arguments.items()
    }
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(given).lower(lowering_platforms=("tpu",)).compile()


def exchanges(program: Any) -> set[str]:
    return set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text()))


def scan_case(channels: int, entries: int, dtype: Any, masked: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Shape and dtype, axes of a mesh) of every argument."""
    row, lanes = ((BATCH, LENGTH, channels), dtype), ("data", None, "tensor")
    maps, vector = ((BATCH, LENGTH, entries), dtype), ((channels,), jnp.float32)
    arguments: dict[str, Any] = {"x_BLE": row, "dt_BLE": row, "z_BLE": row, "B_BLN": maps, "C_BLN": maps}
    arguments |= {"A_EN": ((channels, entries), jnp.float32), "D_E": vector, "dt_bias_E": vector}
    specs: dict[str, Any] = dict.fromkeys(("x_BLE", "dt_BLE", "z_BLE"), lanes)
    specs |= dict.fromkeys(("B_BLN", "C_BLN"), ("data",)) | dict.fromkeys(("A_EN", "D_E", "dt_bias_E"), ("tensor",))
    if masked:
        arguments |= {"reset": ((BATCH, LENGTH), jnp.bool_), "lengths": ((BATCH,), jnp.int32)}
        specs |= {"reset": ("data",), "lengths": ("data",)}
    return arguments, specs


def forward(given: dict[str, Any]) -> Any:
    return selective_scan(**given, chunk_size=CHUNK)


def backward(given: dict[str, Any]) -> Any:
    masks = {name: given[name] for name in ("reset", "lengths") if name in given}
    inputs = {name: x for name, x in given.items() if name not in masks}
    (y, state), pull_back = jax.vjp(lambda inputs: selective_scan(**inputs, **masks, chunk_size=CHUNK), inputs)
    return pull_back((y, state))


@pytest.mark.parametrize("chip", static_tpu.CHIPS)
@pytest.mark.parametrize("sizes", [{"data": 1, "tensor": 1}, DEVICES], ids=["one", "four"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scan_compiles_and_copies_no_sequence(chip: str, sizes: dict[str, int], dtype: Any) -> None:
    """Forward, devices exchange nothing; backward, they add up the gradients of what they share, and gather nothing.

    Beside arguments and results there are the kept states, and what the kernels add up or read per token: B and C in parts, 256
    bytes; their gradients and one more sum per block of channels, 4 * 128 lanes each.
    """
    channels, entries = 2048, 16
    arguments, specs = scan_case(channels, entries, dtype, masked=False)
    lanes, local = BATCH // sizes["data"], channels // sizes["tensor"]
    kept = 4 * lanes * LENGTH // CHUNK * entries * local
    tokens = lanes * LENGTH
    program = compiled(chip, sizes, forward, arguments, specs)
    assert "tpu_custom_call" in program.as_text()
    assert exchanges(program) == set()
    assert program.memory_analysis().temp_size_in_bytes <= kept + tokens * 256 + 2**20
    program = compiled(chip, sizes, backward, arguments, specs)
    assert exchanges(program) == ({"all-reduce"} if sizes is DEVICES else set())
    sums = tokens * (local // 1024) * 4 * 128 * (1 + 2 * entries / CHUNK)
    recomputed_y = tokens * local * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes <= kept + 2 * sums + tokens * 256 + recomputed_y + 2**21


@pytest.mark.parametrize(
    ("channels", "entries", "dtype", "chunk"),
    [(1536, 16, jnp.bfloat16, 32), (1030, 21, jnp.float32, 7), (64, 100, jnp.float32, 32), (256, 16, jnp.float32, 128)],
)
def test_scan_compiles_at_any_size(channels: int, entries: int, dtype: Any, chunk: int) -> None:
    """With resets and lengths; nothing overflows the memory of a core."""
    arguments, specs = scan_case(channels, entries, dtype, masked=True)

    def both(given: dict[str, Any]) -> Any:
        masks = {name: given[name] for name in ("reset", "lengths")}
        inputs = {name: x for name, x in given.items() if name not in masks}
        (y, state), pull_back = jax.vjp(lambda i: selective_scan(**i, **masks, chunk_size=chunk), inputs)
        return pull_back((y, state))

    program = compiled("v5e", {"data": 1, "tensor": 1}, both, arguments, specs)
    assert program.as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize("chip", static_tpu.CHIPS)
@pytest.mark.parametrize("sizes", [{"data": 1, "tensor": 1}, DEVICES], ids=["one", "four"])
def test_recurrence_compiles_and_copies_nothing(chip: str, sizes: dict[str, int]) -> None:
    shape, spec = ((BATCH, LENGTH, 2048), jnp.float32), ("data", None, "tensor")
    arguments, specs = {"a": shape, "b": shape}, {"a": spec, "b": spec}
    program = compiled(chip, sizes, lambda given: linear_recurrence(**given)[0], arguments, specs)
    assert "tpu_custom_call" in program.as_text()
    assert exchanges(program) == set()
    assert program.memory_analysis().temp_size_in_bytes <= 2**18
