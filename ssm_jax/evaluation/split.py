"""A split of prepared data, scored by a model and by the byte-level baseline, over the same targets."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ssm_jax.data.packing import Row
from ssm_jax.data.pipeline import evaluation_batches, stored_documents
from ssm_jax.data.shards import PackedDataset
from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation import documents, ngram
from ssm_jax.evaluation.perplexity import evaluate
from ssm_jax.models import LanguageModel, registry
from ssm_jax.typing import Params

WINDOW = 1024
"""Tokens that are read at once where the context has no end."""


class Windows(NamedTuple):
    """Sliding windows: tokens of each, and tokens from the start of one to that of the next."""

    window: int
    stride: int


def windows_of(model: LanguageModel, window: int, stride: int | None) -> Windows | None:
    """The windows that whole documents are read in; None where their context has no end.

    Without ``stride`` the context has no end, unless the model's has a limit: then documents are cut into windows of that length.

    Raises:
        DataError: a stride outside 1 ... window; a window above the limit.
    """
    limit = registry.context_limit(model.config)
    if stride is None:
        return None if limit is None else Windows(limit, limit)
    if not 1 <= stride <= window:
        raise DataError(f"The stride is {stride} and the window {window}; the stride must be from 1 to the window.")
    if limit is not None and window > limit:
        raise DataError(
            f"The window is {window} and the model reads at most {limit} tokens; choose --window {limit} or less."
        )
    return Windows(window, stride)


def evaluate_split(
    model: LanguageModel, params: Params, dataset: PackedDataset, batch_size: int = 16, joined: bool = False
) -> dict[str, Any]:
    """``evaluate`` over every row of a split, each read afresh: the loss that training sees. Bytes are those of the split's text.

    ``joined``: a row is read as one document, whatever begins in it: what training sees with ``data.joined``.

    Raises:
        DataError: the data has token ids that the model does not have, longer rows than it reads, or was prepared as documents.
    """
    require_vocabulary(model, dataset)
    limit = registry.context_limit(model.config)
    if limit is not None and dataset.seq_len > limit:
        raise DataError(
            f"Data {dataset.path} has rows of {dataset.seq_len} tokens and the model reads at most {limit}; prepare it with "
            f"--seq-len {limit}."
        )
    if not joined and not registry.restarts_within_calls(model.config):
        raise DataError(
            f"Data {dataset.path} was prepared as rows with several documents, and this model begins a document only with a call; "
            "score whole documents (evaluate_documents), or rows as one document (joined)."
        )
    rows = evaluation_batches(dataset, batch_size=batch_size)
    rows = map(_as_one_document, rows) if joined else rows
    return evaluate(model, params, rows, dataset.split.text_bytes)


def _as_one_document(row: Row) -> Row:
    """Rows without the starts of documents in them. Absent places stand at the end, where nothing is scored."""
    positions = np.broadcast_to(np.arange(row["tokens"].shape[1], dtype=np.int32), row["tokens"].shape)
    return {**row, "positions": positions}


def evaluate_documents(
    model: LanguageModel,
    params: Params,
    dataset: PackedDataset,
    batch_size: int = 16,
    window: int = WINDOW,
    stride: int | None = None,
) -> dict[str, Any]:
    """``evaluate`` over the whole documents of a split.

    Without ``stride`` the context has no end: a document is read in pieces of ``window`` tokens and the state carried, so a target
    sees everything before it and the result does not depend on ``window``. With it, windows of ``window`` tokens start every
    ``stride`` tokens and are read afresh; a target counts in the first window that holds it. A model whose context has a limit
    reads such windows in any case, see ``windows_of``.

    Raises:
        DataError: the data has token ids that the model does not have, or a stride above the window, or a window above the limit.
    """
    require_vocabulary(model, dataset)
    windows = windows_of(model, window, stride)
    found = list(stored_documents(dataset))
    if windows is None:
        aligned = not registry.restarts_within_calls(model.config)
        window = registry.whole_chunks(model.config, window)
        batches = documents.endless(documents.lanes(found, batch_size), window, aligned)
        return evaluate(model, params, batches, dataset.split.text_bytes, carry=True)
    batches = documents.sliding(found, *windows, batch_size)
    return evaluate(model, params, batches, dataset.split.text_bytes)


def require_vocabulary(model: LanguageModel, dataset: PackedDataset) -> None:
    """Raises DataError if the data has token ids that the model does not have."""
    if dataset.vocab_size > model.config.vocab_size:
        raise DataError(
            f"Data {dataset.path} has {dataset.vocab_size} token ids and the model {model.config.vocab_size}; "
            "prepare the data with the model's tokenizer."
        )


def evaluate_baseline(
    train: PackedDataset, held_out: PackedDataset, tokenizer: Tokenizer, order: int = 3
) -> dict[str, float | int]:
    """Bits per byte on ``held_out`` of the order-``order`` byte model (see ngram.py) of ``train``.

    Every byte and every end mark of the same documents counts, divided by the bytes alone: what the evaluations above measure.
    """
    model = ngram.fit(byte_documents(train, tokenizer), order)
    documents = list(byte_documents(held_out, tokenizer))
    size = sum(len(document) - 2 for document in documents)
    return {"order": order, "bits_per_byte": ngram.bits(model, documents) / size, "bytes": size}


def byte_documents(dataset: PackedDataset, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of a split as bytes between two end marks (256)."""
    for document in stored_documents(dataset):
        if tokenizer.kind == "bytes":
            yield document
        else:
            text = tokenizer.decode(document[1:-1]).encode()
            yield np.array([256, *text, 256], np.int32)
