"""Memory of training Baka's published networks on one GPU, read from programs compiled for an H200 that need not be there.

    pip install jax-cuda13-plugin==V jax-cuda13-pjrt==V    (V: the version of jax, 0.11 or later; no GPU, no driver)
    python -m benchmarks.baka_memory

A step is loss, gradients and AdamW on 8 windows of 2,048 tokens, with positions as lanes of articles have them: parameters, moments
and activations in bfloat16, as its author trained on a laptop with 16 GB, states and softmax in float32. ``celp18`` is the network
of the comparison with Pythia, ``steps`` that of the post on gates, with elephants and gates on y - x, which the author could not
fit. Each with and without recomputing layers in the backward pass, and with an elephant that JAX differentiates in place of ours;
beside these what one elephant keeps.
Writes benchmarks/results/baka_memory.json.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import ssm_jax
from benchmarks.timing import conditions, save
from ssm_jax.models import LanguageModel, baka
from ssm_jax.ops import linear_cross_entropy
from ssm_jax.ops.elephant import gated_elephant

TARGET = Path(__file__).parent / "targets" / "h200.txtpb"
BATCH, WINDOW = 8, 2048
NETWORKS: dict[str, dict[str, Any]] = {
    "celp18": {"name_or_config": "baka-celp18"},
    "steps, gates on y - x": {"name_or_config": "baka-steps", "gate_input": "y-x"},
}
KINDS = {"dtype": "bfloat16", "param_dtype": "bfloat16", "residual_in_fp32": False}
GIB = 2**30


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET.read_text())
    device = SingleDeviceSharding(topology.devices[0])
    results: dict[str, Any] = {}
    for name, fields in NETWORKS.items():
        for remat in ("full", "none"):
            model = ssm_jax.build(**fields, **KINDS, remat=remat)
            results[f"{name}, remat {remat}"] = _measured(model, device)
        with _differentiated_by_jax():
            model = ssm_jax.build(**fields, **KINDS, remat="none")
            results[f"{name}, remat none, elephant differentiated by JAX"] = _measured(model, device)
    kept = {"ours": _kept(gated_elephant), "differentiated by JAX": _kept(_plain)}
    for key, value in {**results, "bytes kept per entry of y elephant(gate), bfloat16": kept}.items():
        print(key, value)
    described = conditions(
        command="python -m benchmarks.baka_memory",
        compiled_for="H200 (not there)",
        batch=BATCH,
        window=WINDOW,
        types=KINDS,
        optimizer="AdamW, moments bfloat16",
    )
    print("written:", save("baka_memory", {"conditions": described, "gib": results, "elephant_bytes": kept}))


def _measured(model: LanguageModel, device: SingleDeviceSharding) -> dict[str, float]:
    """GiB of arguments (parameters, moments, batch), of what is alive beside them, and of both."""
    optimizer = optax.adamw(1e-3, weight_decay=0.01, mu_dtype=jnp.bfloat16)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)

    def start(key: Any) -> Any:
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        moments = optimizer.init(params)
        return params, jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, moments)

    def step(params: Any, moments: Any, tokens: Any, targets: Any, positions: Any) -> Any:
        def loss(params: Any) -> Any:
            features, _ = model.apply({"params": params}, tokens, None, positions, method="features")
            weights = jnp.ones(tokens.shape, jnp.float32)
            total, weight = linear_cross_entropy(features, model.readout(params), targets, weights)
            return total / weight

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    params, moments = place(jax.eval_shape(start, jax.random.key(0)))
    batch = place(jax.ShapeDtypeStruct((BATCH, WINDOW), jnp.int32))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.trace(params, moments, batch, batch, batch).lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    arguments, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    rest += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        name: round(size / GIB, 2)
        for name, size in (("arguments", arguments), ("rest", rest), ("total", arguments + rest))
    }


def _plain(y: Any, gate: Any, width: float = 1.0, power: float = 8.0) -> Any:
    """The published form: the absolute value, a power, and what JAX makes of it."""
    return y / (1 + jnp.abs(gate / width) ** power)


def _kept(function: Any) -> float:
    """Bytes between forward and backward pass per entry of the inputs."""
    shape = (64, 128)
    inputs = (jnp.ones(shape, jnp.bfloat16), jnp.full(shape, 0.5, jnp.bfloat16))
    _, pull = jax.vjp(function, *inputs)
    held = {id(x): x.nbytes for x in jax.tree.leaves(pull) if isinstance(x, jax.Array)}
    return sum(held.values()) / (shape[0] * shape[1])


@contextlib.contextmanager
def _differentiated_by_jax() -> Iterator[None]:
    ours, baka.gated_elephant = baka.gated_elephant, functools.wraps(gated_elephant)(_plain)
    try:
        yield
    finally:
        baka.gated_elephant = ours


if __name__ == "__main__":
    main()
