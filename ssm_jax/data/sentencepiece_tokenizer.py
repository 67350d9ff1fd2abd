"""SentencePiece models (``tokenizer.model``), by the package that trains them."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from ssm_jax.data.description import write_description
from ssm_jax.data.extras import import_extra
from ssm_jax.errors import DataError

MODEL_FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """A ``tokenizer.model`` with a known end-of-text id. Its normalisation, dummy prefix included, is the model's own."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, eos_id: int | None = None):
        """``model``: the file's content. ``eos_id``: default the model's own.

        Raises:
            ValueError: not a SentencePiece model, or one without an end-of-text token.
        """
        sentencepiece = import_extra("sentencepiece", "A tokenizer.model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the package raises bare RuntimeError, or worse for hostile bytes
            raise ValueError("it is no SentencePiece model") from error
        self._model = model
        self.vocab_size = int(self._processor.vocab_size())
        own = int(self._processor.eos_id())
        if eos_id is None and own < 0:
            raise ValueError("it has no end-of-text token")
        self.eos_id = own if eos_id is None else eos_id
        if not self._processor.is_control(self.eos_id):
            raise ValueError(f"its token {self.eos_id} is no control token, so text could spell it")
        self.fingerprint = hashlib.sha256(json.dumps([self.eos_id]).encode() + model).hexdigest()

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """The ids of ``text``, no special tokens added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """``encode`` of several texts at once, on all cores. Raises DataError for bytes that are not UTF-8."""
        try:
            plain = [text if isinstance(text, str) else text.decode("utf-8") for text in texts]
        except UnicodeDecodeError as error:
            raise DataError(f"Text is not UTF-8 (byte {error.start}); a subword tokenizer needs UTF-8.") from error
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(plain, out_type=int, num_threads=threads)]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids``; control tokens and ids outside the vocabulary are left out."""
        known = [token for token in map(int, ids) if 0 <= token < self.vocab_size]
        return str(self._processor.decode([token for token in known if not self._processor.is_control(token)]))

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.model`` unchanged, and what we know of it."""
        (Path(folder) / MODEL_FILE).write_bytes(self._model)
        write_description(Path(folder), self)


def piece_id(model: bytes, piece: str) -> int | None:
    """The id of a piece of a model, None if it has none. Raises ValueError for what is no model."""
    sentencepiece = import_extra("sentencepiece", "A tokenizer.model")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:
        raise ValueError("it is no SentencePiece model") from error
    found = int(processor.piece_to_id(piece))
    return found if processor.id_to_piece(found) == piece else None
