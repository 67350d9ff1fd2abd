"""Memory and operations of ReLoRA's published sizes on one GPU, read from programs compiled for an H200 that need not be there.

    pip install jax-cuda13-plugin==V jax-cuda13-pjrt==V    (V: the version of jax, 0.11 or later; no GPU, no driver)
    python -m benchmarks.relora_memory

The step is that of ``train.pretrain``: loss, gradients and AdamW on 16 rows of 512 tokens as one microbatch, computing in bfloat16
with float32 parameters and moments. Full rank beside rank 128, with the frozen matrices in float32 and in bfloat16. Operations are
counted, not measured: ``relora.train_flops_per_token``. Writes benchmarks/results/relora_memory.json.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

import ssm_jax
from benchmarks.timing import conditions, save
from ssm_jax import sharding
from ssm_jax.models import flops_per_token
from ssm_jax.optim import OptimConfig, ReLoRAConfig, relora
from ssm_jax.training import low_rank
from ssm_jax.training import state as state_lib
from ssm_jax.training.step import abstract_batch, make_step

TARGET = Path(__file__).parent / "targets" / "h200.txtpb"
ROWS, LENGTH = 16, 512
SIZES = ("llama-60m", "llama-130m", "llama-250m", "llama-350m", "llama-1b")
ARMS: dict[str, ReLoRAConfig | None] = {
    "full rank": None,
    "ReLoRA": ReLoRAConfig(cycle=1000),
    "ReLoRA, frozen in bfloat16": ReLoRAConfig(cycle=1000, frozen_dtype="bfloat16"),
}
GIB = 2**30


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET.read_text())
    mesh = Mesh(np.array(topology.devices).reshape((1,) * len(sharding.MESH_AXES)), sharding.MESH_AXES)
    results: dict[str, Any] = {}
    for size in SIZES:
        for remat in ("none", "full"):
            for arm, settings in ARMS.items():
                found = _measured(size, remat, settings, mesh)
                results[f"{size}, remat {remat}, {arm}"] = found
                print(f"{size:12}{remat:6}{arm:28}", found, flush=True)
    described = conditions(
        command="python -m benchmarks.relora_memory",
        compiled_for="H200 (not there)",
        rows=ROWS,
        length=LENGTH,
        rank=128,
    )
    print("written:", save("relora_memory", {"conditions": described, "sizes": results}))


def _measured(size: str, remat: str, settings: ReLoRAConfig | None, mesh: Mesh) -> dict[str, float]:
    """GiB of a step's arguments, of what is alive beside them, of both; and its operations per token, in units of 1e6."""
    model = ssm_jax.build(size, n_positions=LENGTH, dtype="bfloat16", remat=remat)
    config = OptimConfig(relora=settings)
    spec = low_rank.plan(model, config)
    state, frozen = state_lib.abstract(model, config, mesh, None, spec)
    frozen, _ = low_rank.rounded(frozen, config, spec)
    batch = abstract_batch(ROWS, LENGTH, mesh, joined=True)
    jitted = jax.jit(make_step(model, config, spec=spec), donate_argnums=0)
    memory = jitted.trace(state, frozen, batch).lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    arguments, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    rest += memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = 3 * flops_per_token(model.config, LENGTH)
    if spec is not None:
        flops = relora.train_flops_per_token(model.config, spec, LENGTH)
    sizes = {"arguments": arguments, "rest": rest, "total": arguments + rest}
    return {name: round(value / GIB, 2) for name, value in sizes.items()} | {"mflop_per_token": round(flops / 1e6, 1)}


if __name__ == "__main__":
    main()
