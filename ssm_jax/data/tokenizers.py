"""Tokenizers: raw bytes, any subword tokenizer that the ``tokenizers`` package reads, SentencePiece models.

A tokenizer is an object with ``kind``, ``vocab_size``, ``eos_id``, ``fingerprint``, ``encode``, ``encode_batch``, ``decode``
and ``save``. It travels with prepared data, checkpoints and exports: ``save(folder)`` writes it, ``load_tokenizer(folder)``
reads it back, and equal fingerprints mean equal ids.

Text is data: a special token spelled out in a document ("<|endoftext|>") is encoded as ordinary text. The end-of-text id
enters a token stream only where a document begins or ends (see packing.py).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import tokenizers
from jaxtyping import Int32

from ssm_jax.data import sentencepiece_tokenizer as spm
from ssm_jax.data.description import DESCRIPTION_FILE, write_description
from ssm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from ssm_jax.errors import DataError

MODEL_FILE = "tokenizer.json"
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class ByteTokenizer:
    """The 256 byte values, and id 256 for end of text. Encodes any bytes; decodes invalid UTF-8 to U+FFFD."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256
    fingerprint = hashlib.sha256(b"bytes, eos 256").hexdigest()

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """The ids of ``text``: its UTF-8 bytes. Raises DataError for a str that has no UTF-8 form (lone surrogates)."""
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids``; ids that are not bytes (end of text, padding rows of the vocabulary) are left out."""
        values = np.fromiter(map(int, ids), np.int64)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        write_description(Path(folder), self)


class SubwordTokenizer:
    """A ``tokenizer.json`` (byte-level BPE of GPT-2, GPT-NeoX and Pythia, Unigram, ...) with a known end-of-text id."""

    kind = "subword"

    def __init__(self, model: str, eos_id: int):
        """``model``: the content of a ``tokenizer.json``. Raises ValueError if the ``tokenizers`` package refuses it."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(" ".join(str(error).split())) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._model = model
        self.eos_id = eos_id
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        canonical = json.dumps([eos_id, json.loads(model)], sort_keys=True, ensure_ascii=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """The ids of ``text``, no special tokens added. Raises DataError for bytes that are not UTF-8."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """``encode`` of several texts at once, on all cores."""
        encodings = self._tokenizer.encode_batch_fast([_as_str(text) for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids``; special tokens and ids outside the vocabulary are left out."""
        known = [token for token in map(int, ids) if 0 <= token < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json`` unchanged, plus what names the end of text (for us and for ``transformers``)."""
        folder = Path(folder)
        eos_token = self._tokenizer.id_to_token(self.eos_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
        (folder / MODEL_FILE).write_text(self._model, encoding="utf-8", newline="")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_description(folder, self)


Tokenizer: TypeAlias = ByteTokenizer | SubwordTokenizer | SentencePieceTokenizer


def load_tokenizer(source: str | Path = "bytes", *, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer that ``source`` names.

    Args:
        source: "bytes"; a folder (prepared data, a run or checkpoint with a ``tokenizer`` folder, an exported model, a
            Hugging Face folder with tokenizer.json, tokenizer.model, GPT-2's encoder.json + vocab.bpe or vocab.json + merges.txt);
            the path of one tokenizer.json-like or SentencePiece file; or OWNER/NAME on the Hugging Face hub.
        eos_token: the end-of-text token's text, where the files do not say it.

    Raises:
        DataError: nothing readable there, a file that was changed after it was saved, or no end-of-text token.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, eos_token)
    if not path.is_file():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.exists():
            return _from_hub(str(source), eos_token)
        raise DataError(
            f"Tokenizer {source} does not exist; give 'bytes', a tokenizer.json, a tokenizer.model, a folder that holds one, or "
            "OWNER/NAME on the hub."
        )
    if path.name == DESCRIPTION_FILE:
        return _load_saved(path.parent)
    if path.suffix == ".model":
        return _sentencepiece(path, eos_token)
    if path.suffix != ".json":
        raise DataError(f"Tokenizer {source} is not a tokenizer.json; give 'bytes', a tokenizer.json, or its folder.")
    content = _read_json(path)
    if not isinstance(content, dict) or "model" not in content:
        raise DataError(
            f"Tokenizer {source} is not a tokenizer.json (it has no 'model'); for GPT-2's files give their folder."
        )
    return _subword(path.read_text(encoding="utf-8"), path, eos_token)


def tokenizer_folder(path: Path) -> Path | None:
    """Where the tokenizer of a folder lies: in it, in its ``tokenizer``, or in that of the run whose checkpoint it is."""
    marks = (DESCRIPTION_FILE, MODEL_FILE, spm.MODEL_FILE, "encoder.json", "vocab.json")
    folders = (path / "tokenizer", path, path.resolve().parent.parent / "tokenizer")
    return next((folder for folder in folders if any((folder / mark).is_file() for mark in marks)), None)


class TextStream:
    """Decodes ids as they are generated, holding back characters whose bytes are still incomplete.

    The pieces of ``push`` and ``finish`` joined are ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # what was shown last, as context for the decoder, then what was not shown yet
        self._shown = 0

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """The text that ``ids`` complete, possibly empty."""
        self._ids.extend(map(int, ids))
        return self._take(allow_incomplete=False)

    def finish(self) -> str:
        """What was held back; an incomplete character comes as U+FFFD."""
        return self._take(allow_incomplete=True)

    def _take(self, allow_incomplete: bool) -> str:
        if self._shown == len(self._ids):
            return ""
        context = self._tokenizer.decode(self._ids[: self._shown])
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and not allow_incomplete:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(context) :]


def _load_folder(folder: Path, eos_token: str | None) -> Tokenizer:
    if (folder / DESCRIPTION_FILE).is_file():
        return _load_saved(folder)
    if (folder / MODEL_FILE).is_file():
        return load_tokenizer(folder / MODEL_FILE, eos_token=eos_token)
    if (folder / spm.MODEL_FILE).is_file():
        return _sentencepiece(folder / spm.MODEL_FILE, eos_token)
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _subword(_byte_level_bpe(folder / vocabulary, folder / merges), folder / vocabulary, eos_token)
    if (folder / "tokenizer").is_dir():
        return _load_folder(folder / "tokenizer", eos_token)
    raise DataError(
        f"Folder {folder} holds no tokenizer; it needs {DESCRIPTION_FILE}, tokenizer.json, tokenizer.model, or encoder.json with "
        "vocab.bpe."
    )


def _load_saved(folder: Path) -> Tokenizer:
    path = folder / DESCRIPTION_FILE
    description = _read_json(path)
    tokenizer: Tokenizer
    try:
        kind, eos_id, fingerprint = description["kind"], int(description["eos_id"]), description["fingerprint"]
        if kind == ByteTokenizer.kind:
            tokenizer = ByteTokenizer()
        elif kind == SubwordTokenizer.kind:
            tokenizer = SubwordTokenizer((folder / MODEL_FILE).read_text(encoding="utf-8"), eos_id)
        elif kind == SentencePieceTokenizer.kind:
            tokenizer = SentencePieceTokenizer((folder / spm.MODEL_FILE).read_bytes(), eos_id)
        else:
            raise DataError(
                f"Tokenizer {path} is of kind {kind!r}, which this version cannot read; install a newer ssm_jax."
            )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"Tokenizer {path} is damaged ({error}); copy the tokenizer's files again.") from error
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"Tokenizer in {folder} is not the one that was saved (fingerprint differs); copy its files again."
        )
    return tokenizer


