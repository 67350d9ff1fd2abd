"""Articles in lanes: the schedule against the published one and against its rules, and the batches that are read from it."""

import functools
import itertools
import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ssm_jax.data.lanes import Documents, counted_afresh, cut, lane_batches
from ssm_jax.data.packing import PackedRow, Row, frame_document
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.schedule import Refill, Schedule
from ssm_jax.data.shards import Manifest, PackedDataset, open_dataset, write_split
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.errors import DataError
from tests.data.damage import rewrite_shard

GOLDEN = Path(__file__).parents[1] / "goldens/baka/refill_schedule"
NAMES = ("tokens", "targets", "positions", "weights")
Step = tuple[tuple[int, int], ...]


def stored(folder: Path, documents: list[np.ndarray]) -> PackedDataset:
    """Token arrays, any of them empty, as prepared data."""
    rows = [PackedRow(tokens, np.array([len(tokens)], np.uint32), False) for tokens in documents]
    total = sum(map(len, documents))
    counts = {"documents": len(rows), "tokens": total, "rows": len(rows), "text_bytes": total}
    split = write_split(folder, "train", iter(rows), counts, "uint16", 5)
    content = {"form": "documents", "seq_len": 0, "vocab_size": 60000, "token_dtype": "uint16", "tokenizer": {}}
    return PackedDataset(folder, "train", Manifest(**content, splits={"train": split}))


def read(documents: Documents, schedule: Schedule, count: int | None = None, **options) -> list[Row]:
    stream = lane_batches(documents, schedule, **options)
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


