"""Whole documents as batches to score: with endless context, the state carried from piece to piece, or in sliding windows."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ssm_jax.data.packing import Row, absent_row


def lanes(documents: Iterable[np.ndarray], count: int) -> list[list[np.ndarray]]:
    """The documents dealt out to ``count`` lanes of about equal length: longest first, each to the lane that is shortest."""
    dealt: list[list[np.ndarray]] = [[] for _ in range(count)]
    lengths = [0] * count
    for document in sorted(documents, key=len, reverse=True):
        lane = min(range(count), key=lengths.__getitem__)
        dealt[lane].append(document)
        lengths[lane] += len(document)
    return [lane for lane in dealt if lane]


def endless(dealt: Sequence[Sequence[np.ndarray]], window: int, aligned: bool = False) -> Iterator[Row]:
    """Batches [lanes, window] to be read in order with the state carried: each lane's documents one after the other.

    A document's position 0 clears the lane, so every token sees its whole document and nothing else. ``aligned``: every document
    begins with a batch, absent places before it.
    """
    streams = [_stream(documents, window if aligned else 1) for documents in dealt]
    length = max(len(stream["tokens"]) for stream in streams)
    for start in range(0, length, window):
        yield _stack([_slice(stream, start, window) for stream in streams], window)


def sliding(documents: Iterable[np.ndarray], window: int, stride: int, batch_size: int) -> Iterator[Row]:
    """Batches [batch_size, window] of windows that start every ``stride`` tokens of a document, each read afresh.

    A target counts in the first window that holds it: every target once, with at least ``window - stride`` tokens of context
    after the first window.
    """
    rows: list[Row] = []
    for document in documents:
        stream = _stream([document])
        total = len(document)
        scored = 0
        for start in range(0, max(total - window, 0) + stride, stride):
            if scored >= total:
                break
            row = _slice(stream, start, window)
            row["weights"] = np.where(np.arange(start, start + len(row["weights"])) < scored, 0, row["weights"])
            row["positions"] = row["positions"] - start
            rows.append(row)
            scored = min(start + window, total)
            if len(rows) == batch_size:
                yield _stack(rows, window)
                rows = []
    if rows:
        yield _stack(rows + [absent_row(window)] * (batch_size - len(rows)), window)


def _stream(documents: Sequence[np.ndarray], multiple: int = 1) -> Row:
    """The documents one after another, each filled up with absent places to a multiple of so many."""
    if multiple > 1:
        streams = [_stream([document]) for document in documents]
        rows = [_stack([stream], -(-len(stream["tokens"]) // multiple) * multiple) for stream in streams]
        return {name: np.concatenate([row[name][0] for row in rows]) for name in rows[0]}
    tokens = np.concatenate(documents).astype(np.int32)
    targets = np.append(tokens[1:], 0).astype(np.int32)
    weights = np.ones(len(tokens), np.float32)
    ends = np.cumsum([len(document) for document in documents])
    targets[ends - 1] = 0
    weights[ends - 1] = 0
    positions = np.concatenate([np.arange(len(document), dtype=np.int32) for document in documents])
    return {"tokens": tokens, "targets": targets, "positions": positions, "weights": weights}


def _slice(stream: Row, start: int, window: int) -> Row:
    return {name: array[start : start + window] for name, array in stream.items()}


def _stack(rows: Sequence[Row], window: int) -> Row:
    absent = absent_row(window)
    return {
        name: np.stack([np.concatenate([row[name], fill[len(row[name]) :]]) for row in rows])
        for name, fill in absent.items()
    }
