"""How far a long run is, as lines on stderr."""

import sys
import time


class Progress:
    """Called with the tokens read so far and in all, says so every ten seconds.

    title: what the lines begin with.
    """

    EVERY = 10.0

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = self._said = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._said < self.EVERY:
            return
        self._said = now
        rate = done / (now - self._started)
        left = (total - done) / rate
        print(
            f"{self._title}: {done:,} of {total:,} tokens, {rate:,.0f} per second, {left / 60:.1f} minutes left",
            file=sys.stderr,
            flush=True,
        )