def assert_same(one: list[Row], other: list[Row]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(a[name], b[name])


@functools.cache
def walked(lengths: tuple[int, ...], lanes: int, window: int, refill: Refill, **options) -> list[Step]:
    """(article, offset) of every lane in every step, absent lanes (-1, 0)."""
    schedule = Schedule(np.array(lengths), lanes=lanes, window=window, refill=refill, **options)
    return [tuple(zip(*(part.tolist() for part in schedule.at(step)), strict=True)) for step in range(schedule.steps)]


def test_the_closing_order_is_the_published_one(tmp_path: Path):
    golden, config = load_file(GOLDEN / "io.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    articles = np.split(golden["articles"], np.cumsum(golden["article_lengths"])[:-1])
    documents = Documents(stored(tmp_path, articles))
    lanes, window = config["batch_size"], config["training_ctx"]
    schedule = Schedule(documents.lengths, lanes=lanes, window=window, refill="closing", shuffle=False, epochs=1)
    assert schedule.steps == config["n_steps"]
    batches = read(documents, schedule, within_windows=True)
    assert len(batches) == config["n_steps"]
    for step, (batch, places) in enumerate(zip(batches, config["lane_article_and_window_per_step"], strict=True)):
        tokens, labels = golden[f"step{step:03d}.tokens"], golden[f"step{step:03d}.labels"]
        shown = [[article, offset // window] for article, offset in np.stack(schedule.at(step), 1) if article >= 0]
        assert shown == places
        present = batch["positions"] >= 0
        assert present[: len(tokens)].any(axis=1).all()
        assert not present[len(tokens) :].any(), "lanes that the author drops are absent"
        np.testing.assert_array_equal(batch["tokens"][: len(tokens)], tokens)
        ignored = config["ignore_index"]
        np.testing.assert_array_equal(np.where(present, batch["tokens"], ignored)[: len(labels)], labels)
        shifted = np.full_like(labels, ignored)  # the author's loss compares output t with label t + 1
        shifted[:, :-1] = labels[:, 1:]
        ours = np.where(batch["weights"] > 0, batch["targets"], ignored)
        np.testing.assert_array_equal(ours[: len(labels)], shifted)


articles = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)
orders = st.sampled_from(["stable", "closing", "static"])
few = hypothesis.settings(deadline=None, max_examples=60)


@few
@hypothesis.given(articles, st.integers(1, 5), st.integers(2, 7), orders, st.integers(1, 3), st.booleans())
def test_every_token_of_an_article_but_its_first_is_a_target_once_per_epoch(
    lengths: list[int], lanes: int, window: int, refill: Refill, epochs: int, shuffle: bool
):
    steps = walked(tuple(lengths), lanes, window, refill, epochs=epochs, shuffle=shuffle)
    seen: Counter[tuple[int, int]] = Counter()
    for step in steps:
        targets = 0
        for article, offset in step:
            if article >= 0:
                row = cut(np.arange(lengths[article]), offset, window)
                found = row["targets"][row["weights"] > 0]
                assert refill == "closing" or len(found), "no window without a target"
                targets += len(found)
                seen.update((article, int(token)) for token in found)
        assert targets, "no step without a target"
    assert seen == {(a, t): epochs for a, length in enumerate(lengths) for t in range(1, length)}


@few
@hypothesis.given(articles, st.integers(1, 5), st.integers(2, 7), st.sampled_from(["stable", "static"]))
def test_an_article_stays_in_its_lane_until_it_ends(lengths: list[int], lanes: int, window: int, refill: Refill):
    steps = walked(tuple(lengths), lanes, window, refill, epochs=2)
    for lane in range(lanes):
        before = (-1, 0)
        for step in steps:
            article, offset = step[lane]
            if article >= 0 and offset > 0:
                assert before == (article, offset - window)
            if before[0] >= 0 and lengths[before[0]] - before[1] - window > 1:
                assert (article, offset) == (before[0], before[1] + window)
            before = step[lane]


def published(lengths: list[int], lanes: int, window: int) -> list[list[tuple[int, int]]]:
    """The five rules of the original, word by word, on (article, tokens already dropped)."""
    waiting, active, steps = list(range(len(lengths))), [], []
    while waiting or active:
        active = [(article, offset) for article, offset in active if offset < lengths[article]]
        while len(active) < lanes and waiting:
            article = waiting.pop(0)
            active += [(article, 0)] if lengths[article] else []
        if any(lengths[article] - offset > 1 for article, offset in active):
            steps.append(active)
        active = [(article, offset + window) for article, offset in active]
    return steps


@few
@hypothesis.given(articles, st.integers(1, 5), st.integers(2, 7))
def test_closing_is_the_rules_of_the_original_and_stable_the_same_multiset(lengths: list[int], lanes: int, window: int):
    once = {"epochs": 1, "shuffle": False}
    expected = published(lengths, lanes, window)
    closing = [
        [place for place in step if place[0] >= 0] for step in walked(tuple(lengths), lanes, window, "closing", **once)
    ]
    assert closing == expected
    ending = [length for length in lengths if length % window != 1]
    if ending and max(ending) > 1:  # no window of an end mark alone, which only the published order reads
        stable, closing = (walked(tuple(ending), lanes, window, refill, **once) for refill in ("stable", "closing"))
        assert [sorted(step) for step in stable] == [sorted(step) for step in closing]


@few
@hypothesis.given(articles, st.integers(1, 5), st.integers(2, 7))
def test_static_groups_begin_together(lengths: list[int], lanes: int, window: int):
    steps = walked(tuple(lengths), lanes, window, "static", epochs=1, shuffle=False)
    used = [article for article, length in enumerate(lengths) if length > 1]
    starts = [[article for article, offset in step if article >= 0 and offset == 0] for step in steps]
    assert [group for group in starts if group] == [used[i : i + lanes] for i in range(0, len(used), lanes)]


@few
@hypothesis.given(articles, st.integers(1, 5), st.integers(2, 7), orders, st.integers(0, 40))
def test_any_step_can_be_the_first(lengths: list[int], lanes: int, window: int, refill: Refill, start: int):
    whole, later = (Schedule(np.array(lengths), lanes=lanes, window=window, refill=refill, seed=3) for _ in range(2))
    running = [whole.at(step) for step in range(start + 3)]
    for step in (start + 2, start, start + 1):
        np.testing.assert_array_equal(later.at(step), running[step])
    assert whole.steps is None


def test_epochs_follow_without_a_gap_in_an_order_of_their_own():
    lengths = (9, 20, 14, 5, 31, 7, 12)
    stable = walked(lengths, 3, 4, "stable", epochs=3)
    assert all(article >= 0 for step in stable[:-8] for article, _ in step), "full until the last articles"
    order = [article for step in stable for article, offset in step if article >= 0 and offset == 0]
    assert [sorted(order[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert len({tuple(order[i : i + 7]) for i in (0, 7, 14)}) == 3
    assert walked(lengths, 3, 4, "stable", epochs=3, seed=1) != stable
    assert len(walked(lengths, 3, 4, "stable", epochs=1)) + 2 > len(stable) // 3
    half = walked(lengths, 3, 4, "stable", epochs=0.5)
    assert sum(offset == 0 and article >= 0 for step in half for article, offset in step) == 4
    with pytest.raises(IndexError, match="has ended"):
        Schedule(np.array(lengths), lanes=3, window=4, epochs=1).at(99)


def test_more_lanes_than_articles():
    once = walked((5, 9), 4, 4, "stable", epochs=1, shuffle=False)
    assert once == [((0, 0), (1, 0), (-1, 0), (-1, 0)), ((-1, 0), (1, 4), (-1, 0), (-1, 0))]
    endless = Schedule(np.array([5, 9]), lanes=4, window=4, shuffle=False)
    assert endless.at(0)[0].tolist() == [0, 1, 0, 1]


@pytest.fixture(scope="module")
def documents(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Twenty-five articles of 17 to 700 tokens."""
    out = tmp_path_factory.mktemp("documents") / "out"
    prepare(
        find_sources([corpus]), out, ByteTokenizer(),
        Settings(form="documents", validation_percent=20.0, rows_per_shard=7),
    )  # fmt: skip
    return Documents(open_dataset(out))


def test_a_lane_reads_whole_articles_one_after_another(documents: Documents):
    schedule = Schedule(documents.lengths, lanes=4, window=16, epochs=1, seed=2)
    batches = read(documents, schedule)
    assert {name: (array.shape, array.dtype.name) for name, array in batches[0].items()} == {
        "tokens": ((4, 16), "int32"),
        "targets": ((4, 16), "int32"),
        "positions": ((4, 16), "int32"),
        "weights": ((4, 16), "float32"),
    }
    found = []
    for lane in range(4):
        joined = {name: np.concatenate([batch[name][lane] for batch in batches]) for name in NAMES}
        present = joined["positions"] >= 0
        assert not joined["weights"][~present].any()
        tokens, targets, positions = (joined[name][present] for name in ("tokens", "targets", "positions"))
        starts = np.flatnonzero(positions == 0)
        for text, following, places in zip(
            *(np.split(part, starts[1:]) for part in (tokens, targets, positions)), strict=True
        ):
            np.testing.assert_array_equal(places, np.arange(len(text)))
            np.testing.assert_array_equal(following[:-1], text[1:])
            found.append(text.tolist() + ([int(following[-1])] if len(text) % 16 == 0 and following[-1] else []))
    assert sorted(found) == sorted(documents[i].tolist() for i in range(len(documents.lengths)))
    starts = [batch["positions"][:, 0] for batch in batches]
    assert all(np.isin(first % 16, (0, 15)).all() for first in starts), "a document begins in column 0 or not at all"


def test_processes_together_and_any_start_see_the_same_batches(documents: Documents):
    def schedule() -> Schedule:
        return Schedule(documents.lengths, lanes=4, window=16, seed=1)

    whole = read(documents, schedule(), 60)
    for count in (2, 4):
        parts = [
            read(documents, schedule(), 20, start_step=40, process_index=p, process_count=count) for p in range(count)
        ]
        joined = [{name: np.concatenate([part[i][name] for part in parts]) for name in NAMES} for i in range(20)]
        assert_same(joined, whole[40:])


def test_a_document_is_decoded_once_and_not_for_each_window(documents: Documents, monkeypatch: pytest.MonkeyPatch):
    decoded: Counter[int] = Counter()
    lock, get = threading.Lock(), Documents.__getitem__

    def counted(self: Documents, index: int) -> np.ndarray:
        with lock:
            decoded[index] += 1
        return get(self, index)

    schedule = Schedule(documents.lengths, lanes=4, window=8, epochs=1)
    monkeypatch.setattr(Documents, "__getitem__", counted)
    read(documents, schedule)
    assert set(decoded) == set(range(len(documents.lengths)))
    assert max(decoded.values()) == 1
    decoded.clear()
    start = schedule.steps // 2
    (first,) = read(documents, schedule, 1, start_step=start)
    places = zip(*schedule.at(start), strict=True)
    assert_same([first], [stack([cut(get(documents, int(a)), int(o), 8) for a, o in places])])


def stack(rows: list[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in NAMES}


def test_positions_of_a_model_without_a_carried_state(documents: Documents):
    batch = read(documents, Schedule(documents.lengths, lanes=4, window=16, epochs=1), 3)[-1]
    afresh = counted_afresh(batch)
    assert (batch["positions"][:, 0] > 0).any()
    present = batch["positions"] >= 0
    np.testing.assert_array_equal(afresh["positions"], np.where(present, np.arange(16), -1))
    assert all(afresh[name] is batch[name] for name in ("tokens", "targets", "weights"))


def test_what_cannot_be_read_in_lanes(documents: Documents, prepared: Path, tmp_path: Path):
    with pytest.raises(
        DataError, match="prepared as rows; lanes read whole articles: prepare it with --form documents"
    ):
        Documents(open_dataset(prepared))
    with pytest.raises(DataError, match="6 lanes do not divide over 4 processes"):
        lane_batches(documents, Schedule(documents.lengths, lanes=6, window=4), process_count=4)
    for lanes, window in ((0, 8), (2, 1)):
        with pytest.raises(DataError, match="at least 1 lane and a window of 2"):
            Schedule(documents.lengths, lanes=lanes, window=window)
    with pytest.raises(DataError, match="seed -1 is out of range"):
        Schedule(documents.lengths, lanes=2, window=8, seed=-1)
    with pytest.raises(DataError, match="No article has two tokens"):
        Schedule(np.array([1, 0]), lanes=2, window=8)
    empty = Documents(stored(tmp_path, [np.arange(0), frame_document(np.arange(3, dtype=np.int32), 9), np.arange(1)]))
    (batch,) = read(empty, Schedule(empty.lengths, lanes=2, window=8, epochs=1))
    assert batch["tokens"].tolist() == [[9, 0, 1, 2, 9, 0, 0, 0], [0] * 8], "articles without a target are left out"
    assert batch["weights"].sum() == 4


def test_a_damaged_record_is_named(corpus: Path, tmp_path: Path):
    out = tmp_path / "out"
    settings = Settings(form="documents", validation_percent=20.0, rows_per_shard=7)
    prepare(find_sources([corpus]), out, ByteTokenizer(), settings)
    copy = shutil.copytree(out, tmp_path / "copy")

    def damage(records: list[bytes]) -> None:
        records[3] = records[3][:-1] + bytes([records[3][-1] ^ 4])

    file = rewrite_shard(copy, "train", damage)
    with pytest.raises(DataError, match=rf"{file.name}, record 3, is damaged"):
        Documents(open_dataset(copy))
