"""Timing side by side: contestants take turns inside one process, so that drift of the machine hits all of them."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds per call of each contestant: median, least and most over ``rounds`` turns after ``warmup`` calls each."""
    for run in contestants.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times), "rounds": len(times)}
        for name, times in seconds.items()
    }


def conditions(**extra: Any) -> dict[str, Any]:
    """What a reader needs to judge a figure: machine, versions, load, date."""
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        **extra,
    }


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
