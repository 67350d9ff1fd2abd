"""What is in a source: documents, or one clear refusal.

A text file is one document; so is each line of a ``.jsonl`` file, each row of a ``.parquet`` file and each record of a data set.
``.gz`` and ``.zst`` are read through. Text must be UTF-8 without NUL bytes and is otherwise taken as it is: no newline or Unicode
normalisation.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from ssm_jax.data.extras import import_extra
from ssm_jax.data.sources import HubDataset, Source, TextFile
from ssm_jax.data.zstd import open_zstd
from ssm_jax.errors import DataError

_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """A text with the name of its origin; ``split`` is set where the split is not left to the content hash."""

    name: str
    text: bytes
    split: str | None = None


@dataclass
class Dropped:
    """What was read and not used."""

    empty: int = 0
    bad: int = 0
    duplicates: int = 0
    first_bad: str = ""


def read_documents(source: Source, dropped: Dropped, text_field: str = "text") -> Iterator[Document]:
    """The documents of one source, empty ones left out and counted.

    Raises:
        DataError: unreadable, truncated, binary, or not UTF-8; a record without the text field; a package or a network that is
            needed and not there. What is wrong with a single file or record is counted instead where ``skip_bad`` is set.
    """
    if isinstance(source, HubDataset):
        yield from _kept(read_hub(source, text_field), source, dropped)
        return
    count = 0
    try:
        for document in _kept(_reader(source)(source, text_field), source, dropped):
            count += 1
            yield document
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = f" after {count} documents" if count else ""
        _refuse(
            DataError(f"File {source.path} cannot be read{where} ({reason}); replace or remove it."), source, dropped
        )


def _kept(items: Iterable[Document | DataError], source: Source, dropped: Dropped) -> Iterator[Document]:
    for item in items:
        if isinstance(item, DataError):
            _refuse(item, source, dropped)
        elif item.text:
            yield item
        else:
            dropped.empty += 1


def _reader(file: TextFile) -> Callable[[TextFile, str], Iterator[Document | DataError]]:
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    if suffixes[-1:] and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return {".jsonl": _read_lines, ".parquet": _read_parquet}.get(suffixes[-1] if suffixes else "", _read_whole)


def _read_whole(file: TextFile, text_field: str) -> Iterator[Document | DataError]:
    del text_field
    with _open(file.path) as stream:
        text = stream.read()
    if not text and not file.may_be_empty:
        yield DataError(f"File {file.path} is empty; give a file that holds text.")
        return
    yield _checked(Document(file.name, text), str(file.path))


def _read_lines(file: TextFile, text_field: str) -> Iterator[Document | DataError]:
    is_empty = True
    with _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                is_empty = False
                yield _parse_line(line, number, file, text_field)
    if is_empty and not file.may_be_empty:
        yield DataError(f"File {file.path} is empty; give a file that holds text.")


def _parse_line(line: bytes, number: int, file: TextFile, text_field: str) -> Document | DataError:
    where = f"{file.path}, line {number}"
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return DataError(f"File {where}, is not UTF-8; convert the file to UTF-8.")
    except (ValueError, RecursionError) as error:
        return DataError(f"File {where}, is not JSON ({error}); every line must be one JSON object.")
    return _from_record(record, text_field, f"{file.name}:{number}", where)


def _read_parquet(file: TextFile, text_field: str) -> Iterator[Document | DataError]:
    parquet = import_extra("pyarrow.parquet", f"File {file.path}")
    with _open(file.path) as stream, parquet.ParquetFile(stream) as table:
        if text_field not in table.schema_arrow.names:
            yield _no_text(str(file.path), text_field, table.schema_arrow.names)
            return
        number = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[text_field]):
            column = batch.column(0)
            if str(column.type) in ("string", "large_string"):
                column = column.cast(str(column.type).replace("string", "binary"))  # not yet known to be UTF-8
            for text in column.to_pylist():
                number += 1
                name, where = f"{file.name}:{number}", f"{file.path}, row {number}"
                is_text = isinstance(text, bytes)
                yield _checked(Document(name, text), where) if is_text else _no_text(where, text_field, [text_field])


def read_hub(source: HubDataset, text_field: str) -> Iterator[Document | DataError]:
    """The records of a data set as the ``datasets`` package streams them; nothing is downloaded whole."""
    datasets = import_extra("datasets", f"Data set {source.name}")
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(source.path, source.config, split=source.split, streaming=True)
        for number, record in enumerate(stream, start=1):
            yield _from_record(record, text_field, f"{source.name}:{number}", f"{source.name}, record {number}")
    except DataError:
        raise
    except Exception as error:  # the package, its readers and the network raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"Data set {source.name} cannot be read ({reason}); check its name, configuration and split, and the network, or "
            "give files instead."
        ) from error


def _from_record(record: Any, text_field: str, name: str, where: str) -> Document | DataError:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return _no_text(where, text_field, list(record) if isinstance(record, dict) else None)
    try:
        return _checked(Document(name, text.encode("utf-8")), where)
    except UnicodeEncodeError:
        return DataError(f"File {where}, holds a lone surrogate, which has no UTF-8 form; repair the line.")


def _no_text(where: str, text_field: str, fields: Sequence[Any] | None) -> DataError:
    there = "it is no object" if fields is None else f"its keys: {', '.join(map(str, fields)) or 'none'}"
    return DataError(f"File {where}, has no text in field {text_field!r} ({there}); name the field with --text-field.")


def _checked(document: Document, where: str) -> Document | DataError:
    nul = document.text.find(b"\0")
    if nul >= 0:
        return DataError(
            f"File {where}, looks binary (NUL at byte {nul}); give text, or pass --skip-bad to leave it out."
        )
    try:
        document.text.decode("utf-8")
    except UnicodeDecodeError as error:
        return DataError(
            f"File {where}, is not UTF-8 (byte {error.start}); convert it to UTF-8, or pass --skip-bad to leave it out."
        )
    return document


def _refuse(error: DataError, source: Source, dropped: Dropped) -> None:
    if not source.skip_bad:
        raise error
    dropped.bad += 1
    dropped.first_bad = dropped.first_bad or str(error)


def _open(path: Path) -> BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        return open_zstd(import_extra("zstandard", f"File {path}"), path)
    return path.open("rb")


def cut_at_character(text: bytes, size: int) -> bytes:
    """At most the first ``size`` bytes of UTF-8 ``text``, ending at a whole character."""
    while 0 < size < len(text) and text[size] & 0xC0 == 0x80:
        size -= 1
    return text[:size]


def limit_bytes(documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """``documents`` until ``max_bytes`` of text are reached; the last one is cut there."""
    left = max_bytes
    for document in documents:
        if left is not None and len(document.text) >= left:
            text = cut_at_character(document.text, left)
            if text:
                yield replace(document, text=text)
            return
        yield document
        left = None if left is None else left - len(document.text)
