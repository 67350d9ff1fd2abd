import dataclasses
import fcntl
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssm_jax.config import main
from ssm_jax.data import prepare as prepare_module
from ssm_jax.data import spool
from ssm_jax.data.pipeline import PackedRows
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import open_dataset, verify_dataset
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from ssm_jax.errors import DataError
from train.prepare_data import run

REPOSITORY = Path(__file__).parents[2]


def documents_of(path: Path, split: str) -> list[str]:
    """The texts of a split, read back from its rows."""
    rows = PackedRows(open_dataset(path, split))
    stream = np.concatenate([rows[i]["tokens"][rows[i]["positions"] >= 0] for i in range(len(rows))])
    tokenizer = load_tokenizer(path)
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    return [tokenizer.decode(stream[a + 1 : b]) for a, b in zip(ends[::2], ends[1::2], strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_document_comes_back_once(corpus: Path, prepared: Path):
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert sorted(train + validation) == sorted(file.read_text() for file in corpus.rglob("*.txt"))
    assert train != sorted(train)
    assert validation


def test_counts_are_those_of_the_rows(prepared: Path):
    for name in ("train", "validation"):
        dataset = open_dataset(prepared, name)
        split, stored = dataset.split, PackedRows(dataset)
        rows = [stored[i] for i in range(split.rows)]
        texts = documents_of(prepared, name)
        assert split.documents == len(texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.tokens == sum((row["positions"] >= 0).sum() for row in rows) == split.text_bytes + 2 * len(texts)
        assert split.targets == sum(row["weights"].sum() for row in rows)
        assert sum(shard.rows for shard in split.shards) == split.rows
    assert len(open_dataset(prepared, "train").split.shards) > 2


def test_files_depend_on_contents_alone(corpus: Path, prepared: Path, tmp_path: Path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(corpus.rglob("*.txt"), reverse=True)):
        shutil.copy(file, renamed / f"{number}.md")
    options = {"seq_len": 16, "validation_percent": 20.0, "rows_per_shard": 100}
    prepare(find_sources([renamed]), tmp_path / "out", ByteTokenizer(), Settings(**options))
    assert contents(tmp_path / "out") == contents(prepared)
    prepare(find_sources([renamed]), tmp_path / "other", ByteTokenizer(), Settings(seed=1, **options))
    assert documents_of(tmp_path / "other", "train") != documents_of(prepared, "train")
    assert documents_of(tmp_path / "other", "validation") != documents_of(prepared, "validation")
    assert sorted(documents_of(tmp_path / "other", "validation")) == sorted(documents_of(prepared, "validation"))


def test_split_of_a_document_does_not_depend_on_the_others(corpus: Path, prepared: Path, tmp_path: Path):
    prepare(
        find_sources([corpus / "odd"]), tmp_path / "odd", ByteTokenizer(), Settings(seq_len=16, validation_percent=20.0)
    )
    assert set(documents_of(tmp_path / "odd", "train")) < set(documents_of(prepared, "train"))


def test_duplicates_are_used_once_and_never_cross_the_splits(tmp_path: Path):
    texts = [f"text {i} " * 5 for i in range(4)]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:2]))
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(texts[3])
    _, dropped = prepare(
        find_sources([lines]),
        tmp_path / "out",
        ByteTokenizer(),
        Settings(seq_len=8),
        validation_files=find_sources([held_out]),
    )
    assert dropped.duplicates == 3
    assert sorted(documents_of(tmp_path / "out", "train")) == texts[:3]
    assert documents_of(tmp_path / "out", "validation") == texts[3:]


def test_one_document_is_cut_at_a_line(tmp_path: Path):
    text = "".join(f"line {i} ü\n" for i in range(200))
    (tmp_path / "one.txt").write_text(text)
    prepare(
        find_sources([tmp_path / "one.txt"]),
        tmp_path / "out",
        ByteTokenizer(),
        Settings(seq_len=8, validation_percent=10.0),
    )
    (train,), (validation,) = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "validation")
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.08 < len(validation) / len(text) < 0.12


