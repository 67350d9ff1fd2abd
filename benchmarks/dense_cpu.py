"""What dense connections cost: training steps and decoding with and without, at equal width and depth, in one process.

    python -m benchmarks.dense_cpu [--rounds N] [--only PART ...]

Contestants of a group take turns: a training step (loss, gradients, AdamW), and 128 greedy tokens after a prompt of 16, at batch 1
and 8. Beside the measured ratios stands the counted one, of operations per token; for DenseMamba also what m more scans in every
layer add, from a scan and its gradient timed alone. DenseRetNet has the published width and four layers: what fusion adds is
elementwise, and weighs more the narrower a model is. A control of DenseMamba runs m more scans in every layer of Mamba, with
inputs of their own (the layer's, shifted): the scans of m sources, and neither gate nor anything handed from layer to layer. Then
generation at batch 6 after 2,048 to 10,240 tokens, beside a RetNet and a Llama of equal size (the paper's figure of speed, drawn
at a size that a CPU can hold).
Writes benchmarks/results/dense_cpu.json; with ``--only`` the other parts keep what stands there.
"""

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ssm_jax
from benchmarks.timing import RESULTS, conditions, save, take_turns
from ssm_jax.generation.decoder import make_decoder
from ssm_jax.generation.generate import begin, capacity_for, decode
from ssm_jax.generation.settings import PREFILL_CHUNK, check_settings
from ssm_jax.models import count_parameters, flops_per_token
from ssm_jax.nn.mixers import mamba
from ssm_jax.ops import linear_cross_entropy, selective_scan

LENGTH, PROMPT, NEW = 512, 16, 128
GROUPS: dict[str, dict[str, Any]] = {
    "DenseRetNet, width 1536": {"name": "dense_retnet", "d_model": 1536, "n_layers": 4, "n_heads": 2},
    "DenseRetNet, width 256": {"name": "dense_retnet", "d_model": 256, "n_layers": 6, "n_heads": 2},
    "DenseMamba, width 256": {"name": "dense_mamba", "d_model": 256, "n_layers": 6},
}
DEPTHS = (0, 1, 2)
CONTEXTS = (2048, 4096, 6144, 8192, 10240)
LANES, STEPS = 6, 32
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
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, "long"], default=[*GROUPS, "long"], metavar="PART")
    args = parser.parse_args()
    rounds, kept = args.rounds, RESULTS / "dense_cpu.json"
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    described = conditions(dtype="float32", groups=GROUPS, long=LONG, lanes=LANES, rounds=rounds)
    result["conditions"] = result.get("conditions", {}) | dict.fromkeys(args.only, described)
    for group, size in GROUPS.items():
        if group not in args.only:
            continue
        models = {f"m={m}": _made(**size, vocab_size=1024, dense_layers=m) for m in DEPTHS}
        counted = {name: flops_per_token(model.config, LENGTH) for name, (model, _) in models.items()}
        batch = 1024 // size["d_model"] or 1
        result[group] = {
            "counted": {name: flops / counted["m=0"] for name, flops in counted.items()},
            "batch": [batch, LENGTH],
            "train": _turns(_steps_of(size, models, batch), rounds),
            **{
                f"decode, batch {n}": _turns({name: _decoding(*made, n) for name, made in models.items()}, rounds)
                for n in (1, 8)
            },
        }
        if size["name"] == "dense_mamba":
            scan = take_turns({"scan": _scan(models["m=0"][0].config, batch)}, rounds=10, warmup=2)["scan"]
            step = result[group]["train"]["seconds"]["m=0"]["median"]
            result[group]["scan and gradient"] = scan
            result[group]["scans alone"] = {f"m={m}": 1 + m * size["n_layers"] * scan["median"] / step for m in DEPTHS}
        print(group, result[group])
    if "long" in args.only:
        result["long"] = _long(rounds)
    print(f"written to {save('dense_cpu', result)}")


def _made(name: str, **size: Any) -> tuple[Any, Any]:
    model = ssm_jax.build(name, **size)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _steps_of(size: dict[str, Any], models: dict[str, Any], batch: int) -> dict[str, Callable[[], None]]:
    steps = {name: _step(*made, batch) for name, made in models.items()}
    if size["name"] == "dense_mamba":
        for more in DEPTHS[1:]:
            steps[f"m=0, {more} more scans"] = _step(*models["m=0"], batch)
            with _more_scans(more):
                steps[f"m=0, {more} more scans"]()  # compiled here
    return steps


