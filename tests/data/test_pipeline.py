import shutil
import tempfile
from itertools import islice
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ssm_jax.data.packing import Row, encode_record, expand, frame_document, pack
from ssm_jax.data.pipeline import PackedRows, batches, evaluation_batches, stored_documents
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import Manifest, PackedDataset, open_dataset, write_split
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.errors import DataError
from tests.data.damage import rewrite_shard


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> PackedDataset:
    return open_dataset(prepared)


def take(stream, count: int) -> list[Row]:
    taken = list(islice(stream, count))
    stream.close()
    assert len(taken) == count
    return taken


def assert_same(one: list[Row], other: list[Row]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("tokens", "targets", "positions", "weights"):
            np.testing.assert_array_equal(a[name], b[name])


def fingerprints(batch_list: list[Row]) -> list[bytes]:
    """One value per row, absent rows left out."""
    rows = [
        (batch["tokens"][i].tobytes() + batch["positions"][i].tobytes(), batch["positions"][i, 0])
        for batch in batch_list
        for i in range(len(batch["tokens"]))
    ]
    return [row for row, first_position in rows if first_position >= 0]


def test_shapes_and_types(dataset: PackedDataset):
    (batch,) = take(batches(dataset, batch_size=6), 1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((6, 16), "int32"),
        "targets": ((6, 16), "int32"),
        "positions": ((6, 16), "int32"),
        "weights": ((6, 16), "float32"),
    }


def test_resume_is_running_on(dataset: PackedDataset):
    per_epoch = dataset.rows // 7
    whole = take(batches(dataset, batch_size=7, seed=3), 2 * per_epoch)
    for start in (1, per_epoch - 1, per_epoch + 2):
        assert_same(take(batches(dataset, batch_size=7, seed=3, start_row=7 * start), 5), whole[start : start + 5])


def test_another_batch_size_goes_on_with_the_next_row(dataset: PackedDataset):
    rows = take(batches(dataset, batch_size=1, seed=3), 6 * 4 + 5 * 3)
    going_on = take(batches(dataset, batch_size=3, seed=3, start_row=6 * 4), 5)
    parts = [{name: batch[name][i : i + 1] for name in batch} for batch in going_on for i in range(3)]
    assert_same(parts, rows[6 * 4 :])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_see_the_same_batches(dataset: PackedDataset, process_count: int):
    whole = take(batches(dataset, batch_size=8, seed=1, start_row=24), 6)
    parts = [
        take(batches(dataset, batch_size=8, seed=1, start_row=24, process_index=p, process_count=process_count), 6)
        for p in range(process_count)
    ]
    joined = [{name: np.concatenate([part[i][name] for part in parts]) for name in whole[i]} for i in range(6)]
    assert_same(joined, whole)


def test_batch_size_does_not_change_the_row_stream(dataset: PackedDataset):
    rows = fingerprints(take(batches(dataset, batch_size=4, seed=5), 12))
    assert fingerprints(take(batches(dataset, batch_size=12, seed=5), 4)) == rows


def test_each_epoch_has_every_row_once_in_its_own_order(dataset: PackedDataset):
    n = dataset.rows
    stored = fingerprints(list(evaluation_batches(dataset, batch_size=16)))
    rows = fingerprints(take(batches(dataset, batch_size=1, seed=0), 2 * n))
    assert sorted(rows[:n]) == sorted(rows[n:]) == sorted(stored)
    assert rows[:n] != rows[n:]
    assert rows[:n] != stored
    assert fingerprints(take(batches(dataset, batch_size=1, seed=1), n)) != rows[:n]


def test_evaluation_is_one_pass_in_order_filled_with_absent_rows(dataset: PackedDataset):
    rows = PackedRows(dataset)
    batch_size = 14
    assert dataset.rows % batch_size
    got = list(evaluation_batches(dataset, batch_size=batch_size))
    flat = {name: np.concatenate([batch[name] for batch in got]) for name in got[0]}
    for name, array in flat.items():
        np.testing.assert_array_equal(array[: dataset.rows], np.stack([rows[i][name] for i in range(dataset.rows)]))
    assert len(flat["tokens"]) == batch_size * -(-dataset.rows // batch_size)
    assert (flat["positions"][dataset.rows :] == -1).all()
    assert (flat["weights"][dataset.rows :] == 0).all()
    assert flat["weights"].sum() == dataset.split.targets
    parts = [list(evaluation_batches(dataset, batch_size=14, process_index=p, process_count=2)) for p in range(2)]
    assert_same([{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)], got)


def test_one_pass_shuffled(dataset: PackedDataset):
    once = list(batches(dataset, batch_size=14, seed=2, repeat=False))
    endless = take(batches(dataset, batch_size=14, seed=2), len(once) - 1)
    assert_same(once[:-1], endless)
    assert len(fingerprints(once)) == dataset.rows
    assert list(batches(dataset, batch_size=14, repeat=False, start_row=14 * (len(once) + 3))) == []


@pytest.mark.parametrize(("batch_size", "process_count"), [(6, 4), (0, 1)])
def test_batch_size_that_does_not_divide(dataset: PackedDataset, batch_size: int, process_count: int):
    with pytest.raises(DataError, match=f"Batch size {batch_size} does not divide over {process_count} processes"):
        batches(dataset, batch_size=batch_size, process_count=process_count)


def test_seed_out_of_range(dataset: PackedDataset):
    with pytest.raises(DataError, match="seed -1 is out of range"):
        batches(dataset, batch_size=1, seed=-1)


def test_damage_anywhere_in_a_shard_is_refused_or_harmless(prepared: Path, tmp_path: Path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    dataset = open_dataset(folder)
    shard = folder / dataset.split.shards[1].file
    first, count = dataset.split.shards[0].rows, dataset.split.shards[1].rows
    good = [PackedRows(dataset)[first + i] for i in range(count)]
    content = shard.read_bytes()
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    messages = []
    for offset in np.random.default_rng(0).choice(used, 60, replace=False):
        damaged = bytearray(content)
        damaged[offset] ^= 0x55
        shard.write_bytes(damaged)
        rows = PackedRows(dataset)
        for i in range(count):
            try:
                assert_same([rows[first + i]], [good[i]])
            except DataError as error:
                messages.append((f"{shard.name}, record {i}, is damaged", str(error)))
    assert len(messages) >= 30
    assert all(expected in message for expected, message in messages)


def test_record_that_array_record_finds_intact_is_checked_by_us(prepared: Path, tmp_path: Path):
    """A shard rewritten with one wrong token: only the record's own checksum can tell."""
    folder = shutil.copytree(prepared, tmp_path / "copy")
    other = encode_record(next(pack([np.arange(5)], 16)), 3, "uint16")

    def damage(records: list[bytes]) -> None:
        bad = bytearray(records[2])
        bad[-3] ^= 4
        records[2:4] = [bytes(bad), other[:4] + records[3][4:]]

    file = rewrite_shard(folder, "validation", damage)
    stream = evaluation_batches(open_dataset(folder, "validation"), batch_size=2)
    next(stream)
    with pytest.raises(DataError, match=rf"{file.name}, record 2, is damaged \(its checksum does not fit\)"):
        next(stream)
    stream.close()


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(texts=st.lists(st.binary(max_size=30), min_size=1, max_size=8), length=st.integers(1, 9))
def test_documents_come_back_from_packed_rows(texts: list[bytes], length: int):
    documents = [frame_document(np.frombuffer(text, np.uint8).astype(np.int32), 256) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        rows = list(pack(documents, length))
        tokens = sum(len(document) for document in documents)
        counts = {"documents": len(documents), "tokens": tokens, "rows": len(rows), "text_bytes": tokens}
        split = write_split(Path(folder), "train", iter(rows), counts, "uint16", 5)
        manifest = Manifest(seq_len=length, vocab_size=257, token_dtype="uint16", tokenizer={}, splits={"train": split})
        found = list(stored_documents(PackedDataset(Path(folder), "train", manifest)))
    assert [document.tolist() for document in found] == [document.tolist() for document in documents]
    assert sum(len(document) - 1 for document in found) == sum(expand(row, length)["weights"].sum() for row in rows)


def test_documents_are_stored_whole(corpus: Path, prepared: Path, tmp_path: Path):
    settings = Settings(form="documents", validation_percent=20.0, rows_per_shard=7)
    manifest, _ = prepare(find_sources([corpus]), tmp_path / "out", ByteTokenizer(), settings)
    dataset = open_dataset(tmp_path / "out")
    whole, packed = ([x.tolist() for x in stored_documents(data)] for data in (dataset, open_dataset(prepared)))
    assert whole == packed
    assert manifest.splits["train"].rows == manifest.splits["train"].documents == len(whole)
    with pytest.raises(DataError, match="was prepared as documents; prepare rows with --form rows"):
        batches(dataset, batch_size=2)
