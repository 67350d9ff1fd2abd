"""SIGTERM and Ctrl-C as a request to save and leave at the next step."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """``requested`` becomes the signal's name; a second Ctrl-C interrupts at once. Use as a context manager."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