@contextlib.contextmanager
def _more_scans(count: int) -> Iterator[None]:
    """Mamba layers traced within run ``count`` more scans each."""
    scan = mamba.selective_scan

    def several(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *rest: Any, **how: Any) -> Any:
        y, state = scan(x, dt, A, B, C, D, z, *rest, **how)
        for i in range(1, count + 1):
            y = y + scan(x + i, dt + i, A, B + i, C + i, None, z, *rest, **how)[0]
        return y, state

    mamba.selective_scan = several  # type: ignore[assignment]
    try:
        yield
    finally:
        mamba.selective_scan = scan


def _turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    seconds = take_turns(contestants, rounds=rounds, warmup=2)
    first = next(iter(seconds.values()))["median"]
    return {"seconds": seconds, "ratio": {name: entry["median"] / first for name, entry in seconds.items()}}


def _step(model: Any, params: Any, batch: int) -> Callable[[], None]:
    optimizer = optax.adamw(1e-4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1024, (batch, LENGTH + 1)), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            features, _ = model.apply({"params": params}, tokens[:, :-1], method="features")
            total, weight = linear_cross_entropy(
                features, model.readout(params), tokens[:, 1:], jnp.ones((batch, LENGTH), jnp.float32)
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


def _scan(config: Any, batch: int) -> Callable[[], Any]:
    """One layer's recurrence with its gradients."""
    width, states = config.d_inner, config.d_state
    shapes = [(batch, LENGTH, width), (batch, LENGTH, width), (width, states), *2 * [(batch, LENGTH, states)]]
    x, dt, A, B, C = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    bias = jnp.full(width, -4.0)

    def total(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        return jnp.square(selective_scan(x, dt, -jnp.exp(A), B, C, None, None, bias)[0]).sum()

    run = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))
    return lambda: jax.block_until_ready(run(x, dt, A, B, C))


def _decoding(model: Any, params: Any, batch: int) -> Callable[[], Any]:
    prompt = np.random.default_rng(1).integers(0, 1024, (batch, PROMPT)).astype(np.int32)
    return lambda: ssm_jax.generate(model, params, prompt, NEW)


def _long(rounds: int) -> dict[str, Any]:
    """Seconds of reading a context, and milliseconds per step of the generation that follows it."""
    models = {name: _made(**size) for name, size in LONG.items()}
    rows: dict[str, Any] = {"parameters": {name: count_parameters(model.config) for name, (model, _) in models.items()}}
    for context in CONTEXTS:
        prompts = list(np.random.default_rng(2).integers(0, 1024, (LANES, context)).astype(np.int32))
        reading, going_on = {}, {}
        for name, (model, params) in models.items():
            capacity = capacity_for(prompts, STEPS * (rounds + 2))
            start = functools.partial(_start, model, params, prompts=prompts, capacity=capacity)
            jax.block_until_ready(start(prompts=[prompt[:PREFILL_CHUNK] for prompt in prompts]))  # compiled now
            before = time.perf_counter()
            progress = jax.block_until_ready(start())
            reading[name] = time.perf_counter() - before
            going_on[name] = _steps(model, params, progress)
        seconds = take_turns(going_on, rounds=rounds)
        rows[str(context)] = {
            name: {"ms_per_step": 1e3 * seconds[name]["median"] / STEPS, "prompt_s": reading[name]} for name in models
        }
        print(context, rows[str(context)])
    return rows


def _start(model: Any, params: Any, *, prompts: list[np.ndarray], capacity: int) -> Any:
    settings = check_settings(model, 1, 0.0, None, None, None, None, PREFILL_CHUNK)
    return begin(model, params, make_decoder(model, params), prompts, settings, PREFILL_CHUNK, capacity)


def _steps(model: Any, params: Any, progress: Any) -> Callable[[], None]:
    """The next ``STEPS`` tokens of every lane, at each call."""
    decoder, carried = make_decoder(model, params), [progress]
    settings = check_settings(model, 1, 0.0, None, None, None, None, PREFILL_CHUNK)

    def run() -> None:
        tokens, carried[0] = decode(model, decoder, carried[0], settings, STEPS, STEPS)
        jax.block_until_ready(tokens)

    return run


if __name__ == "__main__":
    main()
