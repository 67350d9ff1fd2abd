"""From text files to prepared data: read, drop duplicates, split, encode, shuffle, pack, write.

The result depends on the set of documents and the settings, not on names or order: a document's split and its place in the
shuffle follow from the hash of its content. A document in the validation split is nowhere in the training split.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ssm_jax.data.packing import frame_document, pack
from ssm_jax.data.shards import MANIFEST_FILE, Manifest, Split, write_manifest, write_split
from ssm_jax.data.sources import Document, Dropped, TextFile, cut_at_character, limit_bytes, read_documents
from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import DataError

_ENCODE_BYTES = 4_000_000  # text that is encoded at once: enough to keep all cores busy, little enough to hold


@dataclass(frozen=True)
class _Encoded:
    """Where a document's framed tokens lie in the spool file."""

    digest: bytes
    start: int
    length: int
    text_bytes: int
    split: str | None


def prepare(
    files: Sequence[TextFile],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    seq_len: int = 512,
    validation_percent: float = 5.0,
    validation_files: Sequence[TextFile] = (),
    seed: int = 0,
    text_field: str = "text",
    max_bytes: int | None = None,
    rows_per_shard: int = 65536,
    overwrite: bool = False,
    sources: Sequence[str] = (),
) -> tuple[Manifest, Dropped]:
    """Writes the folder ``out``: shards, tokenizer, manifest. It appears complete or not at all.

    Args:
        validation_percent: share of documents for validation, chosen by content hash, at least one. A corpus that is a single
            document is cut instead: its end becomes the validation document.
        validation_files: the validation documents; then every document of ``files`` that is not among them is for training.
        seed: of the order of documents.
        max_bytes: use only the first so many bytes of ``files``.
        sources: names of the inputs, for the manifest.

    Raises:
        DataError: unusable text or settings, less text than one row, an output that exists (unless ``overwrite``).
    """
    _check_settings(seq_len, validation_percent, max_bytes, rows_per_shard)
    out = Path(out).resolve()
    dropped = Dropped()
    dtype = _token_dtype(tokenizer.vocab_size)
    with _replacing(out, overwrite) as folder, _progress() as progress:
        validation = _read(validation_files, "validation", "reading validation", dropped, text_field, progress)
        train = _read(files, "train" if validation_files else None, "reading", dropped, text_field, progress)
        documents = _without_duplicates(chain(validation, limit_bytes(train, max_bytes)), dropped)
        if not validation_files and validation_percent > 0:
            documents = _cut_single_document(documents, validation_percent)
        spool = folder / "spool"
        encoded = _spool(documents, tokenizer, spool, dtype)
        splits = _assign_splits(encoded, 0.0 if validation_files else validation_percent)
        _check_enough(splits, seq_len, sources)
        tokens = np.memmap(spool, np.dtype(dtype), "r")
        written = {
            name: _write(folder, name, members, tokens, seq_len, seed, dtype, rows_per_shard, progress)
            for name, members in splits.items()
            if members
        }
        del tokens
        spool.unlink()
        tokenizer.save(folder)
        manifest = Manifest(
            seq_len=seq_len,
            vocab_size=tokenizer.vocab_size,
            token_dtype=dtype,
            tokenizer={name: getattr(tokenizer, name) for name in ("kind", "eos_id", "fingerprint")},
            splits=written,
            dropped={"empty": dropped.empty, "bad": dropped.bad, "duplicates": dropped.duplicates},
            settings={
                "seed": seed,
                "validation": "files" if validation_files else f"{validation_percent:g} %",
                "max_bytes": max_bytes,
                "rows_per_shard": rows_per_shard,
                "text_field": text_field,
            },
            sources=tuple(sources),
        )
        write_manifest(folder, manifest)
    return manifest, dropped


def _read(
    files: Sequence[TextFile], split: str | None, title: str, dropped: Dropped, text_field: str, progress: Progress
) -> Iterator[Document]:
    if not files:
        return
    task = progress.add_task(title, total=len(files))
    count = 0
    for file in files:
        for document in read_documents(file, dropped, text_field):
            yield replace(document, split=split)
            count += 1
            if count % 256 == 0:
                progress.update(task, description=f"{title}: {count:,} documents")
        progress.advance(task)


def _without_duplicates(documents: Iterable[Document], dropped: Dropped) -> Iterator[Document]:
    seen = set()
    for document in documents:
        digest = hashlib.sha256(document.text).digest()
        if digest in seen:
            dropped.duplicates += 1
        else:
            seen.add(digest)
            yield document


