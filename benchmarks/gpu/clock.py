"""Time and memory of compiled JAX programs, on a GPU by the protocol: kernels as the driver's own counters saw them.

``kernel_ms`` is the sum of a call's kernels (CUPTI), without what lies between them; ``wall_ms`` is a call's share of many that
were sent off without waiting, which is what a program gets. Inputs take turns when they would stay in the cache.
"""

import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import stages

from benchmarks.gpu.floors import EXPONENTIALS_PER_CYCLE, H200, Machine

# Three times what an H200's second-level cache holds.
OUT_OF_CACHE = 3 * 60 * 2**20
MOST_SETS = 16
# A program of many small kernels is its gaps: there the wall is the measure, and the profiler would drown in records.
MOST_PROFILED_MS = 50.0
CALLS, ITERATIONS = 50, 20
GIB = 2**30


class _TakingTurns(stages.Compiled):
    """A compiled program whose calls go through several sets of arguments, whatever arguments they name."""

    def __init__(self, compiled: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> None:
        self.compiled, self.sets = compiled, itertools.cycle(sets)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.compiled(*next(self.sets))


def sets_of(make: Callable[[int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As many sets of arguments as do not fit into the cache; ``make`` is given the number of each."""
    first = make(0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    return [first, *map(make, range(1, min(MOST_SETS, math.ceil(OUT_OF_CACHE / size))))]


def measure(
    compiled: Any, sets: Sequence[tuple[Any, ...]], budget: float = 2.0, profile: bool = True
) -> dict[str, Any]:
    """``wall_ms``, and ``kernel_ms`` where the profiler works; ``timer`` says which of them ``ms`` is.

    As many calls as ``budget`` seconds allow, but three; without a budget a single one.
    """
    turns = _TakingTurns(compiled, sets)
    jax.block_until_ready(turns())
    once = _seconds(turns, 1)
    calls = max(3, min(CALLS, int(budget / once)))
    wall = 1e3 * (_seconds(turns, calls) if budget else once)
    measured = {"ms": wall, "timer": "wall", "wall_ms": wall}
    if profile and wall <= MOST_PROFILED_MS:
        times, why = _profiled(turns, min(calls, ITERATIONS))
        if times:
            kernel = statistics.median(times)
            measured |= {"ms": kernel, "timer": "kernels", "kernel_ms": kernel, "kernel_ms_min": min(times)}
        else:
            measured["no_kernel_ms"] = why
    return measured


def _seconds(turns: _TakingTurns, calls: int) -> float:
    """Of one call, where several are sent off at once."""
    start = time.perf_counter()
    for _ in range(calls):
        last = turns()
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / calls


def _profiled(turns: _TakingTurns, iterations: int) -> tuple[list[float] | None, str]:
    """Milliseconds of the kernels of each call, or why there are none."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(turns, iterations=iterations)()
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"[:200]
    return ([times] if isinstance(times, float) else times), "no kernel was recorded"


def memory(compiled: Any) -> dict[str, float]:
    """GiB as compiled: temporary arrays, and all that is alive at once with arguments and results."""
    found = compiled.memory_analysis()
    whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return {"temp_gib": found.temp_size_in_bytes / GIB, "peak_gib": (whole - found.alias_size_in_bytes) / GIB}


def machine(device: Any, tiny: bool = False) -> tuple[Machine, dict[str, Any]]:
    """The rates of this machine, and what a reader must know of it."""
    size = 2**10 if tiny else 2**28
    edge = 64 if tiny else 8192
    x = jnp.ones(size, jnp.float32)
    copied = measure(jax.jit(lambda x: x + 1).lower(x).compile(), [(x,)], profile=not tiny)
    a = jax.random.normal(jax.random.key(0), (edge, edge), jnp.bfloat16)
    product = measure(jax.jit(jnp.matmul).lower(a, a).compile(), [(a, a)], profile=not tiny)
    bandwidth, matmul = 2e3 * x.nbytes / copied["ms"], 2e3 * edge**3 / product["ms"]
    described = _describe()
    clock, cores = described.get("max_clock_mhz"), getattr(device, "core_count", None)
    known = clock is not None and cores is not None
    exponentials = cores * EXPONENTIALS_PER_CYCLE * 1e6 * clock if known else H200.exponentials
    described |= {
        "gpu": device.device_kind,
        "multiprocessors": cores,
        "copy_tb_per_s": bandwidth / 1e12,
        "bf16_matmul_tflop_per_s": matmul / 1e12,
        "exponentials_t_per_s": exponentials / 1e12,
        "exponentials_from": "multiprocessors and clock" if known else "an H200's, as those of this GPU are unknown",
        "timer_of_ceilings": copied["timer"],
    }
    return Machine(bandwidth, matmul, exponentials), described


def _describe() -> dict[str, Any]:
    """Driver, clocks and power limit, where NVIDIA's tool is there to tell."""
    fields = ("name", "driver_version", "clocks.max.sm", "power.limit", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
        _, driver, clock, power, total = (part.strip() for part in line.split(","))
        return {"driver": driver, "max_clock_mhz": float(clock), "power_limit_w": power, "memory_mib": total}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {"driver": "unknown: nvidia-smi did not answer"}
