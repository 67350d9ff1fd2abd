"""A split of prepared data, scored by a model and by the byte-level baseline, over the same targets."""

from collections.abc import Iterator

import numpy as np

from ssm_jax.data.pipeline import evaluation_batches
from ssm_jax.data.shards import PackedDataset
from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation import ngram
from ssm_jax.evaluation.perplexity import evaluate
from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params

_ROWS = 256


def evaluate_split(
    model: LanguageModel, params: Params, dataset: PackedDataset, batch_size: int = 16
) -> dict[str, float]:
    """``evaluate`` over every row of a split, in its fixed windows; bytes are those of the split's text.

    Raises:
        DataError: the data has token ids that the model does not have.
    """
    if dataset.vocab_size > model.config.vocab_size:
        raise DataError(
            f"Data {dataset.path} has {dataset.vocab_size} token ids and the model {model.config.vocab_size}; "
            "prepare the data with the model's tokenizer."
        )
    return evaluate(model, params, evaluation_batches(dataset, batch_size=batch_size), dataset.split.text_bytes)


def evaluate_baseline(
    train: PackedDataset, held_out: PackedDataset, tokenizer: Tokenizer, order: int = 3
) -> dict[str, float | int]:
    """Bits per byte on ``held_out`` of the order-``order`` byte model (see ngram.py) of ``train``.

    Every byte and every end mark of the same documents counts, divided by the bytes alone: what ``evaluate_split`` measures.
    """
    model = ngram.fit(byte_documents(train, tokenizer), order)
    documents = list(byte_documents(held_out, tokenizer))
    size = sum(len(document) - 2 for document in documents)
    return {"order": order, "bits_per_byte": ngram.bits(model, documents) / size, "bytes": size}


def byte_documents(dataset: PackedDataset, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of a split as bytes between two end marks (256)."""
    for document in ngram.documents(evaluation_batches(dataset, batch_size=_ROWS)):
        if tokenizer.kind == "bytes":
            yield document
        else:
            text = tokenizer.decode(document[1:-1]).encode()
            yield np.array([256, *text, 256], np.int32)
