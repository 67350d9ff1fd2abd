"""Where numbers go: ``metrics.jsonl`` always, TensorBoard events beside it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_NOT_PLOTTED = ("step",)


class MetricsLog:
    """Appends rows with a ``step`` to ``metrics.jsonl`` and to TensorBoard; use as a context manager.

    A run that goes on from ``start_step`` first drops what was logged after it.
    """

    def __init__(self, folder: Path, start_step: int = 0, tensorboard: bool = True):
        truncate(folder / METRICS, start_step)
        truncate(folder / SAMPLES, start_step)
        self._folder = folder
        self._file = open(folder / METRICS, "a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; numbers that are not finite become null."""
        self._file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in row.items():
                if key not in _NOT_PLOTTED:
                    self._events.add_scalar(key if "/" in key else f"train/{key}", value, row["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """One row of ``samples.jsonl``."""
        with open(self._folder / SAMPLES, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        if self._events is not None:
            self._events.add_text("sample", f"```\n{prompt}{text}\n```", step)


def truncate(path: Path, last_step: int) -> None:
    """Drops the rows of a JSON-lines file whose step is after ``last_step``, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
