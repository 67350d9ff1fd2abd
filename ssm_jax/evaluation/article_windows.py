"""Articles in the windows of BakaLLM's protocol, dealt out to lanes that are filled again as soon as they are empty.

Windows of n tokens start every n/2 tokens of an article. In the first one every token but its first is a target, in the others
those of the second half, each of which has n/2 or more tokens before it. The last window is the first that reaches the end. So
every token of an article but its first is the target of exactly one window, and an article of at most n tokens is one window.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer


class Span(NamedTuple):
    """A window's tokens ``start`` to ``stop`` of an article; those from ``first`` on, counted in the window, are its targets."""

    start: int
    stop: int
    first: int

    @property
    def inputs(self) -> int:
        """Tokens that have a target: all but the last."""
        return self.stop - self.start - 1

    @property
    def targets(self) -> int:
        return max(self.stop - self.start - self.first, 0)


class Window(NamedTuple):
    """The tokens of a span, and what it belongs to: whatever the caller wants to find it by."""

    tokens: Integer[np.ndarray, "n"]
    span: Span
    owner: int


class Part(NamedTuple):
    """What a lane reads of its window in one batch: ``size`` inputs from the ``start``-th on."""

    window: Window
    start: int
    size: int

    @property
    def scored(self) -> slice:
        """The places of the batch's row that hold targets which count."""
        return slice(max(self.window.span.first - 1 - self.start, 0), self.size)

    @property
    def is_last(self) -> bool:
        return self.start + self.size == self.window.span.inputs


def spans(length: int, n_ctx: int) -> Iterator[Span]:
    """The windows of an article of ``length`` tokens: none if it is empty; of a single token one without a target."""
    half = n_ctx // 2
    for start in range(0, length, half):
        if start and start + half >= length:
            return
        yield Span(start, min(start + n_ctx, length), half if start else 1)


def batches(windows: Iterable[Window], lanes: int, piece: int) -> Iterator[dict[str, Any]]:
    """Batches ``{tokens, targets, positions}`` [lanes, piece], to be read with the state carried, and ``parts``: one per lane, None
    where it has nothing left.

    A lane reads its window in parts of ``piece`` tokens and begins the next one at the start of a batch. So position 0, which
    clears it, stands in the first column only, and only the last part of a window has absent places (position -1).
    """
    waiting = (window for window in windows if window.span.targets)
    parts: list[Part | None] = [None] * lanes
    while True:
        parts = [_next_part(part, waiting, piece) for part in parts]
        if not any(parts):
            return
        rows = [_row(part, piece) for part in parts]
        tokens, targets, positions = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        yield {"tokens": tokens, "targets": targets, "positions": positions, "parts": tuple(parts)}


def _next_part(part: Part | None, waiting: Iterator[Window], piece: int) -> Part | None:
    if part is not None and not part.is_last:
        window, start = part.window, part.start + part.size
    else:
        following = next(waiting, None)
        if following is None:
            return None
        window, start = following, 0
    return Part(window, start, min(piece, window.span.inputs - start))


def _row(part: Part | None, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, targets, positions = (np.full(piece, fill, np.int32) for fill in (0, 0, -1))
    if part is None:
        # One token from nowhere, so that an idle lane begins anew in every batch and its state never grows old.
        positions[0] = 0
        return tokens, targets, positions
    window, start, size = part
    targets[:size] = window.tokens[start + 1 : start + size + 1]
    # The window's last token, which is only a target, is read where there is room: where a call closes a chunk, how many tokens
    # are in it says where its pauses stand, and BakaLLM reads whole windows.
    read = min(size + part.is_last, piece)
    tokens[:read] = window.tokens[start : start + read]
    positions[:read] = np.arange(start, start + read)
    return tokens, targets, positions
