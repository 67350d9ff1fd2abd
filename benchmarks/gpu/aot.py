"""Every program of the benchmark, compiled for an H200 that is not there."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu import clock, models
from benchmarks.gpu.cases import Case, Run, all_cases, program

TARGET = Path(__file__).parents[1] / "targets" / "h200.txtpb"


def compile_all(only: Callable[[str], Any]) -> dict[str, Any]:
    """Seconds to compile and GiB by program, or why it did not compile or is not there; printed as they come."""
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET.read_text())
    except Exception as error:
        raise SystemExit(f"No compiler for NVIDIA GPUs is here ({error}): pip install -e '.[aot]'") from error
    sharding = SingleDeviceSharding(topology.devices[0])

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    found: dict[str, Any] = {}
    for name, build in _programs(abstract):
        if not only(name):
            continue
        if isinstance(build, str):
            found[name] = {"missing": build}
            print(f"{name:75} missing: {build}", flush=True)
            continue
        start = time.perf_counter()
        try:
            memory = {key: round(value, 3) for key, value in clock.memory(build()).items()}
            found[name] = {**memory, "compile_s": round(time.perf_counter() - start, 1)}
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(f"{name:75}", *(f"{key} {value}" for key, value in found[name].items()), flush=True)
    return found


def _programs(abstract: Callable[[Any], Any]) -> Iterator[tuple[str, Callable[[], Any] | str]]:
    for case in all_cases():
        for row, run in case.contestants().items():
            if isinstance(run, str):
                yield f"{case.name}, {row}", run
                continue
            for passes in case.walks:
                name = f"{case.name}, {passes}, {row}"
                yield name, (lambda case=case, run=run, passes=passes: _compile(case, run, passes, abstract))
    for name, build in models.programs(models.MAMBA_130M, abstract):
        yield f"models, {name}", build


def _compile(case: Case, run: Run, passes: str, abstract: Callable[[Any], Any]) -> Any:
    key = jax.random.key(0)
    inputs = jax.eval_shape(case.inputs, key)
    dy = jax.eval_shape(lambda key: case.cotangent(key, False), key)
    return jax.jit(program(run, passes)).trace(*abstract((inputs, dy))).lower(lowering_platforms=("cuda",)).compile()
