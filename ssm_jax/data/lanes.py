"""Reading whole articles in lanes: every lane reads one article after another in windows, as a ``Schedule`` says.

A batch is ``{tokens, targets, positions, weights}``, [lanes, window]. Positions go on within an article from window to window, so
position 0 in column 0 says that the lane starts afresh. Absent tokens (after an article's end; a whole lane where no article is
left) have position -1 and weight 0. The target of a window's last token is the next window's first one: every token of an article
but its first is a target exactly once.
"""

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Integer

from ssm_jax.data.packing import Row, absent_row
from ssm_jax.data.pipeline import READ, PackedRows
from ssm_jax.data.schedule import Schedule
from ssm_jax.data.shards import PackedDataset
from ssm_jax.errors import DataError


class Documents:
    """Random access to the documents of a split, marks included; their ``lengths`` are read at once.

    Raises:
        DataError: the data was not prepared as documents; a damaged record.
    """

    def __init__(self, dataset: PackedDataset):
        if dataset.manifest.form != "documents":
            raise DataError(
                f"Data {dataset.path} was prepared as {dataset.manifest.form}; lanes read whole articles: prepare it with --form "
                "documents."
            )
        self._records = PackedRows(dataset)
        self.lengths = np.array([len(self[index]) for index in range(len(self._records))], np.int64)

    def __getitem__(self, index: int) -> Integer[np.ndarray, "n"]:
        return self._records.packed(index).tokens


def lane_batches(
    documents: Documents,
    schedule: Schedule,
    *,
    start_step: int = 0,
    within_windows: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Row]:
    """The schedule's batches from ``start_step`` on, the part of this process: contiguous lanes. Read ahead by threads.

    Args:
        within_windows: a target stands in its token's window, as in BakaLLM: then no window's first token is one.

    Raises:
        DataError: lanes that do not divide over the processes; while iterating, a damaged record.
    """
    if schedule.lanes % process_count:
        raise DataError(
            f"{schedule.lanes} lanes do not divide over {process_count} processes; choose a multiple of it."
        )
    count = schedule.lanes // process_count
    own = slice(process_index * count, (process_index + 1) * count)
    recent = _Recent(documents, 2 * count + 2)

    def read(index: int) -> Row:
        articles, offsets = (part[own] for part in schedule.at(start_step + index))
        absent = absent_row(schedule.window)
        rows = [
            cut(recent[int(article)], int(offset), schedule.window, within_windows) if article >= 0 else absent
            for article, offset in zip(articles, offsets, strict=True)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in absent}

    steps = schedule.steps
    left = sys.maxsize if steps is None else max(0, steps - start_step)
    return iter(grain.MapDataset.range(left).map(read).to_iter_dataset(READ))


def cut(tokens: Integer[np.ndarray, "n"], offset: int, window: int, within_windows: bool = False) -> Row:
    """The window of a document that begins at ``offset``, as the arrays of a lane."""
    row = absent_row(window)
    here = tokens[offset : offset + window]
    following = tokens[offset + 1 : offset + window + (0 if within_windows else 1)]
    row["tokens"][: len(here)] = here
    row["targets"][: len(following)] = following
    row["positions"][: len(here)] = np.arange(offset, offset + len(here))
    row["weights"][: len(following)] = 1
    return row


def counted_afresh(row: Row) -> Row:
    """A batch with positions counted from the start of each window: for a model that carries no state into it."""
    positions = row["positions"]
    return {**row, "positions": np.where(positions < 0, positions, positions - positions[:, :1])}


class _Recent:
    """Documents, the last few used kept: what the lanes read now, and what they read before, for a thread that lags behind."""

    def __init__(self, documents: Documents, size: int):
        self._documents, self._size = documents, size
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> np.ndarray:
        with self._lock:
            if index not in self._kept:
                self._kept[index] = self._documents[index]
            self._kept.move_to_end(index)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
            return self._kept[index]
