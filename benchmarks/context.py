"""What length costs: time per token and memory from 512 to 65,536 tokens of context, Mamba and Mamba-2, on this machine.

    python -m benchmarks.context

Per family and length: seconds per token of reading a prompt in one call, and in calls of 2,048 tokens that hand the state on (what
``generate`` does); seconds per generated token after a context of that length; the bytes of temporary memory that the compiler
reserves for the forward pass and for loss and gradients. Times should not depend on the length, bytes should be proportional to it.
Writes benchmarks/results/context.json.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ssm_jax
from benchmarks.mamba_cpu import SIZES
from benchmarks.timing import conditions, save
from ssm_jax.ops import linear_cross_entropy

PIECE = 2048
LENGTHS = (512, 2048, 8192, 32768, 65536)
NEW = 128


def main() -> None:
    result: dict[str, Any] = {"conditions": conditions(dtype="float32", batch=1, sizes=SIZES, new_tokens=NEW)}
    for family, size in SIZES.items():
        model = ssm_jax.build(family, **size)
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        rows = [_row(model, params, length) for length in LENGTHS]
        result[family] = {
            "rows": rows,
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(1))),
        }
        print(f"\n{family}: state of {result[family]['state_bytes']:,} bytes at any length")
        print("   context   read us/token   in pieces   decode us/token   forward MiB   training MiB")
        for row in rows:
            print(
                f"  {row['length']:8,d}   {row['read_us_per_token']:13.1f}   {row['read_in_pieces_us_per_token']:9.1f}"
                f"   {row['decode_us_per_token']:15.1f}   {row['forward_temp_bytes'] / 2**20:11.1f}"
                f"   {row['training_temp_bytes'] / 2**20:12.1f}"
            )
    print("written:", save("context", result))


def _row(model: Any, params: Any, length: int) -> dict[str, Any]:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1024, (1, length)), jnp.int32)

    def read(params: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens, logits="last")

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        features, _ = model.apply({"params": params}, tokens, method="features")
        total, weight = linear_cross_entropy(features, model.readout(params), tokens, jnp.ones(tokens.shape))
        return total / weight

    compiled = jax.jit(read).lower(params, tokens).compile()
    training = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
    jax.block_until_ready(compiled(params, tokens))

    def read_in_pieces() -> None:
        state = model.init_state(1)
        for start in range(0, length, PIECE):
            logits, state = read_piece(params, tokens[:, start : start + PIECE], state)
        jax.block_until_ready(logits)

    read_piece = jax.jit(
        lambda params, tokens, state: model.apply({"params": params}, tokens, state=state, logits="last")
    )
    read_in_pieces()
    return {
        "length": length,
        "read_us_per_token": _seconds(lambda: jax.block_until_ready(compiled(params, tokens))) / length * 1e6,
        "read_in_pieces_us_per_token": _seconds(read_in_pieces) / length * 1e6,
        "decode_us_per_token": _decode_seconds(model, params, tokens) / NEW * 1e6,
        "forward_temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "training_temp_bytes": training.memory_analysis().temp_size_in_bytes,
    }


def _decode_seconds(model: Any, params: Any, prompt: jax.Array) -> float:
    """NEW calls for one token each, from the state after the whole prompt; the Python call is part of the time."""

    @jax.jit
    def step(token: jax.Array, state: Any) -> Any:
        logits, state = model.apply({"params": params}, token, state=state)
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), state

    _, after_prompt = jax.jit(model.apply, static_argnames="logits")({"params": params}, prompt, logits="none")

    def decode() -> None:
        token, state = prompt[:, -1:], after_prompt
        for _ in range(NEW):
            token, state = step(token, state)
        jax.block_until_ready(token)

    decode()
    return _seconds(decode)


def _seconds(run: Any, rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
