"""Losses of long stretches of text, read afresh in windows of any length, on a device that holds a few pieces of them at once."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float32, Int32, Integer

from ssm_jax.data.packing import Row
from ssm_jax.evaluation.perplexity import token_losses
from ssm_jax.models import LanguageModel, registry
from ssm_jax.typing import Params

PIECE = 1024
"""Tokens of a window that are read at once, the state carried from piece to piece."""


def cut_stretches(
    documents: Iterable[np.ndarray], size: int
) -> tuple[Int32[np.ndarray, "n m"], Integer[np.ndarray, "n"]]:
    """Stretches of ``size`` inputs with the target of the last, [n, size + 1], and the number of the document of each."""
    found = [document for document in documents if len(document) > size]
    parts = [(number, start) for number, doc in enumerate(found) for start in range(0, len(doc) - size, size)]
    stretches = np.stack([found[number][start : start + size + 1] for number, start in parts])
    return stretches.astype(np.int32), np.array([number for number, _ in parts])


def window_losses(
    model: LanguageModel,
    params: Params,
    stretches: Int32[np.ndarray, "n m"],
    length: int,
    batch_size: int = 16,
    piece: int = PIECE,
) -> Float32[np.ndarray, "n S"]:
    """-log p of every target of stretches [n, S + 1], S a multiple of ``length``: windows of ``length`` inputs, each read afresh.

    A window longer than ``piece`` is read in pieces of equal size with the state carried, so the device holds
    ``batch_size * piece`` tokens at once whatever the length.
    """
    tokens, targets = (x.reshape(-1, length) for x in (stretches[:, :-1], stretches[:, 1:]))
    pieces = -(-length // piece)
    width = min(length, registry.whole_chunks(model.config, -(-length // pieces)))
    rows = min(len(tokens), batch_size * max(1, piece // length))
    places = [(first, start) for first in range(0, len(tokens), rows) for start in range(0, length, width)]
    losses = np.empty(tokens.shape, np.float32)

    def batches() -> Iterator[Row]:
        for first, start in places:
            inside = (slice(first, first + rows), slice(start, start + width))
            yield _batch(tokens[inside], targets[inside], start, rows, width)

    found = token_losses(model, params, batches(), carry=pieces > 1)
    for (first, start), (nll_BL, _) in zip(places, found, strict=True):
        part = losses[first : first + rows, start : start + width]
        part[:] = np.asarray(nll_BL)[: part.shape[0], : part.shape[1]]
    return losses.reshape(len(stretches), -1)


def _batch(tokens: np.ndarray, targets: np.ndarray, start: int, rows: int, width: int) -> Row:
    """One piece of ``rows`` windows, ``start`` tokens into them; what is missing of its shape is absent (position -1)."""
    lanes, present = tokens.shape
    room = ((0, rows - lanes), (0, width - present))
    positions = np.tile(np.arange(start, start + present, dtype=np.int32), (lanes, 1))
    return {
        "tokens": np.pad(tokens, room),
        "targets": np.pad(targets, room),
        "positions": np.pad(positions, room, constant_values=-1),
    }
