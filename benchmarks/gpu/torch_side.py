"""PyTorch's side of the comparison: mamba_ssm and flash-linear-attention, in a process (and, if need be, a Python) of their own.

    python -m benchmarks.gpu.torch_side REQUEST.json RESULTS.jsonl

Needs NumPy, PyTorch and what it measures; writes one line per row and pass as soon as it is known. On ``"device": "cpu"`` plain
PyTorch stands in for the CUDA kernels, under a name that says so, with the same arguments and layouts: what can be tested there.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import oracle

INSTALL = {
    "torch": "pip install torch",
    "mamba_ssm": "pip install --no-build-isolation mamba-ssm causal-conv1d",
    "fla": "pip install flash-linear-attention",
}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    results, device = Path(sys.argv[2]), request["device"]
    stand_in = "plain PyTorch in place of " if device == "cpu" else ""

    def report(**row: Any) -> None:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    report(versions={name: _version(name) for name in ("torch", "triton", "mamba-ssm", "causal-conv1d", "fla-core")})
    for case in request["cases"]:
        rows = {"scan": scan_rows, "scan step": step_rows, "retention": retention_rows}[case["title"]]
        for row in case["rows"]:
            try:
                for passes, found in rows(row, tuple(case["shape"]), device):
                    report(case=case["name"], row=stand_in + row, passes=passes, **found)
            except ImportError as error:
                report(case=case["name"], row=row, missing=missing(row, error))
            except Exception as error:
                report(case=case["name"], row=row, failed=f"{type(error).__name__}: {error}"[:300])
    if "model" in request:
        from benchmarks.gpu import torch_model

        torch_model.run(request["model"], device, report)


def library(module: str, name: str, device: str) -> Callable[..., Any]:
    """A function of the library that is measured; on a CPU its stand-in."""
    if device == "cpu":
        return importlib.import_module("benchmarks.gpu.stand_ins").FUNCTIONS[name]
    return getattr(importlib.import_module(module), name)


def missing(row: str, error: ImportError) -> str:
    """What is not there, and how to get it."""
    package = "torch" if error.name == "torch" else row.split()[0]
    return f"{package} is not importable ({error}): {INSTALL[package]}"


def measure(function: Callable[[], Any], device: str) -> dict[str, Any]:
    """Median milliseconds with the cache emptied before every call, and the most memory that was ever allocated."""
    import torch

    if device == "cpu":
        start = time.perf_counter()
        function()
        wall = 1e3 * (time.perf_counter() - start)
        return {"ms": wall, "timer": "wall", "wall_ms": wall}
    from triton.testing import do_bench

    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": do_bench(function, warmup=25, rep=150, return_mode="median"), "timer": "do_bench", "peak_gib": peak}


def checked(actual: oracle.Arrays, expected: oracle.Arrays, time_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The errors, and the time only of what is right."""
    found = oracle.errors(actual, expected)
    wrong = oracle.verdict(found)
    return {"errors": found, "failed": wrong} if wrong else {"errors": found, **time_it()}


