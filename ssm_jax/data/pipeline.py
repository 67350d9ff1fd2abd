"""Reading prepared rows in batches: a batch is a pure function of the seed and the global row index.

Row ``g`` of the endless stream is row ``shuffle(epoch, g mod rows)`` of the split, ``epoch = g // rows``; of several corpora, ``g``
also decides which one (``grain.MapDataset.mix``). Batch ``b`` holds the
rows ``start_row + b * batch_size + (0 ... batch_size - 1)``, and of P processes the p-th reads the p-th contiguous part of it. So
starting after the rows already used gives what running on would give, and any number of processes sees the same batches.
"""

import bisect
import itertools
import sys
from collections.abc import Iterator

import grain
import numpy as np

from ssm_jax.data.mixture import Mixture
from ssm_jax.data.packing import PackedRow, Row, absent_row, decode_record, expand
from ssm_jax.data.shards import PackedDataset
from ssm_jax.errors import DataError

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class PackedRows:
    """Random access to a split's rows as arrays; safe to use from several threads."""

    def __init__(self, dataset: PackedDataset):
        self._dataset = dataset
        self._shards = [(str(dataset.path / shard.file), shard.rows) for shard in dataset.split.shards]
        self._ends = list(itertools.accumulate(rows for _, rows in self._shards))
        # The range in brackets saves opening every shard up front.
        self._records = grain.sources.ArrayRecordDataSource([f"{file}[0:{rows}]" for file, rows in self._shards])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """The arrays of a batch row. Raises as ``packed``."""
        return expand(self.packed(index), self._dataset.seq_len)

    def packed(self, index: int) -> PackedRow:
        """A record as it is stored. Raises DataError naming the shard file and the record if it is damaged."""
        try:
            return decode_record(self._records[index], index, self._dataset.manifest.token_dtype)
        except (DataError, RuntimeError, ValueError, IndexError, OSError) as error:
            number = bisect.bisect_right(self._ends, index)
            file, rows = self._shards[number]
            record = index - (self._ends[number] - rows)
            reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
            raise DataError(
                f"Shard {file}, record {record}, is damaged ({reason}); restore it or prepare again."
            ) from error


def stored_documents(dataset: PackedDataset) -> Iterator[np.ndarray]:
    """The documents of a split in stored order, marks included, whether it holds rows or documents."""
    records = PackedRows(dataset)
    parts: list[np.ndarray] = []
    for index in range(len(records)):
        row = records.packed(index)
        ends = np.cumsum(row.lengths, dtype=np.int64)
        for number, piece in enumerate(np.split(row.tokens[: ends[-1]], ends[:-1])):
            parts.append(piece)
            if number < len(ends) - 1 or not row.continues:
                yield np.concatenate(parts)
                parts = []


def batches(
    data: PackedDataset | Mixture,
    *,
    batch_size: int,
    seed: int = 0,
    start_row: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Row]:
    """Batches ``{tokens, targets, positions int32, weights float32}``, each [batch_size / process_count, seq_len].

    Read ahead by threads, in fixed order.

    Args:
        batch_size: rows of the global batch, all processes together.
        seed: of the shuffle, which differs from epoch to epoch.
        start_row: the first global row: the number of rows already used, by whatever batch sizes.
        shuffle: or the stored order.
        repeat: without end (always so with several corpora); else one pass, the last batch filled up with absent rows (position -1,
            weight 0).
        process_index, process_count: which contiguous part of each global batch to read.

    Raises:
        DataError: data prepared as documents, a batch size that does not divide over the processes, a seed that has more than 32
            bits; while iterating, a damaged record.
    """
    mixture = Mixture((data,), (1.0,)) if isinstance(data, PackedDataset) else data
    for dataset in mixture.datasets:
        if dataset.manifest.form != "rows":
            raise DataError(
                f"Data {dataset.path} was prepared as {dataset.manifest.form}; prepare rows with --form rows."
            )
    if batch_size < 1 or batch_size % process_count:
        raise DataError(
            f"Batch size {batch_size} does not divide over {process_count} processes; choose a multiple of it."
        )
    if not 0 <= seed < 2**32:
        raise DataError(f"Data seed {seed} is out of range; choose one from 0 to {2**32 - 1}.")
    local_size = batch_size // process_count
    one = len(mixture.datasets) == 1
    streams = [_stream(dataset, seed, shuffle, repeat or not one) for dataset in mixture.datasets]
    stream = streams[0] if one else grain.MapDataset.mix(streams, mixture.weights)
    absent = absent_row(mixture.seq_len)

    def read(index: int) -> Row:
        first = start_row + index * batch_size + process_index * local_size
        rows = [stream[i] if i < len(stream) else absent for i in range(first, first + local_size)]
        return {name: np.stack([row[name] for row in rows]) for name in absent}

    stop = sys.maxsize if repeat else mixture.rows
    count = max(0, stop - start_row)
    count = count // batch_size if repeat else -(-count // batch_size)
    return iter(grain.MapDataset.range(count).map(read).to_iter_dataset(READ))


def _stream(dataset: PackedDataset, seed: int, shuffle: bool, repeat: bool) -> grain.MapDataset:
    stream = grain.MapDataset.source(PackedRows(dataset)).seed(seed)
    stream = stream.shuffle() if shuffle else stream
    return stream.repeat() if repeat else stream


def evaluation_batches(
    dataset: PackedDataset, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Row]:
    """One pass in stored order; the last batch is filled up with absent rows. See ``batches``."""
    return batches(
        dataset,
        batch_size=batch_size,
        shuffle=False,
        repeat=False,
        process_index=process_index,
        process_count=process_count,
    )
