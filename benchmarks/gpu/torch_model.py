"""mamba_ssm's language model: a training step and greedy decoding. On a CPU transformers' Mamba stands in for it."""

import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.torch_side import missing

LEARNING_RATE, CLIP = 1e-3, 1.0


def run(request: dict[str, Any], device: str, report: Callable[..., None]) -> None:
    """One line for training, one for each decoding batch; ``request`` is a size with batches, as ``models.Setup`` has them."""
    row = "mamba_ssm" if device != "cpu" else "transformers in place of mamba_ssm"
    names = ["train", *(f"decode, batch {batch}" for batch in request["decode_batches"])]
    for name in names:
        try:
            batch = int(name.split()[-1]) if name != "train" else None
            found = _train(request, device) if batch is None else _decode(request, batch, device)
            report(case=name, row=row, passes="model", **found)
        except ImportError as error:
            report(case=name, row=row, passes="model", missing=missing("mamba_ssm", error))
        except Exception as error:
            report(case=name, row=row, passes="model", failed=f"{type(error).__name__}: {error}"[:300])


def _model(request: dict[str, Any], device: str) -> Any:
    size = request["size"]
    if device == "cpu":
        transformers = importlib.import_module("transformers")
        config = transformers.MambaConfig(
            vocab_size=size["vocab_size"], hidden_size=size["d_model"], num_hidden_layers=size["n_layers"]
        )
        return transformers.MambaForCausalLM(config)
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=size["d_model"],
        n_layer=size["n_layers"],
        vocab_size=size["vocab_size"],
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=8,
    )
    return importlib.import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel(config, device=device)


def _train(request: dict[str, Any], device: str) -> dict[str, Any]:
    """Loss, gradients, clipping, AdamW; float32 parameters, computing in bfloat16."""
    import torch

    model = _model(request, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    rows, length = request["train_batch"]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(request["size"]["vocab_size"], (rows, length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    seconds = _seconds(step, device)
    peak = {} if device == "cpu" else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"tokens_per_s": rows * length / seconds, "ms": 1e3 * seconds, **peak}


def _decode(request: dict[str, Any], batch: int, device: str) -> dict[str, Any]:
    """Greedy, with CUDA graphs; bfloat16 parameters. The steps' time is what more tokens take beyond the first."""
    import torch

    model = _model(request, device).to(torch.bfloat16).eval()
    prompt, new = request["prompt"], request["new"]
    ids = torch.randint(request["size"]["vocab_size"], (batch, prompt), device=device)

    def generate(count: int) -> Any:
        if device == "cpu":
            mask = torch.ones_like(ids)
            return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
        return model.generate(ids, max_length=prompt + count, cg=True)

    first, whole = _seconds(lambda: generate(1), device), _seconds(lambda: generate(new), device)
    alone = {"steps_tokens_per_s": batch * (new - 1) / (whole - first)} if whole > first else {}
    return {"tokens_per_s": batch * new / whole, **alone, "prompt_ms": 1e3 * first, "ms": 1e3 * whole}


def _seconds(function: Callable[[], Any], device: str, budget: float = 5.0) -> float:
    import torch

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    timed(2)
    return timed(1 if device == "cpu" else max(3, min(50, int(budget / timed(1)))))
