"""Mamba and Mamba-2 on a CPU beside transformers, on the same weights, in one process.

    python -m benchmarks.mamba_cpu [--quick] [--rounds N]

Training: one whole step (loss, gradients, clipping, AdamW) at batch 4 x 512. Decoding: greedy, 128 tokens after a prompt of 16,
prefill included, batch 1 and 8. Before anything is timed the logits, the losses and the greedy tokens of both sides are compared.
transformers' default scan of Mamba-1 is quadratic in its backward pass; beating it proves nothing, so it is listed but the
ratio is taken to the fastest PyTorch path. Writes benchmarks/results/mamba_cpu.json.
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

import ssm_jax
from benchmarks.timing import conditions, save, take_turns
from ssm_jax.ops import linear_cross_entropy

BATCH, LENGTH, PROMPT, NEW = 4, 512, 16, 128
SIZES = {
    "mamba": {"vocab_size": 1024, "d_model": 256, "n_layers": 4, "d_state": 16},
    "mamba2": {"vocab_size": 1024, "d_model": 256, "n_layers": 4, "d_state": 64, "headdim": 64},
}
LEARNING_RATE, CLIP = 1e-4, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds instead of 7, and no quadratic eager Mamba-1 step"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds (default 7)")
    parser.add_argument("--families", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    rounds = args.rounds or (3 if args.quick else 7)
    result: dict[str, Any] = {
        "conditions": conditions(torch_threads=2, dtype="float32", sizes=SIZES, batch=BATCH, length=LENGTH)
    }
    for family in args.families:
        model = ssm_jax.build(family, **SIZES[family])
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        with tempfile.TemporaryDirectory() as folder:
            ssm_jax.save_pretrained(model, params, Path(folder) / "hf", layout="transformers")
            peers = _peers(family, str(Path(folder) / "hf"))
        result[family] = {
            "agreement": _agreement(model, params, peers["eager"]),
            "train": _train(model, params, peers, rounds, quadratic=not args.quick),
            "decode": {f"batch {n}": _decode(model, params, peers["eager"], n, rounds) for n in (1, 8)},
        }
        _show(family, result[family])
    if not args.no_save:
        print("written:", save("mamba_cpu", result))


def _peers(family: str, folder: str) -> dict[str, Any]:
    """The PyTorch paths that exist for a family, each on its own copy of the weights."""
    import transformers

    transformers.logging.set_verbosity_error()

    def load(**changes: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **changes)

    peers = {"eager": load()}
    if family == "mamba":
        peers["compile"] = load()
        peers["mambapy"] = load(use_mambapy=True)
    return peers


def _agreement(model: Any, params: Any, peer: Any) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(0, 1024, (2, 64))
    ours, _ = model.apply({"params": params}, jnp.asarray(tokens, jnp.int32))
    with torch.no_grad():
        output = peer(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens), use_cache=False)
        greedy = peer.generate(torch.tensor(tokens[:, :PROMPT]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    nll = -jax.nn.log_softmax(ours[:, :-1])[np.arange(2)[:, None], np.arange(63), tokens[:, 1:]].mean()
    generated = ssm_jax.generate(model, params, tokens[:, :PROMPT], max_new_tokens=32)
    agreement = {
        "largest logit difference": float(np.abs(np.asarray(ours) - output.logits.numpy()).max()),
        "loss difference": abs(float(nll) - float(output.loss)),
        "equal greedy tokens": float(np.mean(np.asarray(generated) == greedy[:, PROMPT:].numpy())),
    }
    if agreement["largest logit difference"] > 1e-4 or agreement["equal greedy tokens"] < 1:
        raise SystemExit(f"The two sides do not compute the same thing: {agreement}")
    return agreement


def _train(model: Any, params: Any, peers: dict[str, Any], rounds: int, *, quadratic: bool) -> dict[str, Any]:
    tokens = np.random.default_rng(1).integers(0, 1024, (BATCH, LENGTH))
    fast = {"ssm_jax": _our_step(model, params, tokens)}
    for name, module in peers.items():
        called = torch.compile(module) if name == "compile" else module
        fast[name] = _torch_step(called, module, tokens)
    slow = {"eager": fast.pop("eager")} if "compile" in peers else {}
    times = take_turns(fast, rounds=rounds, warmup=2)
    if slow and quadratic:
        times |= take_turns(slow, rounds=1, warmup=0)
    return _table(times, BATCH * LENGTH)


def _our_step(model: Any, params: Any, tokens: np.ndarray) -> Callable[[], Any]:
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, weight_decay=0.01))
    inputs, targets = jnp.asarray(tokens[:, :-1], jnp.int32), jnp.asarray(tokens[:, 1:], jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            features, _ = model.apply({"params": params}, inputs, method="features")
            weights = jnp.ones(targets.shape, jnp.float32)
            total, weight = linear_cross_entropy(features, model.readout(params), targets, weights)
            return total / weight

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    carry = [jax.tree.map(jnp.copy, params), optimizer.init(params)]

    def run() -> float:
        carry[0], carry[1], value = step(*carry, inputs, targets)
        return float(value)

    return run


def _torch_step(called: Any, module: Any, tokens: np.ndarray) -> Callable[[], Any]:
    ids = torch.tensor(tokens)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def run() -> float:
        module.train()
        optimizer.zero_grad(set_to_none=True)
        loss = called(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        return float(loss)

    return run


def _decode(model: Any, params: Any, peer: Any, batch: int, rounds: int) -> dict[str, Any]:
    prompt = np.random.default_rng(2).integers(0, 1024, (batch, PROMPT))
    ids = torch.tensor(prompt)
    peer.eval()

    def ours() -> Any:
        return jax.block_until_ready(ssm_jax.generate(model, params, prompt, max_new_tokens=NEW))

    def loop() -> Any:
        with torch.no_grad():
            output = peer(input_ids=ids, use_cache=True)
            for _ in range(NEW):
                following = output.logits[:, -1:].argmax(-1)
                output = peer(input_ids=following, cache_params=output.cache_params, use_cache=True)

    def generate() -> Any:
        with torch.no_grad():
            return peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )

    return _table(
        take_turns({"ssm_jax": ours, "bare loop": loop, "generate()": generate}, rounds=rounds, warmup=2), batch * NEW
    )


def _table(times: dict[str, dict[str, float]], tokens: int) -> dict[str, Any]:
    best = min(entry["median"] for name, entry in times.items() if name != "ssm_jax")
    rows = {
        name: {"tokens_per_s": round(tokens / entry["median"], 1), "seconds": entry} for name, entry in times.items()
    }
    return {"paths": rows, "ratio_to_fastest_pytorch": round(best / times["ssm_jax"]["median"], 2)}


def _show(family: str, result: dict[str, Any]) -> None:
    print(f"\n{family}: {result['agreement']}")
    for title, table in [("train step", result["train"]), *((f"decode, {k}", v) for k, v in result["decode"].items())]:
        print(f"  {title}: {table['ratio_to_fastest_pytorch']}x the fastest PyTorch path")
        for name, row in table["paths"].items():
            seconds = row["seconds"]
            spread = f"[{seconds['min'] * 1e3:.0f} .. {seconds['max'] * 1e3:.0f}]"
            print(f"    {name:12s} {row['tokens_per_s']:10.1f} tokens/s   {seconds['median'] * 1e3:9.1f} ms {spread}")


if __name__ == "__main__":
    main()
