"""Where numbers go: ``metrics.jsonl`` always, TensorBoard events beside it."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_jax import files

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "tensorboard"


class Meter:
    """Counts of a run that outlive a restart: steps, data rows and tokens trained on, seconds spent in training steps."""

    def __init__(self, step: int = 0, rows: int = 0, tokens: float = 0.0, seconds: float = 0.0):
        self.step, self.rows, self.tokens, self.seconds = step, rows, tokens, seconds
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last row (evaluation, saving)."""
        self._last = time.monotonic()

    def row(self, step: int, metrics: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """The metrics of a finished step as a row of ``metrics.jsonl``. All but the times are the same in every rerun."""
        now = time.monotonic()
        step_s, self._last = now - self._last, now
        values = dict(metrics)
        weight = values.pop("weight")
        self.step, self.rows = step, self.rows + batch_size
        self.tokens, self.seconds = self.tokens + weight, self.seconds + step_s
        times = {"tokens_per_s": weight / step_s, "step_s": step_s, "seconds": self.seconds}
        return {"step": step, **values, "tokens": self.tokens, **times}

    def counts(self) -> dict[str, Any]:
        """The arguments that make this meter again."""
        return {"step": self.step, "rows": self.rows, "tokens": self.tokens, "seconds": self.seconds}


class MetricsLog:
    """Appends rows with a ``step`` to ``metrics.jsonl`` and to TensorBoard; use as a context manager.

    A run that goes on from ``start_step`` first drops what was logged after it.
    """

    def __init__(self, folder: Path, start_step: int = 0, tensorboard: bool = True):
        truncate(folder / METRICS, start_step)
        truncate(folder / SAMPLES, start_step)
        self._samples = folder / SAMPLES
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / EVENTS), purge_step=start_step + 1 if start_step else None)

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
                if key != "step":
                    self._events.add_scalar(key if "/" in key else f"train/{key}", value, row["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """One row of ``samples.jsonl``."""
        with open(self._samples, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        if self._events is not None:
            self._events.add_text("sample", f"```\n{prompt}{text}\n```", step)


def truncate(path: Path, last_step: int) -> None:
    """Drops the rows of a JSON-lines file whose step is after ``last_step``, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # a torn line may end inside a character
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    files.write_text(path, "".join(kept))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
