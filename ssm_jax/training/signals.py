"""SIGTERM and Ctrl-C as a request to save and leave at the next step, which all processes take at the same one."""

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ssm_jax import distributed


class StopRequest:
    """A second Ctrl-C interrupts at once. Use as a context manager.

    With several processes SIGTERM is left to JAX, whose coordination service finds a step that none has passed; Ctrl-C sends it.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        """``max_seconds`` from now on is a request too, of the main process."""
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self.requested: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if distributed.process_count() > 1 else (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to leave before ``step`` + 1; in every process the same."""
        late = time.monotonic() > self._deadline
        if distributed.process_count() == 1:
            return late or self.requested is not None
        if late and distributed.is_main():
            self._deadline = math.inf
            os.kill(os.getpid(), signal.SIGTERM)
        return distributed.preempted(step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if distributed.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
