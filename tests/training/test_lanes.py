"""Whole runs over articles in lanes: their length, their validation, and going on in the middle of articles."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_jax import checkpoint, config
from ssm_jax.data.lanes import Documents
from ssm_jax.data.schedule import Schedule
from ssm_jax.data.shards import open_dataset
from ssm_jax.errors import ConfigError, DataError, UserError
from ssm_jax.evaluation import evaluate_documents
from ssm_jax.training import load_run_config, loop, saving, train
from ssm_jax.training import run as run_lib
from ssm_jax.training import state as state_lib
from tests.training.conftest import Overrides, Run
from tests.training.test_loop import assert_same_run, final_arrays, rows, stop_at
from tests.training.test_processes import assert_close_runs, finish, launch

REPOSITORY = Path(__file__).parents[2]
WINDOW = 16


@functools.cache
def lengths(articles: Path) -> np.ndarray:
    return Documents(open_dataset(articles)).lengths


@pytest.fixture
def fields(articles: Path) -> dict[str, Any]:
    """A run in lanes with a carried state; the schedule is longer than six steps."""
    return {"data__path": articles, "data__lanes__window": WINDOW, "train__carry_state": "true"}


@pytest.fixture(scope="module")
def carried(overrides: Overrides, articles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("carried") / "run"
    more = {"data__path": articles, "data__lanes__window": WINDOW, "train__carry_state": "true"}
    train(load_run_config(None, overrides(folder, **more)))
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def evaluations(folder: Path) -> list[float]:
    return [row["eval/loss"] for row in rows(folder) if "eval/loss" in row]


def test_a_stopped_run_goes_on_in_the_middle_of_its_articles(
    run: Run, fields: dict[str, Any], carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, articles: Path
) -> None:
    stop_at(3, monkeypatch)
    assert not run(**fields)["finished"]
    monkeypatch.undo()
    stopped = checkpoint.steps(tmp_path / "run/checkpoints")[-1]
    assert (Schedule(lengths(articles), lanes=8, window=WINDOW).at(stopped)[1] > 0).all(), "in the middle of articles"
    assert run(**fields)["finished"]
    assert_same_run(tmp_path / "run", carried)
    states = [array for array in final_arrays(carried) if array.shape in ((1, 8, 3, 16), (1, 8, 16, 16))]
    assert len(states) == 2
    assert all(np.any(state != 0) for state in states)


def test_an_empty_state_in_every_window_is_another_run(
    run: Run, fields: dict[str, Any], carried: Path, tmp_path: Path
) -> None:
    run(**{**fields, "train__carry_state": None})
    ours, theirs = losses(tmp_path / "run"), losses(carried)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6), "every first window is the same"
    assert all(a != pytest.approx(b, rel=1e-6) for a, b in zip(ours[2:], theirs[2:], strict=True))
    with pytest.raises(UserError, match=r"holds another run: train\.carry_state is None there and True here"):
        run(**fields)
    identity = config.read_yaml(tmp_path / "run/identity.yaml")
    assert "carry_state" not in identity["train"], "runs that were begun before there was the key go on"


def test_an_epoch_is_every_token_once_and_validation_is_that_of_whole_documents(
    run: Run, fields: dict[str, Any], articles: Path, tmp_path: Path
) -> None:
    """With microbatches, whose size is that of the lanes of validation."""
    more = {"train__steps": None, "train__epochs": 1, "eval__batches": "null", "eval__every": 0, "checkpoint__every": 0}
    more |= {"batch__microbatches": 2, "mesh__fsdp": 4, "mesh__tensor": 2}
    ended = run(**fields, **more)
    assert ended["steps"] == Schedule(lengths(articles), lanes=8, window=WINDOW, epochs=1).steps
    assert ended["tokens"] == open_dataset(articles).split.targets
    model, params = checkpoint.load_model(tmp_path / "run")
    whole = evaluate_documents(model, params, open_dataset(articles, "validation"))
    assert ended["eval/loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert ended["eval/bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-5)


ONE_EPOCH = {"train__steps": None, "train__epochs": 1, "eval__every": 0, "checkpoint__every": 0}


def test_static_batches_carry_and_the_published_order_does_not(
    run: Run, fields: dict[str, Any], articles: Path, tmp_path: Path
) -> None:
    ended = run(**fields, **ONE_EPOCH, data__lanes__refill="static", output=tmp_path / "static")
    assert ended["tokens"] == open_dataset(articles).split.targets
    published = {"data__lanes__refill": "closing", "data__lanes__targets": "within_windows", "train__carry_state": None}
    ended = run(**{**fields, **ONE_EPOCH, **published}, data__lanes__shuffle="false", output=tmp_path / "closing")
    closing = Schedule(lengths(articles), lanes=8, window=WINDOW, refill="closing", shuffle=False, epochs=1)
    assert ended["steps"] == closing.steps
    assert ended["tokens"] == sum(length - -(-length // WINDOW) for length in lengths(articles).tolist())


def test_other_lanes_begin_with_empty_states_and_the_run_says_so(
    run: Run, fields: dict[str, Any], carried: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(carried, tmp_path / "run")
    read, started = loop.training_rows, []

    def recorded(lanes: Any, config: Any, step: int) -> Any:
        started.append(step)
        return read(lanes, config, step)

    monkeypatch.setattr(loop, "training_rows", recorded)
    other = {**fields, "data__lanes__window": 8, "batch__size": 16, "train__accept_changes": "true"}
    with pytest.raises(
        ConfigError, match=r"data\.seq_len is 16 there and 8 here; data\.lanes\.window is 16 there and 8"
    ):
        run(**{**other, "train__accept_changes": None})
    capsys.readouterr()
    run(**other, train__steps=7)
    said = capsys.readouterr().out
    assert "every lane begins with an empty state: data.seq_len is 16 there and 8 here; data.lanes.window" in said
    assert "batch.size is 8 there and 16 here" in said
    run(**other, train__steps=8)
    assert "empty state" not in capsys.readouterr().out
    assert started == [3, 4], "48 rows of 8 lanes are 3 steps of 16"


def test_a_carry_that_is_not_wanted_is_left_and_one_that_is_not_there_is_missed(
    carried: Path, overrides: Overrides, tmp_path: Path
) -> None:
    straight = tmp_path / "rows"
    train(load_run_config(None, overrides(straight, train__steps=1)))
    run = run_lib.prepare(load_run_config(carried / "config.yaml", []))
    shapes = state_lib.abstract(run.model, run.config.optim, run.mesh, 8)
    lanes = saving.lanes_of(run)
    found = saving.restore(carried, *shapes, lanes)
    assert found is not None
    assert found.changed == []
    assert (np.asarray(found.state.carry.position) > 0).all()
    without = saving.restore(carried, *state_lib.abstract(run.model, run.config.optim, run.mesh))
    assert without is not None
    assert (without.state.carry, without.changed) == (None, [])
    assert lanes is not None
    missed = saving.restore(carried, *shapes, {**lanes, "batch": {"size": 4}})
    assert missed is not None
    assert (missed.state.carry, missed.changed) == (None, ["batch.size is 8 there and 4 here"])
    assert saving.restore(straight, *shapes, lanes).changed == ["the checkpoint was saved without one"]


def test_more_epochs_go_on_in_the_lanes_that_had_drained(
    run: Run, fields: dict[str, Any], capsys: pytest.CaptureFixture[str], articles: Path
) -> None:
    run(**fields, **ONE_EPOCH)
    capsys.readouterr()
    ended = run(**{**fields, **ONE_EPOCH, "train__epochs": 2}, train__accept_changes="true")
    assert "every lane begins with an empty state: train.epochs is 1.0 there and 2.0 here" in capsys.readouterr().out
    assert ended["steps"] == Schedule(lengths(articles), lanes=8, window=WINDOW, epochs=2).steps


@pytest.mark.multiprocess
def test_a_killed_process_goes_on_in_the_middle_of_its_articles(
    overrides: Overrides, fields: dict[str, Any], tmp_path: Path
) -> None:
    changes = {**fields, "train__steps": 120, "checkpoint__every": 25, "eval__every": 60}
    train(load_run_config(None, overrides(tmp_path / "straight", **changes)))
    folder = tmp_path / "killed"
    command = [sys.executable, "-W", "error", "-m", "train.pretrain", *overrides(folder, **changes)]
    start = functools.partial(
        subprocess.Popen, command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process, metrics = start(), folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(rows(folder)) > 30):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    saved = checkpoint.steps(folder / "checkpoints")[-1]
    assert 25 <= saved < 120
    process = start()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"going on from step {saved}" in output
    assert "empty state" not in output
    assert_same_run(folder, tmp_path / "straight")


@pytest.mark.multiprocess
def test_two_processes_carry_what_one_does(overrides: Overrides, fields: dict[str, Any], tmp_path: Path) -> None:
    changes = {**fields, "train__steps": 8, "checkpoint__every": 4, "eval__every": 4, "mesh__data": 2, "mesh__fsdp": 4}
    finish(launch(2, overrides(tmp_path / "two", **changes)))
    train(load_run_config(None, overrides(tmp_path / "one", **changes)))
    assert_close_runs(tmp_path / "two", tmp_path / "one")
    for ours, theirs in zip(*(final_arrays(tmp_path / name) for name in ("two", "one")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary["finished"]


LIMITED = {"model__family": "gpt2", "model__n_heads": 2, "model__n_positions": 64}
REFUSED: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"data__lanes__window": 1}, ConfigError, "window is 1; it must be at least 2"),
    ({"data__lanes__refill": "closed"}, ConfigError, r"'data\.lanes\.refill' is 'closed'"),
    ({"data__lanes__windows": 4}, ConfigError, r"'data\.lanes\.windows' is unknown; did you mean 'window'"),
    ({"data__joined": "true"}, ConfigError, "joined and lanes are set, and a lane's window holds one article"),
    ({"data__path": None, "data__mixture": "[{path: a}, {path: b}]"}, ConfigError, "lanes read one corpus; set path"),
    ({"data__lanes__window": None}, ConfigError,
     r"'train\.carry_state' is true and the data is read as rows, .* set data\.lanes\.window, with data prepared"),
    ({"data__lanes__window": None, "train__carry_state": None}, DataError,
     r"was prepared as documents; prepare rows with --form rows, or set data\.lanes\.window"),
    ({"data__lanes__refill": "closing"}, ConfigError, r"refill is closing, .* set data\.lanes\.refill=stable"),
    ({"distill__teacher": "nowhere"}, ConfigError, r"a teacher is set, .* distill=null and train\.carry_state=false"),
    ({"data__seq_len": 8}, ConfigError, r"'data\.seq_len' is 8 and data\.lanes\.window 16; leave data\.seq_len out"),
    (LIMITED, DataError, r"the longest article in .* has \d+ tokens and the model reads at most 64; set train\.carry_state"),
    ({**LIMITED, "train__carry_state": None, "data__lanes__window": 65}, ConfigError,
     r"'data\.lanes\.window' is 65, and the model reads at most 64 tokens; set data\.lanes\.window=64, or"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refused_before_anything_happens(
    run: Run, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], error: type[UserError], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(error, match=message) as caught:
        run(**{**fields, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_are_not_read_in_lanes(run: Run, fields: dict[str, Any], data: Path) -> None:
    with pytest.raises(
        DataError, match="was prepared as rows, and data.lanes reads whole articles; .* --form documents"
    ):
        run(**{**fields, "data__path": data})


BAKA = {"family": "baka", "n_heads": 2, "n_ctx": 8, "n_pauses": 2, "n_rmt_tokens": 2, "d_state": 4}


def test_rows_of_several_documents_are_not_for_models_that_read_in_chunks(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {f"model__{name}": value for name, value in BAKA.items()}
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match=r"a baka model begins one only with a call; read articles in lanes .*joined"):
        run(data__path=data, **fields)
    assert not (tmp_path / "run").exists()


def test_a_model_that_reads_in_chunks_trains_on_rows_as_documents_and_carries_over_articles(
    run: Run, data: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Among them a network whose state has parts that it does not use, which a checkpoint leaves out."""
    bare = BAKA | {"n_rmt_tokens": 0, "xl_layer": "none"}
    for name, more in (("rows", {"data__path": data, "data__joined": "true"}), ("lanes", fields)):
        model = {f"model__{key}": value for key, value in (BAKA if name == "rows" else bare).items()}
        assert run(**more, **model, output=tmp_path / name, train__steps=2)["finished"]
        assert len(losses(tmp_path / name)) == 2


def test_a_config_without_lanes_resolves_as_before(run: Run, data: Path, overrides: Overrides, tmp_path: Path) -> None:
    prepared = run_lib.prepare(load_run_config(None, overrides(tmp_path)))
    identity = run_lib.identity(prepared.config, prepared.data)
    assert prepared.lanes is None
    assert set(identity["data"]) == {"content", "seq_len", "seed"}
    assert set(identity["train"]) == {"steps", "epochs", "time_budget_s"}
