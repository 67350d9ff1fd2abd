"""What a person sees while a model trains: a live bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows step, loss, tokens per second and time left; use as a context manager."""

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._total = total_steps
        self._next_line = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4, speed_estimate_period=60)
            self._task = self._bar.add_task("training", total=total_steps, completed=start_step, status="")

    def __enter__(self) -> "TrainingProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of training metrics."""
        status = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], status=status)
            return
        now = time.monotonic()
        if now >= self._next_line or row["step"] == self._total:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            left = (self._total - row["step"]) * row["step_s"]
            self.note(f"step {row['step']}/{self._total}  {status}  lr {row['lr']:.2e}  {_clock(left)} left")

    def note(self, text: str) -> None:
        """A line, or several, above the bar; printed as it is."""
        self._console.print(Text(text), soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
