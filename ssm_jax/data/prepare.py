"""From text to prepared data: read and encode (spool.py), drop duplicates, split, shuffle, pack, write.

The result depends on the set of documents and the settings, not on names, order or the number of workers: a document's split and
its place in the shuffle follow from the hash of its content. A document in the validation split is nowhere in the training split.

A preparation that was interrupted goes on where it stopped when it is started again.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from ssm_jax.data.documents import Document, Dropped, cut_at_character
from ssm_jax.data.packing import PackedRow, pack
from ssm_jax.data.shards import MANIFEST_FILE, Manifest, Split, write_manifest, write_split
from ssm_jax.data.sources import Source, TextFile
from ssm_jax.data.spool import Entry, Task, entries, spool, spooled_bytes, write_documents
from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import DataError

Form = Literal["rows", "documents"]
TASK_BYTES = 16_000_000
"""Files up to this size together are one piece of work."""
WORTH_KEEPING = 16_000_000
"""Bytes of encoded text from which on a preparation that failed leaves its work for the next attempt."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What prepared data depends on, besides the text and the tokenizer.

    form: "rows" of ``seq_len`` tokens, packed; or "documents", one record each, of any length. validation_percent: share of
    documents for validation, chosen by content hash, at least one; a corpus that is a single document is cut instead, its end
    becomes the validation document. seed: of the order of documents. max_bytes: use only the first so many bytes of text.
    """

    form: Form = "rows"
    seq_len: int = 512
    validation_percent: float = 5.0
    seed: int = 0
    text_field: str = "text"
    max_bytes: int | None = None
    rows_per_shard: int = 65536

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_bytes", "rows_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"Option --{name.replace('_', '-')} is {value}; it must be at least 1.")
        if not 0 <= self.validation_percent < 100:
            raise DataError(
                f"Option --validation-percent is {self.validation_percent:g}; it must be at least 0 and below 100."
            )


def prepare(
    files: Sequence[Source],
    out: str | Path,
    tokenizer: Tokenizer,
    settings: Settings = Settings(),
    *,
    validation_files: Sequence[Source] = (),
    workers: int = 1,
    overwrite: bool = False,
    sources: Sequence[str] = (),
) -> tuple[Manifest, Dropped]:
    """Writes the folder ``out``: shards, tokenizer, manifest. It appears complete or not at all.

    Args:
        validation_files: the validation documents; then every document of ``files`` that is not among them is for training.
        workers: processes that read and encode.
        sources: names of the inputs, for the manifest.

    Raises:
        DataError: unusable text or settings, less text than one row, an output that exists (unless ``overwrite``).
    """
    dtype = _token_dtype(tokenizer.vocab_size)
    percent = 0.0 if validation_files else settings.validation_percent
    with _replacing(Path(out).resolve(), overwrite) as folder, _progress(files, validation_files) as (progress, bar):
        work = folder / "spool"
        work.mkdir(exist_ok=True)
        tokenizer.save(work)
        tasks = _tasks(files, validation_files, settings, dtype)
        dropped = spool(tasks, work, tokenizer, workers, lambda size: progress.advance(bar, size))
        documents = list(_without_duplicates(entries(tasks, work), dropped))
        if len(documents) == 1 and documents[0].split is None and percent > 0:
            documents = list(_cut_in_two(tasks, work, tokenizer, percent, dtype))
        splits = _assign_splits(documents, percent)
        _check_enough(splits, settings, sources)
        written = {
            name: _write(folder, name, members, settings, dtype, progress)
            for name, members in splits.items()
            if members
        }
        shutil.rmtree(work)
        tokenizer.save(folder)
        manifest = Manifest(
            form=settings.form,
            seq_len=settings.seq_len if settings.form == "rows" else 0,
            vocab_size=tokenizer.vocab_size,
            token_dtype=dtype,
            tokenizer={name: getattr(tokenizer, name) for name in ("kind", "eos_id", "fingerprint")},
            splits=written,
            dropped={"empty": dropped.empty, "bad": dropped.bad, "duplicates": dropped.duplicates},
            settings={
                "seed": settings.seed,
                "validation": "files" if validation_files else f"{settings.validation_percent:g} %",
                "max_bytes": settings.max_bytes,
                "rows_per_shard": settings.rows_per_shard,
                "text_field": settings.text_field,
            },
            sources=tuple(sources),
        )
        write_manifest(folder, manifest)
    return manifest, dropped


def _tasks(files: Sequence[Source], validation_files: Sequence[Source], settings: Settings, dtype: str) -> list[Task]:
    """Validation first, so that a document in both is for validation. A byte limit spans all training sources; small files share a
    task."""
    train = "train" if validation_files else None
    chains: list[tuple[tuple[Source, ...], str | None, int | None]]
    chains = [(group, "validation", None) for group in _together(validation_files)]
    if settings.max_bytes is None:
        chains += [(group, train, None) for group in _together(files)]
    else:
        chains.append((tuple(files), train, settings.max_bytes))
    return [
        Task(number, sources, split, limit, settings.text_field, dtype)
        for number, (sources, split, limit) in enumerate(chains)
    ]


def _together(sources: Sequence[Source]) -> Iterator[tuple[Source, ...]]:
    """Consecutive small files in groups, everything else alone."""
    group: list[Source] = []
    size = 0
    for source in sources:
        own = source.path.stat().st_size if isinstance(source, TextFile) else TASK_BYTES
        if group and size + own > TASK_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(source)
        size += own
    if group:
        yield tuple(group)


def _without_duplicates(documents: Iterable[Entry], dropped: Dropped) -> Iterator[Entry]:
    seen = set()
    for document in documents:
        if document.digest in seen:
            dropped.duplicates += 1
        else:
            seen.add(document.digest)
            yield document


def _cut_in_two(
    tasks: Sequence[Task], work: Path, tokenizer: Tokenizer, validation_percent: float, dtype: str
) -> Iterator[Entry]:
    """The one document of a corpus cut into train and validation, preferably after a line."""
    text = next(document.text for task in tasks for document in task.documents(Dropped()))
    head = cut_at_character(text, round(len(text) * (1 - validation_percent / 100)))
    line_end = head.rfind(b"\n") + 1
    if line_end > 0.9 * len(head):
        head = head[:line_end]
    for split, part in (("train", head), ("validation", text[len(head) :])):
        if part:
            entry = write_documents(work / f"{split}.tokens", [Document(split, part)], tokenizer, dtype)[0]
            yield replace(entry, split=split)


def _assign_splits(encoded: Sequence[Entry], validation_percent: float) -> dict[str, list[Entry]]:
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
    folder: Path, name: str, members: Sequence[Entry], settings: Settings, dtype: str, progress: Progress
) -> Split:
    key = str(settings.seed).encode()
    ordered = sorted(members, key=lambda document: hashlib.sha256(key + document.digest).digest())

    @functools.lru_cache(maxsize=64)  # an open file each
    def tokens(part: Path) -> np.ndarray:
        return np.memmap(part, np.dtype(dtype), "r")

    arrays = (tokens(entry.part)[entry.start : entry.start + entry.length] for entry in ordered)
    total = sum(document.length for document in members)
    rows: Iterator[PackedRow]
    if settings.form == "rows":
        rows, count = pack(arrays, settings.seq_len), -(-total // settings.seq_len)
    else:
        rows, count = (PackedRow(array, np.array([len(array)], np.uint32), False) for array in arrays), len(members)
    counts = {
        "documents": len(members),
        "tokens": total,
        "rows": count,
        "text_bytes": sum(document.text_bytes for document in members),
    }
    shown = progress.track(rows, total=count, description=f"writing {name}")
    return write_split(folder, name, iter(shown), counts, dtype, settings.rows_per_shard)


def _check_enough(splits: dict[str, list[Entry]], settings: Settings, sources: Sequence[str]) -> None:
    named = f" ({', '.join(sources)})" if sources else ""
    if not any(splits.values()):
        raise DataError(f"The corpus{named} holds no text; give files that are not empty.")
    if settings.form == "documents":
        return
    targets = sum(document.length - 1 for document in splits["train"])
    if targets < settings.seq_len:
        raise DataError(
            f"The corpus{named} gives {targets} training targets in {len(splits['train'])} documents, fewer than one row of "
            f"{settings.seq_len}; add text or choose a --seq-len of at most {max(targets, 1)}."
        )


def _token_dtype(vocab_size: int) -> str:
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size <= np.iinfo(name).max + 1)


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if the block succeeds. If it does not, it stays only when it holds enough
    encoded text to be worth going on from; nobody else can work in it meanwhile."""
    exists = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if exists and not overwrite:
        raise DataError(f"Output {out} exists already; choose another --out, or pass --overwrite to replace it.")
    if exists and not (out / MANIFEST_FILE).is_file():
        raise DataError(f"Output {out} exists and is not prepared data, so it is not replaced; choose another --out.")
    folder, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    retired = out.with_name(f".{out.name}.old-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:
            _take(handle.fileno(), out)
            for stale in folder.glob("*"):
                if stale.name != "spool":
                    stale.unlink()
            try:
                yield folder
                if exists:
                    out.rename(retired)
                folder.rename(out)
                shutil.rmtree(retired, ignore_errors=True)
            finally:
                if folder.exists() and spooled_bytes(folder / "spool") < WORTH_KEEPING:
                    shutil.rmtree(folder, ignore_errors=True)
                if retired.exists() and not out.exists():
                    retired.rename(out)
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"Output {out} cannot be written ({error.strerror or error}); choose another --out.") from error


def _take(lock: int, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"Output {out} is being prepared by another process; wait for it or choose another --out."
        ) from error


@contextmanager
def _progress(*sources: Sequence[Source]) -> Iterator[tuple[Progress, TaskID]]:
    """A bar of the text read, in bytes. Its end is known where all sources are plain files."""
    files = [source for group in sources for source in group]
    plain = all(isinstance(file, TextFile) and file.path.suffix not in (".gz", ".zst", ".parquet") for file in files)
    total = sum(file.path.stat().st_size for file in files if isinstance(file, TextFile)) if plain else None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield progress, progress.add_task("reading", total=total)