def _cut_single_document(documents: Iterator[Document], validation_percent: float) -> Iterator[Document]:
    """``documents``, unless there is only one: that is cut, preferably after a line, into train and validation."""
    first, second = next(documents, None), next(documents, None)
    if first is None:
        return
    if second is not None:
        yield from chain((first, second), documents)
        return
    head = cut_at_character(first.text, round(len(first.text) * (1 - validation_percent / 100)))
    line_end = head.rfind(b"\n") + 1
    if line_end > 0.9 * len(head):
        head = head[:line_end]
    tail = first.text[len(head) :]
    yield Document(first.name, head, "train")
    if tail:
        yield Document(first.name, tail, "validation")


def _spool(documents: Iterable[Document], tokenizer: Tokenizer, path: Path, dtype: str) -> list[_Encoded]:
    """Encodes ``documents`` one after the other into the file ``path``, so that memory does not grow with the corpus."""
    encoded = []
    start = 0
    with path.open("wb") as stream:
        for group in _groups(documents):
            for document, ids in zip(group, tokenizer.encode_batch([document.text for document in group]), strict=True):
                framed = frame_document(ids, tokenizer.eos_id)
                stream.write(framed.astype(dtype).tobytes())
                digest = hashlib.sha256(document.text).digest()
                encoded.append(_Encoded(digest, start, len(framed), len(document.text), document.split))
                start += len(framed)
    return encoded


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= _ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _assign_splits(encoded: Sequence[_Encoded], validation_percent: float) -> dict[str, list[_Encoded]]:
    """Documents whose hash lies in the lowest ``validation_percent`` are for validation; at least one, and never all."""
    undecided = sorted(
        (document for document in encoded if document.split is None), key=lambda document: document.digest
    )
    limit = round(validation_percent / 100 * 2**64)
    count = sum(int.from_bytes(document.digest[:8], "big") < limit for document in undecided)
    if validation_percent > 0 and undecided:
        count = min(max(count, 1), max(len(undecided) - 1, 1))
    splits = {"train": undecided[count:], "validation": undecided[:count]}
    for document in encoded:
        if document.split is not None:
            splits[document.split].append(document)
    return splits


def _write(
    folder: Path,
    name: str,
    members: Sequence[_Encoded],
    tokens: np.ndarray,
    seq_len: int,
    seed: int,
    dtype: str,
    rows_per_shard: int,
    progress: Progress,
) -> Split:
    key = str(seed).encode()
    ordered = sorted(members, key=lambda document: hashlib.sha256(key + document.digest).digest())
    total = sum(document.length for document in members)
    counts = {
        "documents": len(members),
        "tokens": total,
        "rows": -(-total // seq_len),
        "text_bytes": sum(document.text_bytes for document in members),
    }
    arrays = (tokens[document.start : document.start + document.length] for document in ordered)
    rows = progress.track(pack(arrays, seq_len), total=counts["rows"], description=f"writing {name}")
    return write_split(folder, name, iter(rows), counts, dtype, rows_per_shard)


def _check_settings(seq_len: int, validation_percent: float, max_bytes: int | None, rows_per_shard: int) -> None:
    for name, value in (("seq-len", seq_len), ("max-bytes", max_bytes), ("rows-per-shard", rows_per_shard)):
        if value is not None and value < 1:
            raise DataError(f"Option --{name} is {value}; it must be at least 1.")
    if not 0 <= validation_percent < 100:
        raise DataError(f"Option --validation-percent is {validation_percent:g}; it must be at least 0 and below 100.")


def _check_enough(splits: dict[str, list[_Encoded]], seq_len: int, sources: Sequence[str]) -> None:
    named = f" ({', '.join(sources)})" if sources else ""
    if not any(splits.values()):
        raise DataError(f"The corpus{named} holds no text; give files that are not empty.")
    targets = sum(document.length - 1 for document in splits["train"])
    if targets < seq_len:
        raise DataError(
            f"The corpus{named} gives {targets} training targets in {len(splits['train'])} documents, fewer than one row of "
            f"{seq_len}; add text or choose a --seq-len of at most {max(targets, 1)}."
        )


def _token_dtype(vocab_size: int) -> str:
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size <= np.iinfo(name).max + 1)


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place if the block succeeds, and vanishes if it does not."""
    exists = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if exists and not overwrite:
        raise DataError(f"Output {out} exists already; choose another --out, or pass --overwrite to replace it.")
    if exists and not (out / MANIFEST_FILE).is_file():
        raise DataError(f"Output {out} exists and is not prepared data, so it is not replaced; choose another --out.")
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    retired = out.with_name(f".{out.name}.old-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if exists:
            out.rename(retired)
        folder.rename(out)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        raise DataError(f"Output {out} cannot be written ({error.strerror or error}); choose another --out.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if retired.exists() and not out.exists():
            retired.rename(out)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
