"""Reading text: files, folders and JSON lines become documents, or one clear refusal.

One text file is one document; so is each line of a ``.jsonl`` file. ``.gz`` is read through. Order is that of the inputs,
folders depth-first with sorted names. Text must be UTF-8 without NUL bytes and is otherwise taken as it is: no newline or
Unicode normalisation.
"""

import fnmatch
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path

from ssm_jax.errors import DataError

TEXT_SUFFIXES = (
    *("txt", "md", "rst", "tex", "html", "jsonl", "yaml", "toml"),
    *("py", "c", "h", "cc", "cpp", "hpp", "rs", "go", "java", "js", "ts", "rb", "sh", "sql"),
)
DEFAULT_INCLUDE = tuple(f"*.{suffix}{gz}" for suffix in TEXT_SUFFIXES for gz in ("", ".gz"))
# Left out of the standard library: tests, two applications, generated tables, and the test data of a retired converter.
_STDLIB_EXCLUDE = {"test", "tests", "idle_test", "idlelib", "turtledemo", "encodings", "pydoc_data", "lib2to3"}
_PACKAGE_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextFile:
    """A file to read. ``name`` is what messages call its documents; bad content is skipped or raised."""

    path: Path
    name: str
    skip_bad: bool = False
    may_be_empty: bool = True


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


def find_files(inputs: Sequence[str | Path], include: Sequence[str] = (), *, skip_bad: bool = False) -> list[TextFile]:
    """The files that ``inputs`` name: files themselves, and in folders those whose name matches an ``include`` pattern.

    Hidden files and folders and ``__pycache__`` are passed over, links to folders are not followed. An input that is a file
    is read whatever its name.

    Raises:
        DataError: an input that does not exist, or a folder without a matching file.
    """
    patterns = tuple(include) or DEFAULT_INCLUDE
    files = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = [
                TextFile(file, f"{path.name}/{file.relative_to(path).as_posix()}", skip_bad)
                for file in _walk(path, {"__pycache__"})
                if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)
            ]
            if not found:
                shown = " ".join(include) if include else "a text suffix (.txt .md .py .jsonl ...)"
                raise DataError(
                    f"Folder {given} holds no file that matches {shown}; name one with --include '*.SUFFIX'."
                )
            files += found
        elif path.exists():
            files.append(TextFile(path, path.name, skip_bad, may_be_empty=False))
        else:
            raise DataError(f"Input {given} does not exist; give text files, .jsonl files or folders of them.")
    return files


def python_stdlib_files() -> list[TextFile]:
    """The sources of the running Python's standard library, about 9 MB of real text that every machine has.

    Without tests, IDLE, generated tables and installed packages; the few files that are not UTF-8 are skipped.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        TextFile(file, file.relative_to(root).as_posix(), skip_bad=True)
        for file in _walk(root, _STDLIB_EXCLUDE | _PACKAGE_FOLDERS)
        if file.suffix == ".py"
    ]
    if not files:
        raise DataError(
            f"Folder {root} holds no .py files (Python without its library's sources); give text files instead."
        )
    return files


def read_documents(file: TextFile, dropped: Dropped, text_field: str = "text") -> Iterator[Document]:
    """The documents of one file, empty ones left out and counted.

    Raises:
        DataError: unreadable, truncated, binary, or not UTF-8; a JSON line that is no object with the text field. Where
            ``file.skip_bad`` is set, these are counted instead.
    """
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    is_lines = (suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]) == [".jsonl"]
    count = 0
    try:
        for item in _read_lines(file, text_field) if is_lines else _read_whole(file):
            count += 1
            if isinstance(item, DataError):
                _refuse(item, file, dropped)
            elif item.text:
                yield item
            else:
                dropped.empty += 1
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = f" after {count} documents" if count else ""
        _refuse(DataError(f"File {file.path} cannot be read{where} ({reason}); replace or remove it."), file, dropped)


def _read_whole(file: TextFile) -> Iterator[Document | DataError]:
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
    except ValueError as error:
        return DataError(f"File {where}, is not JSON ({error}); every line must be one JSON object.")
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = f"its keys: {', '.join(map(str, record)) or 'none'}" if isinstance(record, dict) else "it is no object"
        return DataError(
            f"File {where}, has no text in field {text_field!r} ({keys}); name the field with --text-field."
        )
    try:
        return _checked(Document(f"{file.name}:{number}", text.encode("utf-8")), where)
    except UnicodeEncodeError:
        return DataError(f"File {where}, holds a lone surrogate, which has no UTF-8 form; repair the line.")


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


def _refuse(error: DataError, file: TextFile, dropped: Dropped) -> None:
    if not file.skip_bad:
        raise error
    dropped.bad += 1
    dropped.first_bad = dropped.first_bad or str(error)


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _walk(root: Path, exclude: set[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable):
        subfolders[:] = sorted(name for name in subfolders if name not in exclude and not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(
        f"Folder {error.filename} cannot be read ({error.strerror}); change its permissions or leave it out."
    )


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