@pytest.mark.parametrize(("percent", "expected"), [(0.0, (2, 0)), (0.001, (1, 1)), (99.9, (1, 1))])
def test_two_documents(percent: float, expected: tuple[int, int], tmp_path: Path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 50)
    manifest, _ = prepare(
        find_sources([tmp_path]), tmp_path / "out", ByteTokenizer(), Settings(seq_len=8, validation_percent=percent)
    )
    counts = {name: split.documents for name, split in manifest.splits.items()}
    assert (counts["train"], counts.get("validation", 0)) == expected
    if percent == 0:
        with pytest.raises(DataError, match=r"no split 'validation' \(it has train\)"):
            open_dataset(tmp_path / "out", "validation")


def test_max_bytes(corpus: Path, tmp_path: Path):
    manifest, _ = prepare(
        find_sources([corpus]), tmp_path / "out", ByteTokenizer(), Settings(seq_len=16, max_bytes=1000)
    )
    assert 997 <= sum(split.text_bytes for split in manifest.splits.values()) <= 1000


def test_subword_tokenizer_travels_with_the_data(corpus: Path, gpt2_folder: Path, tmp_path: Path):
    tokenizer = load_tokenizer(gpt2_folder)
    manifest, _ = prepare(find_sources([corpus]), tmp_path / "out", tokenizer, Settings(seq_len=16))
    assert manifest.vocab_size == tokenizer.vocab_size
    assert manifest.tokenizer["fingerprint"] == load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    texts = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "validation")
    assert sorted(texts) == sorted(file.read_text() for file in corpus.rglob("*.txt"))


