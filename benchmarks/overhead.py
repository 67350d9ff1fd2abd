"""What a training run costs beside its steps: logging, data, the guard against non-finite gradients, checkpoints.

    python -m benchmarks.overhead

A real run (``ssm_jax.training.train``) of a model whose step is far shorter than anything else, every step logged to metrics.jsonl
and TensorBoard. Host time per step is what its own metrics say: the step's time less the time the device was waited for. The guard
is the compiled AdamW update with and without it, on ten million parameters; a save is that of these parameters and their moments.
Compared with a step of 0.5 s, and one save in 1,000 steps. Writes benchmarks/results/overhead.json.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import conditions, save
from ssm_jax import checkpoint, optim
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.sources import python_stdlib_files
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.training import load_run_config, train

STEPS, STEP_S, STEPS_PER_SAVE = 400, 0.5, 1000
SIDE, COUNT = 1000, 10


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = _host_seconds(Path(folder))
        save_s = _save_seconds(Path(folder))
    guard = _guard_seconds()
    total = host["median"] + guard + save_s / STEPS_PER_SAVE
    result = {
        "conditions": conditions(dtype="float32", steps=STEPS, parameters=SIDE * SIDE * COUNT),
        "host_ms_per_step": {name: 1e3 * value for name, value in host.items()},
        "guard_ms_per_step": 1e3 * guard,
        "save_s": save_s,
        "save_ms_per_step_at_one_in_1000": 1e3 * save_s / STEPS_PER_SAVE,
        "total_ms_per_step": 1e3 * total,
        "share_of_a_step_of_0.5_s": total / STEP_S,
    }
    print(json.dumps(result, indent=2))
    print("written:", save("overhead", result))


def _host_seconds(folder: Path) -> dict[str, float]:
    prepare(python_stdlib_files(), folder / "data", ByteTokenizer(), Settings(seq_len=32, max_bytes=2_000_000))
    settings = ("model.family=mamba", "model.d_model=8", "model.n_layers=1", "batch.size=8", "optim.lr=1e-3")
    every = ("eval.every=0", "eval.batches=1", "checkpoint.every=0", f"train.steps={STEPS}")
    train(load_run_config(None, [f"output={folder / 'run'}", f"data.path={folder / 'data'}", *settings, *every]))
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row][STEPS // 4 :]
    host = [row["step_s"] - row["wait_s"] for row in rows]
    data = [row["data_s"] for row in rows]
    return {"median": statistics.median(host), "mean": statistics.fmean(host), "data_median": statistics.median(data)}


def _parameters() -> dict[str, jax.Array]:
    return {f"w{i}": jnp.full((SIDE, SIDE), 0.1) for i in range(COUNT)}


def _guard_seconds() -> float:
    guarded = optim.make_optimizer(optim.OptimConfig())
    plain = optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1)
    plain = optax.chain(optax.clip_by_global_norm(1.0), plain)
    params, grads = _parameters(), _parameters()

    def seconds(optimizer: Any, **extra: Any) -> float:
        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = optimizer.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        carry = (params, optimizer.init(params))
        times = []
        for _ in range(30):
            started = time.perf_counter()
            carry = jax.block_until_ready(step(*carry))
            times.append(time.perf_counter() - started)
        return statistics.median(times[5:])

    return max(0.0, seconds(guarded, learning_rate=jnp.float32(1e-3)) - seconds(plain))


def _save_seconds(folder: Path) -> float:
    params = _parameters()
    items = {"params": params, "train": optax.adam(1e-3).init(params)}
    times = []
    for step in range(1, 5):
        started = time.perf_counter()
        checkpoint.save(folder / "checkpoints", step, items, {}, keep=1)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
