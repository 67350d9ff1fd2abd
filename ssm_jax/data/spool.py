"""Reading and encoding of a corpus, in parallel and in parts that outlive an interruption.

A task is a chain of sources: one large source, several small files, or all that share a byte limit. Each writes its documents'
framed tokens to ``NNNNN-PPPPP.tokens``, with lengths and content hashes in ``.index.npz``, written last: a part is whole or it is
not there. A task that is started again reads its sources again, but encodes only what no complete part holds.
"""

import concurrent.futures
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ssm_jax import files
from ssm_jax.data.documents import Document, Dropped, limit_bytes, read_documents
from ssm_jax.data.packing import frame_document
from ssm_jax.data.sources import Source, TextFile
from ssm_jax.data.tokenizers import Tokenizer, load_tokenizer

ENCODE_BYTES = 4_000_000
"""Text that is encoded at once: enough to keep all cores busy, little enough to hold."""
_AT_WORK = "at_work"
PART_BYTES = 64_000_000
"""Text in a part: what an interruption costs at most, per worker."""


@dataclass(frozen=True)
class Task:
    """Sources that are read one after the other, up to ``max_bytes`` of text. ``number`` names the task's files."""

    number: int
    sources: tuple[Source, ...]
    split: str | None
    max_bytes: int | None
    text_field: str
    token_dtype: str

    def documents(self, dropped: Dropped) -> Iterator[Document]:
        """The task's text, in order."""
        texts = (document for source in self.sources for document in read_documents(source, dropped, self.text_field))
        return limit_bytes(texts, self.max_bytes)

    def identity(self, tokenizer: Tokenizer) -> str:
        """Changes with whatever changes the task's tokens: settings, tokenizer, and each file's size and time."""
        content: list[Any] = [self.split, self.max_bytes, self.text_field, self.token_dtype, tokenizer.fingerprint]
        for source in self.sources:
            state = source.path.stat() if isinstance(source, TextFile) else None
            content.append([repr(source), state and [state.st_size, state.st_mtime_ns]])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """Where a document's framed tokens lie."""

    digest: bytes
    part: Path
    start: int
    length: int
    text_bytes: int
    split: str | None


def spool(
    tasks: Sequence[Task], folder: Path, tokenizer: Tokenizer, workers: int, advance: Callable[[int], None]
) -> Dropped:
    """Works through the tasks, in this process or in up to ``workers`` others; ``advance`` hears of the text read, in bytes.

    The folder holds the tokenizer too. Workers end when this process does, and none of an earlier run is at work when it begins.

    Raises:
        DataError: the first source that cannot be used.
    """
    with (folder / _AT_WORK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
    if workers <= 1 or len(tasks) <= 1:
        return _total(_run(task, folder, tokenizer, advance) for task in tasks)
    context = multiprocessing.get_context("spawn")
    leave = context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), context, initializer=_begin_work, initargs=(folder, os.getpid(), leave)
    ) as pool:
        try:
            futures = [pool.submit(_run_in_worker, task) for task in tasks]
            done = []
            for future in concurrent.futures.as_completed(futures):
                dropped, text_bytes = future.result()
                done.append(dropped)
                advance(text_bytes)
            return _total(done)
        except BaseException:
            leave.set()
            pool.shutdown(cancel_futures=True)
            raise


def entries(tasks: Sequence[Task], folder: Path) -> Iterator[Entry]:
    """Every spooled document, in the order of the tasks and of the texts in them."""
    for task in tasks:
        for part in _parts(task, folder):
            index, start = _read_index(part), 0
            for digest, length, text_bytes in zip(
                index["digests"], index["lengths"].tolist(), index["text_bytes"].tolist(), strict=True
            ):
                yield Entry(digest.tobytes(), part, start, length, text_bytes, task.split)
                start += length


def spooled_bytes(folder: Path) -> int:
    """Size of the complete parts in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.tokens"))


def _run(task: Task, folder: Path, tokenizer: Tokenizer, advance: Callable[[int], None]) -> Dropped:
    identity, done = task.identity(tokenizer), folder / f"{task.number:05d}.done"
    mark = folder / f"{task.number:05d}.identity"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != identity:
        for stale in folder.glob(f"{task.number:05d}*"):
            stale.unlink()
        files.write_text(mark, identity)
    if done.is_file():
        advance(sum(int(_read_index(part)["text_bytes"].sum()) for part in _parts(task, folder)))
        return Dropped(**json.loads(done.read_text(encoding="utf-8")))
    parts, dropped = _parts(task, folder), Dropped()
    known = sum(len(_read_index(part)["lengths"]) for part in parts)
    documents = task.documents(dropped)
    for document in islice(documents, known):
        advance(len(document.text))
    for number, group in enumerate(_groups(documents, PART_BYTES), start=len(parts)):
        write_documents(folder / f"{task.number:05d}-{number:05d}.tokens", group, tokenizer, task.token_dtype, advance)
    files.write_text(done, json.dumps(asdict(dropped)))
    return dropped


def write_documents(
    part: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    dtype: str,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Entry]:
    """Writes one part and says what lies in it."""
    written: list[Entry] = []
    start = 0
    temporary = part.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        for group in _groups(iter(documents), ENCODE_BYTES):
            texts = [document.text for document in group]
            for document, ids in zip(group, tokenizer.encode_batch(texts), strict=True):
                framed = frame_document(ids, tokenizer.eos_id)
                stream.write(framed.astype(dtype).tobytes())
                digest = hashlib.sha256(document.text).digest()
                written.append(Entry(digest, part, start, len(framed), len(document.text), document.split))
                start += len(framed)
            advance(sum(map(len, texts)))
    temporary.rename(part)
    index = part.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(
        index,
        digests=np.stack([np.frombuffer(entry.digest, np.uint8) for entry in written]),
        lengths=np.array([entry.length for entry in written], np.int64),
        text_bytes=np.array([entry.text_bytes for entry in written], np.int64),
    )
    index.rename(_index_of(part))
    return written


def _parts(task: Task, folder: Path) -> list[Path]:
    """The complete parts of a task, which have an index."""
    parts = sorted(folder.glob(f"{task.number:05d}-*.tokens"))
    return [part for part in parts if _index_of(part).is_file()]


def _index_of(part: Path) -> Path:
    return part.with_suffix(".index.npz")


def _read_index(part: Path) -> dict[str, np.ndarray]:
    with np.load(_index_of(part)) as content:
        return dict(content)


def _groups(documents: Iterator[Document], limit: int) -> Iterator[list[Document]]:
    """Consecutive documents of together at least ``limit`` bytes."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def _total(parts: Iterable[Dropped]) -> Dropped:
    total = Dropped()
    for part in parts:
        total.empty += part.empty
        total.bad += part.bad
        total.first_bad = total.first_bad or part.first_bad
    return total


class _Worker:
    """What a worker process keeps between tasks."""

    folder: Path
    tokenizer: Tokenizer
    lock: Any


def _begin_work(folder: Path, parent: int, leave: Any) -> None:
    """Workers share the cores among themselves, leave Ctrl-C to the parent, and end with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.folder, _Worker.tokenizer, _Worker.lock = folder, load_tokenizer(folder), (folder / _AT_WORK).open("w")
    fcntl.flock(_Worker.lock, fcntl.LOCK_SH)

    def watch() -> None:
        while os.getppid() == parent and not leave.wait(0.2):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_in_worker(task: Task) -> tuple[Dropped, int]:
    read = [0]

    def count(size: int) -> None:
        read[0] += size

    return _run(task, _Worker.folder, _Worker.tokenizer, count), read[0]
