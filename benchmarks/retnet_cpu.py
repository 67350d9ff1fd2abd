"""RetNet on a CPU beside torchscale 0.3.0 (its authors' package), on the same weights, in one process.

    pip install -e '.[bench,torch]' && pip install --no-deps torchscale==0.3.0 fairscale==0.4.13
    python -m benchmarks.retnet_cpu [--rounds N]

(timm, which torchscale takes one function from for a feature that is off, would need torchvision; a stand-in takes its place.)

Generation: 256 greedy tokens after a prompt of 2,048, batch 6, prompt included on both sides. torchscale has no prefill: its
recurrent form takes one token a call, so that the prompt is 2,048 calls (DenseSSM's ``generate`` does the same).
Training: one whole step (loss, gradients, clipping, AdamW) at batch 2 x 2,048, beside torchscale's parallel and chunkwise forms.
Before anything is timed both sides read a text token by token and must agree. Writes benchmarks/results/retnet_cpu.json.
"""

import argparse
import functools
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import ssm_jax
from benchmarks.timing import conditions, save, take_turns
from ssm_jax.ops import linear_cross_entropy

sys.modules["timm.models.layers"] = types.SimpleNamespace(drop_path=None)  # type: ignore[assignment]
sys.modules["timm.models"] = sys.modules["timm"] = types.ModuleType("timm")

from torchscale.architecture.config import RetNetConfig  # noqa: E402
from torchscale.architecture.retnet import RetNetDecoder  # noqa: E402

SIZE: dict[str, Any] = {
    "vocab_size": 1024,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 3,
    "d_value": 768,
    "d_mlp": 768,
    "tie_embeddings": False,
}
LANES, PROMPT, NEW = 6, 2048, 256
BATCH, LENGTH, CHUNK = 2, 2048, 512
LEARNING_RATE, CLIP = 1e-4, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    described = conditions(torch_threads=2, dtype="float32", size=SIZE, torchscale="0.3.0")
    model = ssm_jax.build("retnet", **SIZE)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    theirs = _torchscale(model, params)
    result: dict[str, Any] = {"conditions": described, "agreement": _agreement(model, params, theirs)}
    result["generate"] = _generate(model, params, theirs, args.rounds)
    result["train"] = _train(model, params, theirs, args.rounds)
    print(f"written to {save('retnet_cpu', result)}")


def _torchscale(model: Any, params: Any) -> Any:
    """torchscale's decoder with our weights, by way of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "retnet"
        ssm_jax.save_pretrained(model, params, path, layout="torchscale")
        args = RetNetConfig(**json.loads((path / "config.json").read_text()))
        (weights,) = (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.safetensors"))
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, weights_only=True)
    theirs = RetNetDecoder(args, torch.nn.Embedding(args.vocab_size, args.decoder_embed_dim))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("retnet_rel_pos.") for name in missing), missing
    return theirs.eval()


def _text(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, SIZE["vocab_size"], (batch, length)).astype(np.int32)


@torch.no_grad()
def _greedy(theirs: Any, prompt: np.ndarray, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """Greedy tokens, and the logits after the prompt."""
    tokens, memory = torch.from_numpy(prompt.astype(np.int64)), {}
    for length in range(1, tokens.shape[1] + 1):
        logits = theirs(tokens[:, :length], incremental_state=memory)[0][:, -1]
    first = logits
    for _ in range(count):
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
        if tokens.shape[1] < prompt.shape[1] + count:
            logits = theirs(tokens, incremental_state=memory)[0][:, -1]
    return np.asarray(tokens[:, prompt.shape[1] :].numpy()), first


def _agreement(model: Any, params: Any, theirs: Any) -> dict[str, float]:
    prompt = _text(2, 200)
    tokens, logits = _greedy(theirs, prompt, 8)
    ours, _ = jax.jit(model.apply)({"params": params}, prompt)
    np.testing.assert_array_equal(ssm_jax.generate(model, params, prompt, 8), tokens)
    difference = float(np.abs(ours[:, -1] - logits.numpy()).max())
    assert difference < 1e-4, difference
    return {
        "largest_logit_difference": difference,
        "largest_logit": float(logits.abs().max()),
        "greedy_tokens_equal": 8,
    }


def _generate(model: Any, params: Any, theirs: Any, rounds: int) -> dict[str, Any]:
    prompt = _text(LANES, PROMPT)
    seconds = take_turns(
        {
            "ssm_jax": lambda: ssm_jax.generate(model, params, prompt, NEW),
            "ssm_jax, prompt and one token": lambda: ssm_jax.generate(model, params, prompt, 1),
            "torchscale": lambda: _greedy(theirs, prompt, NEW),
            "torchscale, prompt and one token": lambda: _greedy(theirs, prompt, 1),
        },
        rounds=rounds,
    )
    whole, prefill, their_whole, their_prefill = (entry["median"] for entry in seconds.values())
    row = {
        "batch": LANES,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "seconds": seconds,
        "ratio": their_whole / whole,
        "ratio_of_prompts": their_prefill / prefill,
        "ratio_of_steps": (their_whole - their_prefill) / (whole - prefill),
    }
    print({name: value for name, value in row.items() if name.startswith("ratio")}, seconds)
    return row


def _train(model: Any, params: Any, theirs: Any, rounds: int) -> dict[str, Any]:
    tokens = _text(BATCH, LENGTH + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
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
        carried[0], carried[1], value = step(*carried)
        jax.block_until_ready(value)

    contestants: dict[str, Callable[[], None]] = {"ssm_jax": ours}
    for name, chunkwise in (("parallel", False), ("chunkwise", True)):
        contestants[f"torchscale, {name}"] = _their_step(theirs, tokens, chunkwise)
    seconds = take_turns(contestants, rounds=rounds)
    fastest = min(entry["median"] for name, entry in seconds.items() if name != "ssm_jax")
    row = {
        "batch": [BATCH, LENGTH],
        "seconds": seconds,
        "tokens_per_s": {name: BATCH * LENGTH / entry["median"] for name, entry in seconds.items()},
        "ratio": fastest / seconds["ssm_jax"]["median"],
    }
    print(f"train: {row['tokens_per_s']}, {row['ratio']:.2f}x the fastest")
    return row


def _their_step(theirs: Any, tokens: np.ndarray, chunkwise: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LEARNING_RATE)
    inputs, labels = (torch.from_numpy(x.astype(np.int64)) for x in (tokens[:, :-1], tokens[:, 1:]))

    def step() -> None:
        theirs.chunkwise_recurrent, theirs.retnet_rel_pos.recurrent_chunk_size = chunkwise, CHUNK
        optimizer.zero_grad(set_to_none=True)
        logits = theirs(inputs)[0]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimizer.step()
        theirs.chunkwise_recurrent = False

    return step


if __name__ == "__main__":
    main()
