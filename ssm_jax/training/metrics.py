"""Where numbers go: ``metrics.jsonl`` always, TensorBoard events beside it, Weights & Biases on request."""

import contextlib
import importlib
import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssm_jax import distributed, files
from ssm_jax.errors import ConfigError
from ssm_jax.training.config import LogConfig

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "tensorboard"
WANDB_ID = "wandb_id.txt"
TIMES = ("tokens_per_s", "step_s", "seconds", "data_s", "wait_s", "model_tflops_per_s", "mfu")


class Meter:
    """Counts of a run that outlive a restart: steps, data rows and tokens trained on, seconds spent in training steps."""

    def __init__(self, step: int = 0, rows: int = 0, tokens: float = 0.0, seconds: float = 0.0):
        self.step, self.rows, self.tokens, self.seconds = step, rows, tokens, seconds
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last row (evaluation, saving)."""
        self._last = time.monotonic()
        self._parts = {"data_s": 0.0, "wait_s": 0.0}

    @contextlib.contextmanager
    def waiting(self, part: str) -> Iterator[None]:
        """Counts the time inside as waiting for data ("data_s") or for the device ("wait_s")."""
        started = time.monotonic()
        yield
        self._parts[part] += time.monotonic() - started

    def row(
        self, step: int, metrics: Mapping[str, Any], batch_size: int, flops: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """The metrics of a finished step as a row of ``metrics.jsonl``. All but the times (``TIMES``) are the same in every rerun.

        A metric with a ``name_weight`` of 0 beside it was not computed in this step, and is left out.
        ``flops``: the model's operations in a step, and where it is known what the devices can do in a second ("peak").
        """
        now, parts = time.monotonic(), self._parts
        step_s = now - self._last
        self.restart()
        values = dict(metrics)
        weight = values.pop("weight")
        for name in [name for name in values if f"{name}_weight" in values]:
            if values.pop(f"{name}_weight") == 0:
                del values[name]
        self.step, self.rows = step, self.rows + batch_size
        self.tokens, self.seconds = self.tokens + weight, self.seconds + step_s
        times = {"tokens_per_s": weight / step_s, "step_s": step_s, "seconds": self.seconds, **parts}
        if flops:
            times["model_tflops_per_s"] = flops["step"] / step_s / 1e12
        if flops and "peak" in flops:
            times["mfu"] = flops["step"] / step_s / flops["peak"]
        return {"step": step, **values, "tokens": self.tokens, **times}

    def counts(self) -> dict[str, Any]:
        """The arguments that make this meter again."""
        return {"step": self.step, "rows": self.rows, "tokens": self.tokens, "seconds": self.seconds}


def require_trackers(config: LogConfig) -> None:
    """Raises ConfigError if Weights & Biases is asked for and not installed."""
    if config.wandb is not None:
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "Config key 'log.wandb' is set and the package 'wandb' is not installed; pip install wandb, or set log.wandb=null."
            ) from error


class MetricsLog:
    """Appends rows with a ``step`` to ``metrics.jsonl``, to TensorBoard and, if asked for, to Weights & Biases.

    Use as a context manager. A run that goes on from ``start_step`` first drops what was logged after it. Only the main process
    writes.
    """

    def __init__(self, folder: Path, start_step: int, config: LogConfig, run_config: Mapping[str, Any]):
        self._file: Any = None
        self._events: Any = None
        self._wandb: Any = None
        self._samples = folder / SAMPLES
        if not distributed.is_main():
            return
        truncate(folder / METRICS, start_step)
        truncate(folder / SAMPLES, start_step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / EVENTS), purge_step=start_step + 1 if start_step else None)
        if config.wandb is not None:
            wandb = importlib.import_module("wandb")
            note = folder / WANDB_ID
            if start_step == 0 or not note.is_file():
                files.write_text(note, uuid.uuid4().hex[:16])  # of this run, not of one that stood here before
            self._wandb = wandb.init(
                project=config.wandb,
                name=folder.name,
                id=note.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                config=dict(run_config),
            )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        for target in (self._file, self._events):
            if target is not None:
                target.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(exception[0] is not None))

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; numbers that are not finite become null."""
        if self._file is None:
            return
        self._file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self._file.flush()
        named = {key if "/" in key else f"train/{key}": value for key, value in row.items() if key != "step"}
        if self._events is not None:
            for key, value in named.items():
                self._events.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(named, step=row["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """One row of ``samples.jsonl``."""
        if self._file is None:
            return
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