@pytest.mark.parametrize(("text", "message"), [("", "holds no text"), ("short", "6 training targets .* at most 6")])
def test_corpus_smaller_than_a_row(text: str, message: str, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(
            find_sources([tmp_path / "in"]),
            tmp_path / "out",
            ByteTokenizer(),
            Settings(seq_len=7, validation_percent=0.0),
        )
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "options", [{"seq_len": 0}, {"validation_percent": 100.0}, {"max_bytes": 0}, {"rows_per_shard": -1}]
)
def test_settings_out_of_range(options: dict, corpus: Path, tmp_path: Path):
    with pytest.raises(DataError, match="--" + next(iter(options)).replace("_", "-")):
        prepare(find_sources([corpus]), tmp_path / "out", ByteTokenizer(), Settings(**options))
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept_unless_told(corpus: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    prepare(find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=16))
    before = contents(out)
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        prepare(find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=32))
    with pytest.raises(DataError, match="fewer than one row"):
        prepare(find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=10**6), overwrite=True)
    assert contents(out) == before
    prepare(find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=32), overwrite=True)
    assert open_dataset(out).seq_len == 32
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_foreign_folder_is_never_replaced(corpus: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not prepared data, so it is not replaced"):
        prepare(find_sources([corpus]), tmp_path, ByteTokenizer(), overwrite=True)
    with pytest.raises(DataError, match="is not prepared data, so it is not replaced"):
        prepare(find_sources([corpus]), tmp_path / "thesis.tex", ByteTokenizer(), overwrite=True)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_failed_exchange_brings_the_old_output_back(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    prepare(find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=16))
    before = contents(out)
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(DataError, match="cannot be written .No space left"):
        prepare(find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=32), overwrite=True)
    assert contents(out) == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_script(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    run(
        [
            "--out",
            str(out),
            str(corpus),
            str(tmp_path / "latin.txt"),
            "--skip-bad",
            "--seq-len",
            "32",
            "--include",
            "*.txt",
        ]
    )
    manifest = verify_dataset(out)
    printed = capsys.readouterr().out
    assert f"{manifest.splits['train'].documents:,} documents" in printed
    assert "1 bad" in printed
    assert "latin.txt" in printed
    assert dataclasses.asdict(manifest)["sources"] == (str(corpus), str(tmp_path / "latin.txt"))
    run(["--check", str(out)])
    assert "intact" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nowhere.txt"], ["nowhere.txt", "--tokenizer", "nowhere.json"], []])
def test_script_fails_with_status_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main(run)
    assert exit_info.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_workers_change_nothing(corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 1000)
    settings = Settings(seq_len=16, validation_percent=20.0, rows_per_shard=100)
    prepare(find_sources([corpus]), tmp_path / "out", ByteTokenizer(), settings, workers=3)
    assert contents(tmp_path / "out").keys() == contents(prepared).keys()
    for name, content in contents(tmp_path / "out").items():
        assert content == contents(prepared)[name], name
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_bad_file_in_a_worker_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 1000)
    (tmp_path / "bad.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"bad\.txt, looks binary"):
        prepare(find_sources([corpus, tmp_path / "bad.txt"]), tmp_path / "out", ByteTokenizer(), workers=2)
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.txt"]


INTERRUPTED = """
import os, signal, sys
from ssm_jax.data import prepare, spool
spool.PART_BYTES, prepare.WORTH_KEEPING = 1_000, 1
write, parts = spool.write_documents, []
def write_or_die(*arguments):
    parts.append(arguments[0].name)
    if len(parts) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
spool.write_documents = write_or_die
from train.prepare_data import run
run(sys.argv[1:])
"""


@pytest.mark.parametrize("changed", [False, True])
def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool):
    for name in "ab":
        lines = (json.dumps({"text": f"{name}{i} " * (i % 40 + 1)}) for i in range(120))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--seq-len", "16", "--workers", "1"]
    run([*arguments, "--out", str(tmp_path / "straight")])
    killed = [*arguments, "--out", str(tmp_path / "killed")]
    process = subprocess.run([sys.executable, "-c", INTERRUPTED, *killed], cwd=REPOSITORY, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    complete = sorted((tmp_path / ".killed.partial/spool").glob("*.index.npz"))
    assert len(complete) == 5
    if changed:  # the work on a file that has changed since is of no use
        (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + '\n{"text": "new"}')
    written, write = [], spool.write_documents
    monkeypatch.setattr(spool, "write_documents", lambda *a: written.append(a[0].name) or write(*a))
    run(killed)
    assert written[0] == ("00000-00000.tokens" if changed else "00000-00005.tokens")
    if changed:
        run([*arguments, "--out", str(tmp_path / "straight"), "--overwrite"])
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert not list(tmp_path.glob(".*"))


def test_more_parts_than_files_may_be_open(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare_module, "TASK_BYTES", 1)
    settings = Settings(seq_len=16, validation_percent=20.0, rows_per_shard=100)
    files = list(find_sources([corpus])) * 4
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 90, limits[1]))
    try:
        _, dropped = prepare(files, tmp_path / "out", ByteTokenizer(), settings)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert dropped.duplicates == 3 * len(files) // 4
    assert open_dataset(tmp_path / "out").split == open_dataset(prepared).split


def test_workers_end_with_their_parent_and_leave_nothing_in_the_way(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i} " * 300}) + "\n" for i in range(12_000))
        )
    inputs = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    command = [sys.executable, "-m", "train.prepare_data", *inputs, "--workers", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    at_work = tmp_path / ".out.partial/spool"
    while process.poll() is None and not list(at_work.glob("*.tmp")):
        time.sleep(0.01)
    process.kill()
    process.communicate()  # returns when the workers, who share the pipe, are gone too
    assert process.returncode == -signal.SIGKILL
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 0
    again = [*command[:-1], str(tmp_path / "straight")]
    assert subprocess.run(again, cwd=REPOSITORY, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_two_preparations_of_one_folder(corpus: Path, tmp_path: Path):
    with (tmp_path / ".out.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="out is being prepared by another process"):
            prepare(find_sources([corpus]), tmp_path / "out", ByteTokenizer())
