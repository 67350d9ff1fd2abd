"""What the TPU kernels cost, read from their machine code: no TPU is needed, libtpu brings the compiler.

    python -m benchmarks.static_tpu

A bundle is what a core issues in one cycle. Per kernel and chip: bundles per token of 1024 channels. The compiler's listing says in
how many loops a bundle lies; the innermost ones run once per tile of tokens, the one around them once per chunk, and the outermost
once per step of the grid, so that starting and ending a loop count too. Not counted: waiting for memory, which is slower where a
kernel computes less than it loads.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "static.json"
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
KERNELS = ("linear_recurrence", "selective_scan forward", "selective_scan backward")
BATCH, LENGTH, CHANNELS, ENTRIES, CHUNK = 2, 512, 2048, 16, 32


def rows() -> list[tuple[str, str, str, str]]:
    """(kernel, dtype, chip, variant): a scan "with resets", or "alone", its step sizes given, without skip and gate."""
    cases = [("float32", ""), ("bfloat16", ""), ("float32", "with resets"), ("float32", "alone")]
    scans = [(kernel, *case) for kernel in KERNELS[1:] for case in cases]
    return [
        (kernel, dtype, chip, variant)
        for chip in CHIPS
        for kernel, dtype, variant in [(KERNELS[0], "float32", ""), *scans]
    ]


def name_of(kernel: str, dtype: str, chip: str, variant: str) -> str:
    return f"{kernel} {'f32' if dtype == 'float32' else 'bf16'} {chip} {variant}".strip()


def measure(kernel: str, dtype: str, chip: str, variant: str) -> dict[str, float]:
    """In a process of its own: the compiler reads where to write its listings when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "benchmarks.static_tpu", "--compile", kernel, dtype, chip, variant]
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
        )
        if run.returncode:
            raise RuntimeError(f"{name_of(kernel, dtype, chip, variant)} does not compile:\n{run.stderr[-3000:]}")
        loops = json.loads(run.stdout.splitlines()[-1])
        listings = [path for path in Path(folder).glob("*final_bundles.txt") if "schedule-analysis" not in path.name]
        counts = [bundles_by_depth(path.read_text()) for path in listings]
    # Programs around the kernel have no loops in loops.
    counted = max(counts, key=lambda depths: max(depths, default=0) * 10**6 + sum(depths.values()))
    if max(counted) != len(loops):
        raise RuntimeError(f"{name_of(kernel, dtype, chip, variant)}: loops {dict(counted)}, expected {loops}")
    return {"bundles_per_step": round(sum(counted[depth] / tokens for depth, tokens in enumerate(loops, start=1)), 2)}


def bundles_by_depth(listing: str) -> collections.Counter[int]:
    """How many bundles lie in how many loops."""
    found: collections.Counter[int] = collections.Counter()
    for line in listing.splitlines():
        if bundle := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{", line):
            found[bundle[1].count(">")] += 1
    return found


def compile_kernel(kernel: str, dtype_name: str, chip: str, variant: str) -> list[int]:
    """Tokens per iteration of every loop, from the outermost to the innermost."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ssm_jax.ops.linear_recurrence import pallas as recurrence
    from ssm_jax.ops.selective_scan import pallas as scan
    from ssm_jax.ops.selective_scan.inputs import Inputs
    from ssm_jax.ops.selective_scan.pallas_kernels import ROWS

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    here = NamedSharding(Mesh(np.array(topology.devices[:1]), ("lane",)), PartitionSpec())
    wide, dtype = jnp.dtype("float32"), jnp.dtype(dtype_name)

    def array(*shape: int, dtype: Any = wide) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    sequence = array(BATCH, LENGTH, CHANNELS, dtype=dtype)
    maps, state = array(BATCH, LENGTH, ENTRIES, dtype=dtype), array(BATCH, ENTRIES, CHANNELS)
    vector = array(CHANNELS)
    reset = array(BATCH, LENGTH, dtype=jnp.dtype("bool")) if variant == "with resets" else None
    rest = (None, None, None) if variant == "alone" else (vector, sequence, vector)
    inputs = Inputs(sequence, sequence, array(ENTRIES, CHANNELS), maps, maps, *rest, state, reset, None)
    how = {"dt_softplus": variant != "alone", "chunk_size": CHUNK}
    if kernel == KERNELS[0]:
        function, arguments = recurrence.pallas, (sequence, sequence, array(BATCH, CHANNELS))
        loops = [recurrence.MOST_TOKENS, 64]
    elif kernel == KERNELS[1]:
        function, arguments = (lambda i: scan.forward(i, **how)), (inputs,)
        loops = [scan.MOST_TOKENS, CHUNK, ROWS]
    else:
        kept = array(LENGTH // CHUNK, BATCH, ENTRIES, CHANNELS)
        function, arguments = (lambda *a: scan.backward(*a, **how)), (inputs, kept, sequence, state)
        loops = [scan.MOST_TOKENS, CHUNK, ROWS]
    jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    return loops


def table() -> dict[str, Any]:
    """Every kernel on every chip."""
    return {name_of(*row): measure(*row) for row in rows()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs=4, metavar=("KERNEL", "DTYPE", "CHIP", "VARIANT"), help=argparse.SUPPRESS)
    asked = parser.parse_args().compile
    if asked:
        print(json.dumps(compile_kernel(*asked)))
        return
    found = table()
    for name, row in found.items():
        print(f"{name:45}", *(f"{key} {value}" for key, value in row.items()))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["tpu"] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
