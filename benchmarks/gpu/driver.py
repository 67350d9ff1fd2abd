"""Runs the cases and the models on this machine, and keeps every figure as soon as it is known."""

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu import baselines, clock, models, oracle, table
from benchmarks.gpu.cases import Case, Run, all_cases, program
from benchmarks.gpu.floors import H200, Machine, floor
from benchmarks.timing import conditions

NAME = "kernels_gpu"
SAME_MACHINE = ("gpu", "driver", "jax", "triton", "jax-triton")


class Results:
    """The result as far as it is known, in ``folder``/kernels_gpu.json."""

    def __init__(self, folder: Path, described: dict[str, Any], keep: bool) -> None:
        self.path = folder / f"{NAME}.json"
        self.whole: dict[str, Any] = {"conditions": described, "kernels": {}, "models": {}}
        if keep and self.path.exists():
            before = json.loads(self.path.read_text())
            differs = [key for key in SAME_MACHINE if before["conditions"].get(key) != described.get(key)]
            if differs:
                raise SystemExit(
                    f"{self.path} holds figures of another {' and '.join(differs)}: choose another --output, or measure everything."
                )
            self.whole |= {part: before[part] for part in ("kernels", "models")}

    def floors(self, case: Case, machine: Machine) -> None:
        """Those of the machine as it was measured this time; rows of this case that were there stay."""
        rows = self.whole["kernels"].get(case.name, {}).get("rows", {})
        bounds = {passes: floor(walks, machine) for passes, walks in case.walks.items()}
        self.whole["kernels"][case.name] = {
            "title": case.title,
            "floors": {passes: {"ms": ms, "bound": bound} for passes, (ms, bound) in bounds.items()},
            "rows": rows,
        }

    def kernel(self, case: str, row: str, passes: str, found: dict[str, Any]) -> None:
        self.whole["kernels"].setdefault(case, {"title": case, "floors": {}, "rows": {}})
        entry = self.whole["kernels"][case]
        if "ms" in found:
            found["floor_over_measured"] = entry["floors"][passes]["ms"] / found["ms"]
        entry["rows"].setdefault(row, {})[passes] = found
        print(table.line(case, row, passes, found), flush=True)
        self.save()

    def model(self, what: str, row: str, found: dict[str, Any]) -> None:
        self.whole["models"].setdefault(what, {})[row] = found
        print(table.line(what, row, "", found), flush=True)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.whole, indent=1) + "\n")


def run(output: Path, *, tiny: bool, only: str | None, torch_python: str | None) -> Results:
    """Everything whose name ``only`` finds; ``tiny``: at shapes for a CPU. PyTorch first: JAX gives no memory back."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not tiny:
        raise SystemExit(
            f"JAX sees no NVIDIA GPU here, but {jax.devices()}: install ssm_jax[cuda,triton] on a machine with one, "
            "or use --dry-run (tiny shapes on the CPU) or --aot (compile for an H200 that is not there)."
        )
    machine, described = clock.machine(device, tiny)
    versions = {name: _version(name) for name in ("triton", "jax-triton")}
    results = Results(
        output, conditions(**versions, **described, dtype="bfloat16", dry_run=tiny), keep=only is not None
    )
    wanted: Callable[[str], Any] = re.compile(only or "").search
    cases = [case for case in all_cases(tiny) if wanted(case.name)]
    setup = models.TINY if tiny else models.MAMBA_130M
    whole_models = bool(wanted("models"))
    for case in cases:
        results.floors(case, H200 if tiny else machine)
    for row in baselines.rows(cases, setup if whole_models else None, "cpu" if tiny else "cuda", torch_python):
        _keep_baseline(results, row)
    for case in cases:
        _measure(case, results, device, tiny)
    if whole_models:
        for what, arm, found in models.run(setup):
            results.model(what, arm, found)
    return results


def _keep_baseline(results: Results, line: dict[str, Any]) -> None:
    if "versions" in line:
        results.whole["conditions"]["pytorch_side"] = line["versions"]
        return
    case, row, passes = (line.pop(name, "all") for name in ("case", "row", "passes"))
    if passes == "model":
        results.model(case, row, line)
    else:
        results.kernel(case, row, passes, line)


def _measure(case: Case, results: Results, device: Any, tiny: bool) -> None:
    arguments = jax.jit(
        lambda i, masked: (case.inputs(jax.random.key(i)), case.cotangent(jax.random.key(i + 100), masked)),
        static_argnums=1,
    )
    expected = case.expected(*arguments(0, True))
    for row, run in case.contestants().items():
        for passes in case.walks if not isinstance(run, str) else ["all"]:
            if isinstance(run, str):
                found: dict[str, Any] = {"missing": run}
            else:
                try:
                    found = _one(case, run, passes, arguments, expected, device, tiny)
                except Exception as error:
                    found = {"failed": f"{type(error).__name__}: {error}"[:300]}
            results.kernel(case.name, row, passes, found)


def _one(
    case: Case,
    run: Run,
    passes: str,
    arguments: Callable[[int, bool], tuple[Any, Any]],
    expected: oracle.Arrays,
    device: Any,
    tiny: bool,
) -> dict[str, Any]:
    """Compiled, held against the oracle, and timed if it is right and fits."""
    checked = arguments(0, True)
    compiled = jax.jit(program(run, passes)).lower(*checked).compile()
    found: dict[str, Any] = clock.memory(compiled)
    room = (device.memory_stats() or {}).get("bytes_limit", float("inf")) / clock.GIB
    if found["peak_gib"] > room:
        return {**found, "failed": f"does not fit: {found['peak_gib']:.1f} GiB of {room:.1f}"}
    out = compiled(*checked)
    y, gradients = out if "backward" in passes else (out, None)
    found["errors"] = oracle.errors(case.looked_at(y, gradients), expected)
    del out, y, gradients, checked
    if wrong := oracle.verdict(found["errors"]):
        return {**found, "failed": wrong}
    sets = [arguments(0, False)] if tiny else clock.sets_of(lambda i: arguments(i, False))
    return {**found, **clock.measure(compiled, sets, budget=0.0 if tiny else 2.0, profile=not tiny)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
