"""What a run says about itself: a line at its start, ``summary.json`` at its end."""

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ssm_jax import distributed, files
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.models.registry import family_of
from ssm_jax.optim import relora
from ssm_jax.training.metrics import Meter
from ssm_jax.training.run import Run
from ssm_jax.training.state import TrainState
from ssm_jax.typing import Params, PyTree

SUMMARY = "summary.json"


def headline(run: Run, state: TrainState, frozen: Params) -> str:
    """Model, parameters, batch and devices in one line; arrays or shapes."""
    config = run.config
    count, fixed = _size(abstract_params(run.model)), _size(frozen)
    paths = _size(state.params) + fixed - count
    rank = "" if run.spec is None or not paths else f", {paths:,} in low-rank paths of rank {run.spec.rank}"
    parts = [
        f"{config.model['family']} with {count:,} parameters" + (f" ({fixed:,} frozen{rank})" if fixed else ""),
        *([] if run.teacher is None else [run.teacher.describe()]),
        f"{config.batch.size} x {run.data.seq_len} tokens per step",
        f"{run.mesh.size} {run.mesh.devices.flat[0].device_kind} device(s)",
        f"run folder {run.folder}",
    ]
    return ", ".join(parts)


def describe_scores(scores: Mapping[str, float]) -> str:
    """``loss 1.23, bits per byte 1.77, ...`` from evaluation scores."""
    return ", ".join(f"{name.removeprefix('eval/').replace('_', ' ')} {value:.4f}" for name, value in scores.items())


def write(
    run: Run,
    state: TrainState,
    frozen: Params,
    meter: Meter,
    compiled: jax.stages.Compiled,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes and returns ``summary.json``: size, length, speed, memory, devices, and what was ``measured``."""
    total_steps = int(state.total_steps)
    content = {
        "finished": meter.step == total_steps,
        "family": run.config.model["family"],
        "parameters": _size(abstract_params(run.model)),
        "trainable_parameters": _size(state.params),
        "steps": meter.step,
        "total_steps": total_steps,
        "tokens": meter.tokens,
        "seconds": meter.seconds,
        "tokens_per_s": meter.tokens / meter.seconds if meter.seconds else None,
        **measured,
        **({} if state.merges is None else {"merges": int(state.merges)}),
        "memory": {"peak_host_bytes": _peak_host_bytes(), **_compiled_memory(compiled)},
        "devices": {
            "kind": run.mesh.devices.flat[0].device_kind,
            "platform": run.mesh.devices.flat[0].platform,
            "count": run.mesh.size,
            "mesh": dict(run.mesh.shape),
        },
        "jax": jax.__version__,
    }
    flops = flops_per_step(run)
    if meter.seconds:
        content["model_tflops_per_s"] = _flops_until(run, meter.step) / meter.seconds / 1e12
        content |= {"mfu": content["model_tflops_per_s"] * 1e12 / flops["peak"]} if "peak" in flops else {}
    if not distributed.is_main():
        return content
    files.write_text(run.folder / SUMMARY, json.dumps(content, indent=2) + "\n")
    return content


PEAK_FLOPS = {
    "h100": 989e12,
    "h200": 989e12,
    "a100": 312e12,
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5p": 459e12,
    "tpu v5": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
}
"""Dense bfloat16 operations per second of a device whose kind contains the name, from the makers' data sheets."""


def flops_per_step(run: Run, spec: relora.Spec | None = None) -> dict[str, float]:
    """``step``: the model's operations in an update, forward and backward (three forward passes; recomputation is not counted, and
    neither is a teacher); with the low-rank paths of ``spec`` see ``relora.train_flops_per_token``.
    ``peak``: what all devices can do in a second in bfloat16, where it is known: their ratio over time is the MFU."""
    tokens = run.config.batch.size * run.data.seq_len
    per_token = family_of(run.model.config).flops_per_token(run.model.config, run.data.seq_len)
    result = {"step": 3.0 * tokens * per_token}
    if spec is not None:
        result["step"] = tokens * relora.train_flops_per_token(run.model.config, spec, run.data.seq_len)
    kind = run.mesh.devices.flat[0].device_kind.lower()
    peak = next((value for name, value in PEAK_FLOPS.items() if name in kind), None)
    return result if peak is None else {**result, "peak": peak * run.mesh.size}


def _flops_until(run: Run, step: int) -> float:
    relora_config = run.config.optim.relora
    full = step if relora_config is None else min(step, relora_config.warm_start)
    return full * flops_per_step(run)["step"] + (step - full) * flops_per_step(run, run.spec)["step"]


def read(folder: Path) -> dict[str, Any]:
    """The content of ``summary.json``, empty if there is none."""
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _peak_host_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one step, per device, from the compiler; empty where it does not tell."""
    analysis = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes", None) for name in names}
    return {f"step_{name}_bytes": int(size) for name, size in sizes.items() if size is not None}