def _from_hub(name: str, eos_token: str | None) -> Tokenizer:
    """The ``tokenizer.json`` of a repository on the hub, from the local cache where it is there."""
    try:
        model = str(tokenizers.Tokenizer.from_pretrained(name).to_str())
    except Exception as error:  # the package and the network raise anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"Tokenizer {name} is no file here, and cannot be fetched from the hub ({reason}); check the name and the network, or "
            "give a file."
        ) from error
    return _subword(model, Path(name), eos_token)


def _sentencepiece(path: Path, eos_token: str | None) -> SentencePieceTokenizer:
    try:
        model = path.read_bytes()
        if eos_token is None:
            return SentencePieceTokenizer(model)
        eos_id = spm.piece_id(model, eos_token)
        if eos_id is None:
            raise ValueError(f"it has no token {eos_token!r}")
        return SentencePieceTokenizer(model, eos_id)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Tokenizer {path} cannot be read ({error}); give a SentencePiece model with an end-of-text token, or name one of its "
            "tokens with --eos-token."
        ) from error


def _subword(model: str, path: Path, eos_token: str | None) -> SubwordTokenizer:
    content = json.loads(model)
    special = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    names = (eos_token,) if eos_token is not None else (_declared_eos(path.parent), *_EOS_NAMES)
    eos_id = next((special[name] for name in names if name in special), None)
    if eos_id is None:
        listed = ", ".join(repr(name) for name in list(special)[:8]) or "none"
        raise DataError(
            f"Tokenizer {path} has no {'end-of-text token' if eos_token is None else f'token {eos_token!r}'}; "
            f"name one of its added tokens with --eos-token ({listed})."
        )
    try:
        return SubwordTokenizer(model, eos_id)
    except ValueError as error:
        raise DataError(
            f"Tokenizer {path} cannot be read ({error}); give a tokenizer.json of the tokenizers package."
        ) from error


def _declared_eos(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    content = _read_json(path) if path.is_file() else {}
    token = content.get("eos_token") if isinstance(content, dict) else None
    return token.get("content") if isinstance(token, dict) else token


def _byte_level_bpe(vocabulary_path: Path, merges_path: Path) -> str:
    """GPT-2's two files as one ``tokenizer.json``."""
    vocabulary = _read_json(vocabulary_path)
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
        merges = [
            (left, right)
            for left, right in (line.split(" ") for line in lines if line and not line.startswith("#version"))
        ]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # ValueError and OSError of ours, bare Exception of the package
        raise DataError(
            f"Tokenizer {merges_path} does not fit {vocabulary_path.name} ({error}); fetch both again."
        ) from error
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in _EOS_NAMES if name in vocabulary])
    return str(tokenizer.to_str())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Tokenizer file {path} cannot be read ({error}); fetch it again.") from error


def _as_bytes(text: str | bytes) -> bytes:
    try:
        return text if isinstance(text, bytes) else text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"Text has no UTF-8 form (lone surrogate at character {error.start}); remove it.") from error


def _as_str(text: str | bytes) -> str:
    try:
        return text if isinstance(text, str) else text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"Text is not UTF-8 (byte {error.start}); a subword tokenizer needs UTF-8.") from error
