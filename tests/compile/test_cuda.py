"""GPU kernels compiled for an H200 that is not there: the cost of their machine code, memory, and what devices exchange."""

import collections
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ssm_jax
from benchmarks import static_cuda
from ssm_jax.ops import dispatch
from ssm_jax.optim import OptimConfig
from ssm_jax.training import state as state_lib
from ssm_jax.training.step import abstract_batch, compile_step, make_step

RECORDED = json.loads(static_cuda.RESULTS.read_text())["cuda"]
TARGET = Path(__file__).parents[2] / "benchmarks/targets/h200.txtpb"
FLOAT32, BFLOAT16 = jnp.float32, jnp.bfloat16


@pytest.fixture(scope="module")
def h200s() -> list[Any]:
    """Eight of them, on one host."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x8", target_config=TARGET.read_text())
    return list(topology.devices)


def mesh_of(devices: list[Any], **sizes: int) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    grid = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


# The machine code of each kernel.


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    return static_cuda.table()


@pytest.mark.parametrize("row", RECORDED)
def test_no_kernel_costs_more_than_recorded(row: str, measured: dict[str, dict[str, float]]) -> None:
    for name, value in RECORDED[row].items():
        if name != "tensor_instructions":
            assert measured[row][name] <= value, name


def test_every_kernel_is_recorded(measured: dict[str, dict[str, float]]) -> None:
    assert set(measured) == set(RECORDED)


@pytest.mark.parametrize(("kernel", "slots"), [("forward", 12), ("backward", 50)])
def test_a_scan_takes_fewer_instructions_than_its_target(
    kernel: str, slots: float, measured: dict[str, dict[str, float]]
) -> None:
    assert measured[f"selective_scan {kernel}"]["slots_per_32"] <= slots


@pytest.mark.parametrize("row", [row for row in RECORDED if row.startswith(("retention", "ssd"))])
def test_products_are_the_tensor_cores(row: str, measured: dict[str, dict[str, float]]) -> None:
    """And heads of 64 and 128 spill nothing; a forward pass moves what it must, once."""
    assert measured[row]["tensor_instructions"] > 0
    assert measured[row]["spilled_bytes"] == 0 or not row.endswith(("64x64", "128x128", "128x64"))
    assert measured[row].get("bytes_over_floor", 1) <= 1.1


# One op in a program.


def scan_inputs(mesh: Mesh, batch: int, length: int, channels: int, entries: int = 16) -> dict[str, Any]:
    def place(*shape: int, spec: tuple[str | None, ...], dtype: Any = BFLOAT16) -> jax.ShapeDtypeStruct:
        known = (axis if axis in mesh.axis_names else None for axis in spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*known)))

    row = place(batch, length, channels, spec=("data", None, "tensor"))
    maps = place(batch, length, entries, spec=("data",))
    vector = place(channels, spec=("tensor",), dtype=FLOAT32)
    A = place(channels, entries, spec=("tensor",), dtype=FLOAT32)
    return {
        "x_BLE": row,
        "dt_BLE": row,
        "A_EN": A,
        "B_BLN": maps,
        "C_BLN": maps,
        "D_E": vector,
        "z_BLE": row,
        "dt_bias_E": vector,
    }


def scan_and_gradients(inputs: dict[str, jax.Array]) -> Any:
    y, pull = jax.vjp(lambda inputs: ssm_jax.ops.selective_scan(**inputs)[0], inputs)
    return y, pull(y)


def compiled(function: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def kernels_in(text: str) -> int:
    return len(re.findall(r'custom_call_target="(?:__gpu\$xla\.gpu\.)?triton(?:_kernel_call)?"', text))


def exchanges_in(text: str) -> set[str]:
    return set(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 4}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_scan_on_a_mesh_gathers_nothing(sizes: dict[str, int], h200s: list[Any]) -> None:
    """Forward nothing is exchanged; backward, gradients of what is shared are added up."""
    mesh = mesh_of(h200s, **sizes)
    inputs = scan_inputs(mesh, 8, 512, 256)
    forward = compiled(lambda inputs: ssm_jax.ops.selective_scan(**inputs), mesh, inputs).as_text()
    assert kernels_in(forward) >= 1
    assert not exchanges_in(forward)
    both = compiled(scan_and_gradients, mesh, inputs).as_text()
    assert kernels_in(both) >= 2
    assert exchanges_in(both) == (set() if mesh.size == 1 else {"all-reduce"})


def test_a_convolution_on_a_mesh_gathers_nothing(h200s: list[Any]) -> None:
    """Nor does a convolution's backward pass, which adds up two gradients."""
    mesh = mesh_of(h200s, data=2, fsdp=2, tensor=2)
    x = scan_inputs(mesh, 8, 512, 256)["x_BLE"]
    arguments = (
        x,
        jax.ShapeDtypeStruct((4, 256), FLOAT32, sharding=NamedSharding(mesh, PartitionSpec(None, "tensor"))),
    )
    conv = functools.partial(ssm_jax.ops.causal_conv, activation="silu")
    forward = compiled(lambda x, kernel: conv(x, kernel), mesh, *arguments).as_text()
    assert kernels_in(forward) == 1
    assert not exchanges_in(forward)
    both = compiled(lambda x, kernel: jax.vjp(lambda *a: conv(*a)[0], x, kernel)[1](x), mesh, *arguments).as_text()
    assert kernels_in(both) == 1
    assert exchanges_in(both) == {"all-reduce"}


