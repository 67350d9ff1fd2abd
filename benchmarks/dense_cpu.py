"""What dense connections cost: training steps and decoding with and without, at equal width and depth, in one process.

    python -m benchmarks.dense_cpu [--rounds N]

Contestants of a group take turns: a training step (loss, gradients, AdamW) at batch 4 x 512; 128 greedy tokens after
a prompt of 16, at batch 1 and 8; generation at batch 6 after 2,048 to 10,240 tokens, beside a Llama of equal size (the
paper's figure of speed, drawn at a size that a CPU can hold). Beside each measured ratio stands the counted one, of operations per
token.
Writes benchmarks/results/dense_cpu.json.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ssm_jax
from benchmarks.timing import conditions, save, take_turns
from ssm_jax.models import count_parameters, flops_per_token
from ssm_jax.ops import linear_cross_entropy

BATCH, LENGTH, PROMPT, NEW = 4, 512, 16, 128
_SHARED: dict[str, Any] = {"vocab_size": 1024, "d_model": 256, "n_layers": 6}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "DenseRetNet": {f"m={m}": {"name": "dense_retnet", **_SHARED, "n_heads": 2, "dense_layers": m} for m in (0, 1, 2)},
    "DenseMamba": {f"m={m}": {"name": "dense_mamba", **_SHARED, "dense_layers": m} for m in (0, 1, 2)},
}
CONTEXTS = (2048, 4096, 6144, 8192, 10240)
LANES, STEPS = 6, 16
LONG: dict[str, dict[str, Any]] = {
    "DenseRetNet": {"name": "dense_retnet", "vocab_size": 1024, "d_model": 384, "n_layers": 6, "n_heads": 2},
    "RetNet": {
        "name": "retnet",
        "vocab_size": 1024,
        "d_model": 300,
        "n_layers": 6,
        "n_heads": 2,
        "d_value": 504,
        "d_mlp": 504,
    },
    "Llama": {
        "name": "llama",
        "vocab_size": 1024,
        "d_model": 288,
        "n_layers": 6,
        "n_heads": 4,
        "d_mlp": 872,
        "n_positions": 16384,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default 5)")
    rounds = parser.parse_args().rounds
    result: dict[str, Any] = {"conditions": conditions(dtype="float32", groups=GROUPS, long=LONG)}
    for group, sizes in GROUPS.items():
        models = {name: _made(**size) for name, size in sizes.items()}
        counted = {name: flops_per_token(model.config, LENGTH) for name, (model, _) in models.items()}
        result[group] = {
            "counted": {name: flops / counted["m=0"] for name, flops in counted.items()},
            "train": _turns({name: _step(*made) for name, made in models.items()}, rounds),
            **{
                f"decode, batch {n}": _turns({name: _decoding(*made, n) for name, made in models.items()}, rounds)
                for n in (1, 8)
            },
        }
        print(group, result[group])
    result["long"] = _long(rounds)
    print(f"written to {save('dense_cpu', result)}")


def _made(name: str, **size: Any) -> tuple[Any, Any]:
    model = ssm_jax.build(name, **size)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    seconds = take_turns(contestants, rounds=rounds, warmup=2)
    first = next(iter(seconds.values()))["median"]
    return {"seconds": seconds, "ratio": {name: entry["median"] / first for name, entry in seconds.items()}}


def _step(model: Any, params: Any) -> Callable[[], None]:
    optimizer = optax.adamw(1e-4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1024, (BATCH, LENGTH + 1)), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            features, _ = model.apply({"params": params}, tokens[:, :-1], method="features")
            total, weight = linear_cross_entropy(
                features, model.readout(params), tokens[:, 1:], jnp.ones((BATCH, LENGTH), jnp.float32)
            )
            return total / weight

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    carried = [jax.tree.map(jnp.copy, params), optimizer.init(params)]

    def run() -> None:
        carried[0], carried[1], value = step(*carried)
        jax.block_until_ready(value)

    return run


def _decoding(model: Any, params: Any, batch: int) -> Callable[[], Any]:
    prompt = np.random.default_rng(1).integers(0, 1024, (batch, PROMPT)).astype(np.int32)
    return lambda: ssm_jax.generate(model, params, prompt, NEW)


def _long(rounds: int) -> dict[str, Any]:
    """Milliseconds per step of generation after a context, and per token of reading it."""
    models = {name: _made(**size) for name, size in LONG.items()}
    rows: dict[str, Any] = {"parameters": {name: count_parameters(model.config) for name, (model, _) in models.items()}}
    for context in CONTEXTS:
        prompt = np.random.default_rng(2).integers(0, 1024, (LANES, context)).astype(np.int32)
        contestants: dict[str, Callable[[], Any]] = {}
        for name, (model, params) in models.items():
            for new in (1, 1 + STEPS):
                contestants[f"{name}, {new}"] = functools.partial(ssm_jax.generate, model, params, prompt, new)
        seconds = take_turns(contestants, rounds=rounds)
        rows[str(context)] = {
            name: {
                "ms_per_step": 1e3
                * (seconds[f"{name}, {1 + STEPS}"]["median"] - seconds[f"{name}, 1"]["median"])
                / STEPS,
                "prompt_s": seconds[f"{name}, 1"]["median"],
            }
            for name in models
        }
        print(context, rows[str(context)])
    return rows


if __name__ == "__main__":
    main()
