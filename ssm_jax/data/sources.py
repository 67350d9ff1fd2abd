"""Where text comes from: files, folders, and data sets of the Hugging Face hub. What is in them, documents.py reads.

Order is that of the inputs, folders depth-first with sorted names.
"""

import fnmatch
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ssm_jax.errors import DataError

TEXT_SUFFIXES = (
    *("txt", "md", "rst", "tex", "html", "jsonl", "parquet", "yaml", "toml"),
    *("py", "c", "h", "cc", "cpp", "hpp", "rs", "go", "java", "js", "ts", "rb", "sh", "sql"),
)
DEFAULT_INCLUDE = tuple(f"*.{suffix}{packed}" for suffix in TEXT_SUFFIXES for packed in ("", ".gz", ".zst"))
HUB_PREFIX = "hf:"
HUB_NAMES = {
    "c4": "allenai/c4/en",
    "pile": "monology/pile-uncopyrighted",
    "wikitext-103": "Salesforce/wikitext/wikitext-103-raw-v1",
}
"""Short names of data sets that papers use."""
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
class HubDataset:
    """One split of a data set on the hub, or of one that the ``datasets`` package finds in a folder; streamed."""

    path: str
    config: str | None
    split: str
    name: str
    skip_bad: bool = False


Source: TypeAlias = TextFile | HubDataset


def find_sources(inputs: Sequence[str | Path], include: Sequence[str] = (), *, skip_bad: bool = False) -> list[Source]:
    """What ``inputs`` name: files themselves, in folders those whose name matches an ``include`` pattern, and ``hf:`` data sets.

    Hidden files and folders and ``__pycache__`` are passed over, links to folders are not followed. An input that is a file
    is read whatever its name.

    Raises:
        DataError: an input that does not exist, or a folder without a matching file.
    """
    patterns = tuple(include) or DEFAULT_INCLUDE
    files: list[Source] = []
    for given in inputs:
        path = Path(given)
        if str(given).startswith(HUB_PREFIX):
            files.append(parse_hub(str(given), skip_bad))
            continue
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
            raise DataError(
                f"Input {given} does not exist; give text, .jsonl or .parquet files, folders of them, or hf:NAME."
            )
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


def parse_hub(given: str, skip_bad: bool = False) -> HubDataset:
    """``hf:owner/name[/config][@split]``, ``hf:FOLDER[@split]``, or a short name of ``HUB_NAMES``; the default split is train.

    Raises:
        DataError: another form.
    """
    name, _, split = given.removeprefix(HUB_PREFIX).partition("@")
    path = HUB_NAMES.get(name, name)
    config = None
    if not Path(path).is_dir() and path.count("/") == 2:
        path, config = path.rsplit("/", 1)
    if not Path(path).is_dir() and path.count("/") != 1:
        short = ", ".join(HUB_PREFIX + known for known in HUB_NAMES)
        raise DataError(f"Input {given} names no data set; write hf:OWNER/NAME[/CONFIG][@SPLIT], or one of {short}.")
    return HubDataset(path, config, split or "train", given, skip_bad)


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
