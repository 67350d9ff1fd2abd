"""The PyTorch side, run as a process: of this Python or another one, where those libraries are installed."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.gpu.models import Setup

ROOT = Path(__file__).parents[2]


def rows(cases: list[Case], setup: Setup | None, device: str, python: str | None) -> Iterator[dict[str, Any]]:
    """One line per row and pass (``case``, ``row``, ``passes`` and what was found), in the order of measuring.

    A process that dies has its last words in a line of its own, and what it had found before is kept.
    """
    request: dict[str, Any] = {
        "device": device,
        "cases": [
            {"title": case.title, "name": case.name, "shape": case.shape, "rows": case.baselines}
            for case in cases
            if case.baselines
        ],
    }
    if setup is not None:
        request["model"] = setup._asdict()
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "results.jsonl"
        asked.write_text(json.dumps(request))
        answered.touch()
        command = [python or sys.executable, "-m", "benchmarks.gpu.torch_side", str(asked), str(answered)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        yield from map(json.loads, answered.read_text().splitlines())
    if process.returncode:
        why = process.stderr.strip().splitlines()[-1:] or ["no message"]
        yield {
            "case": "PyTorch side",
            "row": "process",
            "passes": "all",
            "failed": f"exit {process.returncode}: {why[0]}",
        }