def test_memory_of_a_scan_is_its_kept_states_and_partial_sums(h200s: list[Any]) -> None:
    """A layer of mamba-130m. Every byte is accounted for; slack is what the allocator rounds."""
    batch, length, channels, entries, chunk, block = 8, 2048, 1536, 16, 32, 32
    mesh = mesh_of(h200s, data=1)
    inputs = scan_inputs(mesh, batch, length, channels, entries)
    memory = compiled(scan_and_gradients, mesh, inputs).memory_analysis()
    row, maps = 2 * batch * length * channels, 2 * batch * length * entries
    given = 3 * row + 2 * maps + 4 * channels * (entries + 2)
    assert memory.argument_size_in_bytes == given
    assert memory.output_size_in_bytes - (row + given) < 1024
    states = 4 * batch * channels * entries * (length // chunk)
    sums = 2 * (channels // block) * 2 * maps
    segments = 3
    ends = 2 * 4 * segments * batch * channels * entries
    scratch = 4 * segments * batch * channels * entries * (chunk // 4)
    assert memory.temp_size_in_bytes <= 1.05 * (states + sums + 2 * 2 * maps + 2 * ends + scratch)


# A whole training step.


def mamba_step(mesh: Mesh, rows: int = 8, length: int = 512) -> Any:
    model = ssm_jax.build("mamba", vocab_size=512, d_model=256, n_layers=4, dtype="bfloat16")
    optim = OptimConfig()
    shapes = state_lib.abstract(model, optim, mesh)
    return compile_step(make_step(model, optim), *shapes, abstract_batch(rows, length, mesh), mesh)


def test_a_mamba_training_step_runs_the_kernels_on_every_device(
    h200s: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split over lanes, parameters and channels, with kernels nothing is gathered that is not gathered without them."""
    mesh = mesh_of(h200s, data=2, fsdp=2, tensor=2, sequence=1)
    with_kernels = mamba_step(mesh).as_text()
    monkeypatch.setitem(dispatch.PREFERENCE, "cuda", ("xla",))
    without = mamba_step(mesh).as_text()
    assert kernels_in(with_kernels) >= 2
    assert kernels_in(without) == 0
    more = collections.Counter(gathers_in(with_kernels)) - collections.Counter(gathers_in(without))
    # The mask of document starts, half a kilobyte per device; the compiler's choice.
    assert set(more) <= {"pred[4,512]"}


def gathers_in(text: str) -> list[str]:
    return re.findall(r"= (\w+\[[\d,]*\])\S* all-gather", text)
