"""Continuous batch refill as integers: which article, and which part of it, each lane reads in each step.

Articles come from one stream, epoch after epoch, and an article is read in windows. It goes to the lane that is free first (of
several the lowest), so article j of the stream begins at step start_j, which does not decrease with j. What a step reads follows
from the articles' lengths, the seed and the step alone.
"""

import heapq
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable
from math import ceil
from typing import Literal

import numpy as np
from jaxtyping import Integer

from ssm_jax.errors import DataError

Refill = Literal["stable", "closing", "static"]
Places = tuple[Integer[np.ndarray, "lanes"], Integer[np.ndarray, "lanes"]]
"""Article of each lane, -1 for none, and the place of its window's first token in the article."""


class Schedule:
    """``schedule.at(step)`` for any step; safe to use from several threads.

    refill:
        "stable": a lane that ends takes the next article at once and keeps its index; epochs follow one another without a gap.
        "closing": the order of BakaLLM's ``train_with_dynamic_batches``. The same articles in the same steps, but lanes that go on
        move up to close the gaps, and an epoch ends before the next begins.
        "static": no refill; articles are taken together and a lane stays absent from its article's end to that of the longest.

    An article has (n + window - 2) // window windows: as many as hold a target, so that its last token alone is no window.
    "closing" reads such a token, as published, but leaves out steps that would hold nothing else. Articles without a window are
    left out.

    Args:
        lengths: tokens of each article.
        lanes: over all processes together.
        seed: of the articles' order, which differs from epoch to epoch. shuffle: or the stored order.
        epochs: after so many passes over the articles lanes drain, and the schedule ends; None is without end.

    Raises:
        DataError: no article of two tokens, no lane, a window below 2, a seed of more than 32 bits.
    """

    def __init__(
        self,
        lengths: Integer[np.ndarray, "n"],
        *,
        lanes: int,
        window: int,
        refill: Refill = "stable",
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | float | None = None,
    ):
        if lanes < 1 or window < 2:
            raise DataError(
                f"{lanes} lane(s) with windows of {window}; choose at least 1 lane and a window of 2 tokens."
            )
        if not 0 <= seed < 2**32:
            raise DataError(f"Data seed {seed} is out of range; choose one from 0 to {2**32 - 1}.")
        if not np.any(lengths >= 2):
            raise DataError(
                "No article has two tokens, so there is nothing to predict; prepare the data with more text."
            )
        self.lanes, self.window, self.refill = lanes, window, refill
        windows = (lengths + window - (1 if refill == "closing" else 2)) // window
        self._used = np.flatnonzero((windows > 0) & (lengths > 0))
        self._windows, self._lengths = windows, lengths
        self._seed, self._shuffle, self._order = seed, shuffle, self._used
        self._articles = None if epochs is None else max(1, ceil(epochs * len(self._used)))
        self._drain = {"stable": 0, "closing": len(self._used), "static": lanes}[refill]
        self._taken = 0
        self._free = [(0, lane) for lane in range(lanes)]
        self._starts = [array("q") for _ in range(lanes)]
        self._stream = [array("q") for _ in range(lanes)]  # places in the stream of the articles that begin there
        self._ids = [array("q") for _ in range(lanes)]
        self._kept, self._looked_at = array("q"), 0
        self._lock = threading.Lock()

    @property
    def steps(self) -> int | None:
        """How many there are; None without end."""
        if self._articles is None:
            return None
        with self._lock:
            while not self._ended():
                self._take()
            last = max(step for step, _ in self._free)
            if self.refill != "closing":
                return last
            self._keep(lambda: self._looked_at < last)
            return len(self._kept)

    def at(self, step: int) -> Places:
        """What the lanes read in a step.

        Raises:
            IndexError: the schedule has ended.
        """
        with self._lock:
            if self.refill == "closing":
                self._keep(lambda: len(self._kept) <= step)
                step = self._kept[step]
            articles, offsets = self._reading(step)
        if not np.any(articles >= 0):
            raise IndexError(f"the schedule has ended before step {step}")
        return articles, offsets

    def _reading(self, step: int) -> Places:
        while self._free[0][0] <= step and not self._ended():
            self._take()
        found = []
        for lane in range(self.lanes):
            number = bisect_right(self._starts[lane], step) - 1
            if number < 0:
                continue
            article, window = self._ids[lane][number], step - self._starts[lane][number]
            if window < self._windows[article]:
                found.append((self._stream[lane][number], lane, article, window * self.window))
        articles, offsets = np.full(self.lanes, -1, np.int64), np.zeros(self.lanes, np.int64)
        for rank, (_, lane, article, offset) in enumerate(sorted(found) if self.refill == "closing" else found):
            place = rank if self.refill == "closing" else lane
            articles[place], offsets[place] = article, offset
        return articles, offsets

    def _take(self) -> None:
        """The next article of the stream begins."""
        epoch, place = divmod(self._taken, len(self._used))
        if self._shuffle and place == 0:
            # The one generator of numpy whose numbers are promised never to change.
            self._order = np.random.RandomState([self._seed, epoch]).permutation(self._used)
        if self._drain and place % self._drain == 0:
            end = max(step for step, _ in self._free)
            self._free = [(end, lane) for lane in range(self.lanes)]
        article = int(self._order[place])
        start, lane = self._free[0]
        heapq.heapreplace(self._free, (start + int(self._windows[article]), lane))
        self._starts[lane].append(start)
        self._stream[lane].append(self._taken)
        self._ids[lane].append(article)
        self._taken += 1

    def _keep(self, wanted: Callable[[], bool]) -> None:
        """Looks for steps with a target while they are ``wanted``."""
        while wanted():
            articles, offsets = self._reading(self._looked_at)
            if np.any(self._lengths[articles] - offsets >= 2, where=articles >= 0):
                self._kept.append(self._looked_at)
            elif self._ended() and not np.any(articles >= 0):
                raise IndexError("the schedule has ended")
            self._looked_at += 1

    def _ended(self) -> bool:
        return self._articles is not None and self._taken >= self._articles
