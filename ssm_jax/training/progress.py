"""What a person sees while a model trains: a live bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ssm_jax import distributed

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows step, loss, tokens per second and time left; use as a context manager."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(highlight=False, quiet=not distributed.is_main())
        self._total = 0
        self._next_line = 0.0
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
            speed_estimate_period=60,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, step: int, total_steps: int) -> None:
        """Shows the bar."""
        self._total = total_steps
        self._task = self._bar.add_task("training", total=total_steps, completed=step, status="")
        self._bar.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of training metrics."""
        status = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s"
        status += f"  mfu {row['mfu']:.1%}" if "mfu" in row else ""
        if self._task is not None:
            self._bar.update(self._task, completed=row["step"], status=status)
        now = time.monotonic()
        if not self._console.is_terminal and (now >= self._next_line or row["step"] == self._total):
            self._next_line = now + _SECONDS_BETWEEN_LINES
            left = _clock((self._total - row["step"]) * row["step_s"])
            self.note(f"step {row['step']}/{self._total}  {status}  lr {row['lr']:.2e}  {left} left")

    def note(self, text: str) -> None:
        """Lines above the bar, printed as they are; characters that could steer a terminal are shown as U+FFFD."""
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        self._console.print(Text(shown), soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
