"""A profiler trace of a few steps, on demand."""

from pathlib import Path
from typing import Any

import jax

PROFILE = "profile"


class Tracer:
    """Traces the steps ``span`` = (first, last) of a run into its ``profile`` folder; use as a context manager."""

    def __init__(self, folder: Path, span: tuple[int, int] | None):
        self._folder, self._span = folder / PROFILE, span
        self._running = False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts the trace if ``step``, about to be dispatched, is the first of the span."""
        if self._span is not None and step == self._span[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace after the last step of the span, when its ``result`` is there."""
        if self._running and self._span is not None and step >= self._span[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
