"""Gated state spaces on a CPU beside the original package, on the same weights, in one process.

    python -m benchmarks.gss_cpu [--rounds N]

Decoding: greedy tokens after a prompt of 128, 1,024 and 4,000 tokens, batch 1, prefill included on both sides. The original runs
the whole prompt again for every token; it writes fewer tokens, so that a round ends, and time per token is compared.
Training: one whole step (loss, gradients, clipping, AdamW) at batch 4 x 1,024, beside the original eager and compiled.
Before anything is timed the logits and greedy tokens of both sides are compared. Writes benchmarks/results/gss_cpu.json.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from gated_state_spaces_pytorch.autoregressive_wrapper import AutoregressiveWrapper

import ssm_jax
from benchmarks.timing import conditions, save, take_turns
from ssm_jax.interop.layouts.gss import torch_model
from ssm_jax.ops import linear_cross_entropy

SIZE = {"vocab_size": 1024, "d_model": 256, "n_layers": 4}
PROMPTS = (128, 1024, 4000)
NEW, THEIR_NEW = 64, 2
BATCH, LENGTH = 4, 1024
LEARNING_RATE, CLIP = 1e-4, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    described = conditions(torch_threads=2, dtype="float32", size=SIZE, batch=BATCH, length=LENGTH)
    model = ssm_jax.build("gss", **SIZE)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer = params["layers"]["mixer"]
    mixer |= {
        name: mixer[name] / 512**0.5 for name in ("C_real", "C_imag")
    }  # logits of size 1, so that rounding is small
    with tempfile.TemporaryDirectory() as folder:
        ssm_jax.save_pretrained(model, params, Path(folder) / "gss")
        theirs = torch_model(Path(folder) / "gss")
    result: dict[str, Any] = {"conditions": described, "agreement": _agreement(model, params, theirs)}
    result["decode"] = {f"prompt {n}": _decode(model, params, theirs, n, args.rounds) for n in PROMPTS}
    result["train"] = _train(model, params, theirs, args.rounds)
    print(f"written to {save('gss_cpu', result)}")


def _prompt(length: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(length).integers(0, SIZE["vocab_size"], (batch, length)).astype(np.int32)


def _greedy(theirs: Any, prompt: np.ndarray, count: int) -> np.ndarray:
    wrapper = AutoregressiveWrapper(theirs, max_seq_len=1 << 30)
    keep_one = 1 - 1.5 / SIZE["vocab_size"]
    tokens = wrapper.generate(torch.from_numpy(prompt.astype(np.int64)), count, filter_thres=keep_one)
    return np.asarray(tokens.numpy())


def _agreement(model: Any, params: Any, theirs: Any) -> dict[str, float]:
    tokens = _prompt(300)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens.astype(np.int64))).numpy()
    ours, _ = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_array_equal(ssm_jax.generate(model, params, tokens, 8), _greedy(theirs, tokens, 8))
    difference = float(np.abs(ours - logits).max())
    assert difference < 1e-4, difference
    return {
        "largest_logit_difference": difference,
        "largest_logit": float(np.abs(logits).max()),
        "greedy_tokens_equal": 8,
    }


def _decode(model: Any, params: Any, theirs: Any, length: int, rounds: int) -> dict[str, Any]:
    prompt = _prompt(length)
    seconds = take_turns(
        {
            "ssm_jax": lambda: ssm_jax.generate(model, params, prompt, NEW),
            "ssm_jax, prompt and one token": lambda: ssm_jax.generate(model, params, prompt, 1),
            "gated-state-spaces-pytorch": lambda: _greedy(theirs, prompt, THEIR_NEW),
        },
        rounds=rounds,
    )
    ours, first, original = (entry["median"] for entry in seconds.values())
    row = {
        "seconds": seconds,
        "new_tokens": {"ssm_jax": NEW, "gated-state-spaces-pytorch": THEIR_NEW},
        "ms_per_token": {
            "ssm_jax, prompt included": 1e3 * ours / NEW,
            "ssm_jax, after the first": 1e3 * (ours - first) / (NEW - 1),
            "gated-state-spaces-pytorch": 1e3 * original / THEIR_NEW,
        },
    }
    row["ratio"] = row["ms_per_token"]["gated-state-spaces-pytorch"] / row["ms_per_token"]["ssm_jax, prompt included"]
    print(f"decode, prompt {length}: {row['ms_per_token']}, {row['ratio']:.0f}x")
    return row


def _train(model: Any, params: Any, theirs: Any, rounds: int) -> dict[str, Any]:
    tokens = _prompt(LENGTH + 1, BATCH)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            features, _ = model.apply({"params": params}, tokens[:, :-1], method="features")
            weights = jnp.ones((BATCH, LENGTH), jnp.float32)
            total, weight = linear_cross_entropy(features, model.readout(params), tokens[:, 1:], weights)
            return total / weight

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    carried = [jax.tree.map(jnp.copy, params), None]
    carried[1] = optimizer.init(carried[0])

    def ours() -> None:
        carried[0], carried[1], value = step(*carried, tokens)
        jax.block_until_ready(value)

    contestants: dict[str, Callable[[], None]] = {"ssm_jax": ours}
    for name, peer in (("eager", theirs), ("torch.compile", torch.compile(theirs))):
        contestants[f"gated-state-spaces-pytorch, {name}"] = _their_step(peer, theirs, tokens)
    seconds = take_turns(contestants, rounds=rounds, warmup=2)
    fastest = min(entry["median"] for name, entry in seconds.items() if name != "ssm_jax")
    row = {
        "seconds": seconds,
        "tokens_per_s": {name: BATCH * LENGTH / entry["median"] for name, entry in seconds.items()},
        "ratio": fastest / seconds["ssm_jax"]["median"],
    }
    print(f"train: {row['tokens_per_s']}, {row['ratio']:.2f}x the fastest")
    return row


def _their_step(peer: Any, theirs: Any, tokens: np.ndarray) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LEARNING_RATE)
    inputs, labels = (torch.from_numpy(x.astype(np.int64)) for x in (tokens[:, :-1], tokens[:, 1:]))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        peer(inputs, labels=labels).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
