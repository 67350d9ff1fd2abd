"""The baseline that a byte-level model must beat: an interpolated n-gram model over bytes.

Witten-Bell smoothing (Witten & Bell 1991; Bell, Cleary & Witten 1990), from a uniform distribution upwards: with c(h) the
number of times a context h was seen, T(h) the number of different symbols that followed it, and h' the context without its
oldest symbol,

    P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h))        P(w | h) = P(w | h') for an unseen h

It has no parameter to tune; on program text at order 3 it was better than interpolated absolute discounting with any
discount. Symbols are integers below ``vocab_size``: the 256 bytes and an end mark, which also stands before a document.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt64

BYTES_AND_MARK = 257
_BLOCK = 1 << 22


class _Level(NamedTuple):
    """Counts for contexts of one length; a key is the base-``vocab_size`` number of its symbols, oldest first."""

    grams: UInt64[np.ndarray, "g"]  # context and symbol, ascending
    counts: Int64[np.ndarray, "g"]
    contexts: UInt64[np.ndarray, "h"]  # ascending
    totals: Int64[np.ndarray, "h"]
    types: Int64[np.ndarray, "h"]


class NgramModel(NamedTuple):
    """``levels[k]`` holds the counts for contexts of k symbols."""

    vocab_size: int
    levels: tuple[_Level, ...]


def fit(documents: Iterable[np.ndarray], order: int = 3, vocab_size: int = BYTES_AND_MARK) -> NgramModel:
    """Counts every symbol but the first of each document, after ``order`` symbols of context.

    A document starts with its mark, which fills the part of a context that lies before the document.
    """
    if vocab_size ** (order + 1) > 2**64:
        raise ValueError(f"order {order} over {vocab_size} symbols does not fit 64-bit keys; use a lower order")
    keys, counts = _merge(np.unique(keys, return_counts=True) for keys in _keys(documents, order, vocab_size))
    levels = [_level(keys, counts, vocab_size)]
    for length in reversed(range(order)):
        keys, counts = _merge([(keys % np.uint64(vocab_size ** (length + 1)), counts)])
        levels.append(_level(keys, counts, vocab_size))
    return NgramModel(vocab_size, tuple(reversed(levels)))


def bits(model: NgramModel, documents: Iterable[np.ndarray]) -> float:
    """-sum log2 P over every symbol but the first of each document."""
    order = len(model.levels) - 1
    return float(sum(-np.log2(probabilities(model, keys)).sum() for keys in _keys(documents, order, model.vocab_size)))


def probabilities(model: NgramModel, keys: UInt64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """P(symbol | context) for keys of context and symbol, of the model's full order."""
    size = np.uint64(model.vocab_size)
    result = np.full(len(keys), 1 / model.vocab_size)
    for length, level in enumerate(model.levels):
        grams = keys % size ** np.uint64(length + 1) if length + 1 < len(model.levels) else keys
        contexts = grams // size
        count = _lookup(level.grams, level.counts, grams)
        total = _lookup(level.contexts, level.totals, contexts)
        types = _lookup(level.contexts, level.types, contexts)
        result = np.where(total > 0, (count + types * result) / np.maximum(total + types, 1), result)
    return result


def _keys(documents: Iterable[np.ndarray], order: int, vocab_size: int) -> Iterator[UInt64[np.ndarray, "n"]]:
    """The keys of all targets with their contexts, in blocks of whole documents."""
    pending: list[np.ndarray] = []
    symbols = 0
    for document in documents:
        pending.append(document)
        symbols += len(document)
        if symbols >= _BLOCK:
            yield _block_keys(pending, order, vocab_size)
            pending, symbols = [], 0
    if pending:
        yield _block_keys(pending, order, vocab_size)


def _block_keys(documents: list[np.ndarray], order: int, vocab_size: int) -> UInt64[np.ndarray, "n"]:
    before = max(order, 1)
    padded = [np.concatenate([np.repeat(document[:1], before - 1), document]) for document in documents]
    is_target = np.concatenate([np.arange(len(document)) >= before for document in padded])
    symbols, targets = np.concatenate(padded).astype(np.uint64), np.flatnonzero(is_target)
    keys = np.zeros(len(targets), np.uint64)
    for back in reversed(range(order + 1)):
        keys = keys * np.uint64(vocab_size) + symbols[targets - back]
    return keys


def _merge(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[UInt64[np.ndarray, "g"], Int64[np.ndarray, "g"]]:
    """Sorted distinct keys of all parts, and the sums of their counts."""
    keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys)
    keys, starts = np.unique(keys[order], return_index=True)
    return keys, np.add.reduceat(counts[order], starts)


def _level(grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Level:
    contexts, starts, types = np.unique(grams // np.uint64(vocab_size), return_index=True, return_counts=True)
    return _Level(grams, counts, contexts, np.add.reduceat(counts, starts), types)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> Int64[np.ndarray, "n"]:
    """``values`` at ``wanted`` keys, 0 where a key is absent."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
