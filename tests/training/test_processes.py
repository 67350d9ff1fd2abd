"""Several processes, as ``train/launch/local.sh`` starts them, against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grain
import pytest

from ssm_jax import checkpoint
from ssm_jax.data.shards import open_dataset
from ssm_jax.training import load_run_config, train
from tests.data.damage import rewrite_shard
from tests.training.conftest import Overrides
from tests.training.test_loop import assert_same_run, rows

REPOSITORY = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "train__steps": 40,
    "checkpoint__every": 10,
    "eval__every": 20,
    "sample__every": 20,
    "sample__prompts": '["a"]',
    "sample__max_new_tokens": 4,
    "optim__ema": 0.9,
    "optim__freeze": "[norm_f]",
    "mesh__data": 2,
    "mesh__fsdp": 4,
}

pytestmark = pytest.mark.multiprocess


def launch(processes: int, arguments: list[str]) -> subprocess.Popen:
    """``processes`` of them share eight virtual devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // processes}")
    command = ["train/launch/local.sh", str(processes), "-W", "error", "-m", "train.pretrain", *arguments]
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHON": sys.executable}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def interrupt(folder: Path, process: subprocess.Popen, number: int) -> None:
    """Sends a signal to one of the two training processes, not the first, after a dozen steps."""
    while process.poll() is None and not ((folder / "metrics.jsonl").is_file() and len(rows(folder)) > 12):
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-f", f"train.pretrain.*output={folder}"], capture_output=True, text=True)
    children = sorted({int(line) for line in found.stdout.split()} - {process.pid})
    os.kill(children[-1], number)


@pytest.fixture(scope="module")
def together(overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("together") / "run"
    output = finish(launch(2, overrides(folder, **RUN)))
    assert output.count("compiled in") == 1, "only the first process prints"
    return folder


def assert_close_runs(a: Path, b: Path) -> None:
    assert [row["step"] for row in rows(a)] == [row["step"] for row in rows(b)]
    for ours, theirs in zip(rows(a), rows(b), strict=True):
        names = [name for name in ours if "loss" in name]
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-5)


def test_two_processes_train_what_one_does(together: Path, overrides: Overrides, tmp_path: Path) -> None:
    train(load_run_config(None, overrides(tmp_path / "run", **RUN)))
    assert_close_runs(together, tmp_path / "run")
    samples = [json.loads(line)["step"] for line in (together / "samples.jsonl").read_text().splitlines()]
    assert samples == [20, 40]


def test_two_processes_stop_together_and_go_on_bit_for_bit(
    together: Path, overrides: Overrides, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = launch(2, overrides(folder, **RUN))
    interrupt(folder, process, signal.SIGTERM)
    assert "the same command goes on" in finish(process)
    stopped = checkpoint.steps(folder / "checkpoints")[-1]
    assert 12 < stopped < 40
    assert f"going on from step {stopped}" in finish(launch(2, overrides(folder, **RUN)))
    assert_same_run(folder, together)


def test_a_killed_process_ends_the_other_and_one_process_goes_on_with_the_same_batches(
    together: Path, overrides: Overrides, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = launch(2, overrides(folder, **RUN))
    interrupt(folder, process, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    saved = checkpoint.steps(folder / "checkpoints")[-1]
    assert saved % 10 == 0
    assert f"going on from step {saved}" in finish(launch(1, overrides(folder, **RUN)))
    assert_close_runs(folder, together)


def test_the_launcher_says_how_it_is_used() -> None:
    ended = subprocess.run(["train/launch/local.sh", "two"], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "train/launch/local.sh 2 -m train.pretrain" in ended.stderr


FAKE = """#!/usr/bin/env bash
[ "$1" = wait ] && { [ "$JAX_PROCESS_ID" = 0 ] && exit 3; trap "" TERM; sleep 60; }
exit "${CODES:$JAX_PROCESS_ID:1}"
"""


@pytest.mark.parametrize("codes", ["00", "03", "30", "33"])
def test_the_launcher_fails_if_any_process_does(codes: str, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "CODES": codes, "PORT": "1"}
    for _ in range(5):
        ended = subprocess.run(["train/launch/local.sh", "2", "go"], cwd=REPOSITORY, env=environment)
        assert ended.returncode == (0 if codes == "00" else 3)


def test_the_launcher_ends_those_that_wait_for_a_failed_process(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "PORT": "1"}
    started = time.monotonic()
    ended = subprocess.run(["train/launch/local.sh", "2", "wait"], cwd=REPOSITORY, env=environment)
    assert ended.returncode == 3
    assert time.monotonic() - started < 50


def test_an_error_in_one_process_is_told_and_ends_both(overrides: Overrides, data: Path, tmp_path: Path) -> None:
    """A damaged record in the part of the third batch that the second process reads."""
    copy = shutil.copytree(data, tmp_path / "data")
    dataset = open_dataset(copy)
    order = grain.MapDataset.source(range(dataset.rows)).seed(0).shuffle()
    bad = order[2 * 8 + 5]

    def damage(records: list[bytes]) -> None:
        records[bad] = records[bad][:-1] + bytes([records[bad][-1] ^ 4])

    rewrite_shard(copy, "train", damage)
    process = launch(2, overrides(tmp_path / "run", **RUN, data__path=copy))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert f"record {bad}, is damaged" in output
