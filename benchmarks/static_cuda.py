"""What the GPU kernels cost, read from their machine code: no GPU is needed, Triton brings the compiler and its own assembler.

    python -m benchmarks.static_cuda

Per kernel and shape: registers, bytes spilled, and the instructions of its inner loops per 32 elements of work (for a scan one
element is one state entry of one channel and token), the "issue slots" that bound a kernel which computes more than it loads.
Compare with mamba_ssm's CUDA scan, counted in the same way: 22 forward, 70 and atomics backward. For a kernel that memory bounds,
the bytes it moves per element too.
"""

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_jax.ops import triton_call
from ssm_jax.ops.triton_call import Launch

RESULTS = Path(__file__).parent / "results" / "static.json"


class Cost(NamedTuple):
    """Of a compiled kernel. ``loops``: instructions of each innermost loop that computes an exponential or a matrix product, in the
    order of the code."""

    registers: int
    spilled_bytes: int
    loops: tuple[int, ...]
    instructions: dict[str, int]


def compile_launch(launch: Launch, capability: int = 90) -> Cost:
    """Compiles one launch for ``capability`` and counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    pointers = (*launch.arguments, *launch.outputs)
    signature = dict.fromkeys(launch.constants, "constexpr")
    signature |= {name: "*" + _TYPES[array.dtype.name] for name, array in zip(names, pointers, strict=False)}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(launch.kernel, {name: signature[name] for name in names}, dict(launch.constants), attributes)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        # jax-triton takes Triton's own cache away.
        triton.knobs.cache.dir = folder
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch.num_warps, "num_stages": 1},
        )
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        code = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    instructions, loops = _parse(code)
    inner = [
        (start, end)
        for start, end in loops
        if any(name in ("MUFU", "HGMMA", "HMMA") for name in instructions[start : end + 1])
        and not any(start <= other[0] and other[1] <= end and other != (start, end) for other in loops)
    ]
    counted = collections.Counter(name for start, end in inner for name in instructions[start : end + 1])
    return Cost(registers, stack, tuple(end - start + 1 for start, end in inner), dict(counted.most_common()))


def _parse(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Names of the instructions of a kernel, and (first, last) of every loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    jumps: list[tuple[str, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*?);", line):
            if found[1] == "BRA" and (target := re.search(r"\.L_x_\w+", found[2])):
                jumps.append((target[0], len(instructions)))
            instructions.append(found[1])
    return instructions, [(labels[name], at) for name, at in jumps if labels.get(name, at + 1) <= at]


_TYPES = {"float32": "fp32", "bfloat16": "bf16", "int8": "i8", "int32": "i32"}


def selective_scan_launches(**options: Any) -> dict[str, Launch]:
    """The kernels of a scan as large as a layer of Mamba 1.4B, by name."""
    from ssm_jax.ops.selective_scan import selective_scan

    batch, length, channels, entries = options.pop("shape", (8, 2048, 4096, 16))
    dtype = options.pop("dtype", jnp.bfloat16)

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    row, maps = array(batch, length, channels), array(batch, length, entries)
    vector = array(channels, dtype=jnp.float32)
    inputs = {
        "x_BLE": row, "dt_BLE": row, "A_EN": array(channels, entries, dtype=jnp.float32), "B_BLN": maps, "C_BLN": maps,
        "D_E": vector, "z_BLE": row, "dt_bias_E": vector,
    }  # fmt: skip
    if options.pop("reset", False):
        inputs["reset"] = array(batch, length, dtype=jnp.bool_)

    def both(inputs: dict[str, jax.Array]) -> Any:
        y, pull = jax.vjp(lambda i: selective_scan(**i, implementation="triton", **options)[0], inputs)
        return pull(y)

    return _by_name(both, inputs)


def _by_name(function: Callable[..., Any], *arguments: Any) -> dict[str, Launch]:
    with triton_call.recorded() as launches:
        jax.eval_shape(function, *arguments)
    return {launch.kernel.fn.__name__: launch for launch in launches}


def scan_slots(launch: Launch, cost: Cost) -> list[float]:
    """Issue slots per 32 state entries, loop by loop."""
    how = launch.constants
    entries = how["UNROLL"] * how["N"] * how["BE"] / (32 * launch.num_warps)
    return [round(size / entries, 2) for size in cost.loops]


def causal_conv_launches(**options: Any) -> dict[str, Launch]:
    """The kernels of the convolution before that scan, by name."""
    from ssm_jax.ops.causal_conv import causal_conv

    batch, length, channels = options.pop("shape", (8, 2048, 4096))
    inputs = {
        "x_BLD": jax.ShapeDtypeStruct((batch, length, channels), options.pop("dtype", jnp.bfloat16)),
        "kernel_KD": jax.ShapeDtypeStruct((options.pop("taps", 4), channels), jnp.float32),
        "bias_D": jax.ShapeDtypeStruct((channels,), jnp.float32),
    }
    if options.pop("reset", False):
        inputs["reset"] = jax.ShapeDtypeStruct((batch, length), jnp.bool_)

    def both(inputs: dict[str, jax.Array]) -> Any:
        y, pull = jax.vjp(lambda i: causal_conv(**i, activation="silu", implementation="triton")[0], inputs)
        return pull(y)

    return _by_name(both, inputs)


def conv_bytes(launch: Launch) -> dict[str, float]:
    """Per element: every input and output once, and all that is loaded and stored, of which the tokens around segments come from
    a cache."""
    how = launch.constants
    size, around = launch.arguments[0].dtype.itemsize, (how["K"] - 1) / how["SEGMENT"]
    if launch.kernel.fn.__name__ == "forward":
        return {"floor_bytes": 2 * size, "bytes": round((2 + around) * size, 2)}
    parts = 4 * (how["K"] + 1) / how["SEGMENT"]
    return {"floor_bytes": 3 * size, "bytes": round((3 + 3 * around) * size + parts, 2)}


# Keys and values of a head: small ones, RetNet's, those of retention with wide heads, and DenseRetNet's; SSD's of Mamba-2.
RETENTION_HEADS = ((64, 64), (128, 128), (256, 256), (256, 512), (384, 1536))
SSD_HEADS = ((64, 64), (128, 64), (128, 128))


def retention_launches(keys: int, values: int) -> dict[str, Launch]:
    """The kernels of retention in a layer of 16 heads, 4 x 4,096 tokens."""
    from ssm_jax.ops.retention import retention

    def array(width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((4, 4096, 16, width), jnp.bfloat16)

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        rates = np.log1p(-(2.0 ** -np.arange(5.0, 21.0)))
        y, pull = jax.vjp(lambda *i: retention(*i, rates, implementation="triton")[0], q, k, v)
        return pull(y)

    return _by_name(both, array(keys), array(keys), array(values))


def ssd_launches(keys: int, values: int) -> dict[str, Launch]:
    """The kernels of SSD in a layer of 32 heads of one group, 4 x 4,096 tokens."""
    from ssm_jax.ops.ssd import ssd

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((4, 4096, *shape), dtype)

    def both(*inputs: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *i: ssd(*i, implementation="triton")[0], *inputs)
        return pull(y)

    vector = jax.ShapeDtypeStruct((32,), jnp.float32)
    return _by_name(both, array(32, values), array(32), vector, array(1, keys), array(1, keys), vector, vector)


def forward_bytes(launch: Launch) -> float:
    """What a forward launch reads and writes, everything once, in units of q, k, v, y and the states before and after."""
    names = ("q", "k", "v", "gain", "log_decay", "state", "reset", "scale", "skip", "decays", "ends")
    how = launch.constants
    there = {"gain": how["HAS_GAIN"], "reset": how["HAS_RESET"], "scale": how["HAS_SCALE"], "skip": how["HAS_SKIP"]}
    there |= dict.fromkeys(("decays", "ends"), how["SEGMENTS"] > 1)
    given = {name: array for name, array in zip(names, launch.arguments, strict=True) if there.get(name, True)}
    needed = sum(_bytes(array) for array in (*(given[name] for name in ("q", "k", "v", "state")), *launch.outputs))
    return round((sum(map(_bytes, given.values())) + sum(map(_bytes, launch.outputs))) / needed, 3)


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize


def table() -> dict[str, Any]:
    """Every kernel of every op."""
    rows: dict[str, Any] = {}
    for op, launches, heads in (
        ("retention", retention_launches, RETENTION_HEADS),
        ("ssd", ssd_launches, SSD_HEADS),
    ):
        for keys, values in heads:
            for name, launch in launches(keys, values).items():
                cost = compile_launch(launch)
                rows[f"{op} {name} {keys}x{values}"] = {
                    "registers": cost.registers,
                    "spilled_bytes": cost.spilled_bytes,
                    "tensor_instructions": sum(cost.instructions.get(x, 0) for x in ("HGMMA", "HMMA")),
                    **({"bytes_over_floor": forward_bytes(launch)} if name == "forward" else {}),
                }
    for label, options in (("", {}), (" with resets", {"reset": True}), (" float32", {"dtype": jnp.float32})):
        for name, launch in selective_scan_launches(**options).items():
            cost = compile_launch(launch)
            rows[f"selective_scan {name}{label}"] = {
                "slots_per_32": round(sum(scan_slots(launch, cost)), 2),
                "registers": cost.registers,
                "spilled_bytes": cost.spilled_bytes,
            }
    for label, options in (
        ("", {}),
        (" with resets", {"reset": True}),
        (" float32", {"dtype": jnp.float32}),
        (" with resets, 8 taps", {"reset": True, "taps": 8}),
    ):
        for name, launch in causal_conv_launches(**options).items():
            cost, elements = compile_launch(launch), launch.constants["UNROLL"] * launch.constants["BE"] / 32
            rows[f"causal_conv {name}{label}"] = {
                "slots_per_32": round(cost.loops[0] / elements, 2),
                "registers": cost.registers,
                "spilled_bytes": cost.spilled_bytes,
                **conv_bytes(launch),
            }
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = table()
    for name, row in rows.items():
        print(f"{name:45}", *(f"{key} {value}" for key, value in row.items()))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["cuda"] = rows
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