def scan_rows(row: str, shape: tuple[int, ...], device: str) -> Any:
    """mamba_ssm's scan in its own layout, (B, D, L); "with transposes": x arrives and y leaves as (B, L, D), as in a model."""
    import torch

    batch, length, channels, entries = shape
    scan = library("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", device)
    transposed = "transposes" in row
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Any:
        return torch.randn(*size, device=device, generator=generator).to(torch.bfloat16)

    x = normal(batch, length, channels) if transposed else normal(batch, channels, length)
    dt = normal(batch, channels, length) - 4
    A = -torch.arange(1, entries + 1, device=device).float().repeat(channels, 1)
    B, C = normal(batch, entries, length), normal(batch, entries, length)
    D, bias = torch.ones(channels, device=device), normal(channels).float() / 8
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias}
    for tensor in inputs.values():
        tensor.requires_grad_()

    def forward() -> Any:
        u = x.transpose(1, 2).contiguous() if transposed else x
        y = scan(u, dt, A, B, C, D, None, bias, True)
        return y.transpose(1, 2).contiguous() if transposed else y

    seen = oracle.some(channels)
    axis = 2 if transposed else 1
    dy = torch.zeros_like(x).index_copy_(axis, torch.tensor(seen, device=device), normal(*_some(x.shape, axis, seen)))
    rows = {"x": transposed, "dt": False, "y": transposed, "dy": transposed}

    def part(name: str, tensor: Any) -> np.ndarray:
        """As the oracle has it: [B, L, E] of the channels that it looks at."""
        if name in "BC":
            return _wide(tensor).swapaxes(1, 2)
        if name in rows:
            return _wide(tensor if rows[name] else tensor.transpose(1, 2))[..., seen]
        return _wide(tensor)[seen]

    given = {name: part(name, tensor) for name, tensor in {**inputs, "dy": dy}.items()}
    expected = oracle.selective_scan(**given)
    with torch.no_grad():
        actual = {"y": part("y", forward())}
        yield "forward", checked(actual, expected, lambda: measure(forward, device))
    y = forward()
    gradients = torch.autograd.grad(y, tuple(inputs.values()), dy)
    actual = {"y": part("y", y)} | {n: part(n, g) for n, g in zip(inputs, gradients, strict=True)}
    dense = torch.randn_like(dy)

    def both() -> Any:
        return torch.autograd.grad(forward(), tuple(inputs.values()), dense)

    yield "forward+backward", checked(actual, expected, lambda: measure(both, device))


def step_rows(row: str, shape: tuple[int, ...], device: str) -> Any:
    """mamba_ssm's one-token kernel, which writes the state in place."""
    import torch

    batch, channels, entries = shape
    update = library("mamba_ssm.ops.triton.selective_state_update", "selective_state_update", device)
    x, dt, B, C = (
        torch.randn(batch, size, device=device).to(torch.bfloat16) for size in (channels, channels, entries, entries)
    )
    A = -torch.arange(1, entries + 1, device=device).float().repeat(channels, 1)
    D, bias, state = (
        torch.ones(channels, device=device),
        torch.zeros(channels, device=device),
        torch.randn(batch, channels, entries, device=device),
    )
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "state")
    tensors = dict(zip(names, map(_wide, (x, dt, A, B, C, D, bias, state)), strict=True))
    expected = oracle.scan_step(**tensors)
    y = update(state, x, dt, A, B, C, D, None, bias, True)
    actual = {"y": _wide(y), "state": _wide(state)}

    def again() -> Any:
        return update(state, x, dt, A, B, C, D, None, bias, True)

    yield "step", checked(actual, expected, lambda: measure(again, device))


def retention_rows(row: str, shape: tuple[int, ...], device: str) -> Any:
    """flash-linear-attention, after its autotuning."""
    import torch

    batch, length, heads, keys, values = shape
    function = library("fla.ops.retention", row.split()[1] + "_retention", device)
    q, k, v, dy = (
        torch.randn(batch, length, heads, size, device=device).to(torch.bfloat16)
        for size in (keys, keys, values, values)
    )
    q = q * keys**-0.5
    inputs = {"q": q, "k": k, "v": v}
    for tensor in inputs.values():
        tensor.requires_grad_()
    lane, head = batch - 1, heads // 2
    given = {name: _wide(tensor[lane, :, head]) for name, tensor in {**inputs, "dy": dy}.items()}
    expected = oracle.retention(**given, log_decay=float(np.log1p(-(2.0 ** (-5.0 - head)))))

    def forward() -> Any:
        return function(q, k, v, scale=1.0)[0]

    def both() -> Any:
        return torch.autograd.grad(forward(), tuple(inputs.values()), dy)

    with torch.no_grad():
        y = forward()
        yield "forward", checked({"y": _wide(y[lane, :, head])}, expected, lambda: measure(forward, device))
    gradients = dict(zip(inputs, both(), strict=True))
    actual = {name: _wide(tensor[lane, :, head]) for name, tensor in {"y": y, **gradients}.items()}
    yield "forward+backward", checked(actual, expected, lambda: measure(both, device))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _wide(tensor: Any) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _some(shape: Any, axis: int, seen: np.ndarray) -> list[int]:
    return [len(seen) if i == axis else size for i, size in enumerate(shape)]


if __name__ == "__main__":
    main()
