"""What cannot work is refused in one sentence that names the key or file and the fix, before anything compiles or is written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssm_jax import checkpoint
from ssm_jax.errors import CheckpointError, ConfigError, DataError, ShardingError, UserError
from ssm_jax.training import loop
from tests.training.conftest import Overrides, Run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object) -> None:
        pytest.fail("the step was compiled")

    monkeypatch.setattr(loop, "compile_step", compiled)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optim__learning_rate": 1}, ConfigError, r"'optim\.learning_rate' is unknown"),
        ({"model__d_modle": 8}, ConfigError, r"'model\.d_modle' is unknown; did you mean 'd_model'"),
        ({"batch__size": "many"}, ConfigError, r"'batch\.size' is 'many' \(str\); it must be int"),
        ({"train__steps": None, "train__max_seconds": 5}, ConfigError, "exactly one of steps, epochs and time_budget_s"),
        ({"train__time_budget_s": 5}, ConfigError,
         "section 'train': exactly one of .* must be set, and steps and time_budget_s is; set the others to null, such as"),
        ({"model__family": "mambo"}, ConfigError, r"'mambo' is unknown; did you mean 'mamba'"),
        ({"model__vocab_size": 256}, ConfigError, r"'model\.vocab_size' is 256 and the data in .* has 257 token ids"),
        ({"data__seq_len": 64}, DataError, r"'data\.seq_len' is 64 and the data in .* has rows of 32"),
        ({"model__family": "gpt2", "model__n_heads": 2, "model__n_positions": 16}, DataError,
         r"has rows of 32 tokens, and the model reads at most 16; prepare .* --seq-len 16, or set model\.n_positions=32"),
        ({"model__family": "gpt2", "model__n_heads": 2, "model__n_positions": 32, "sample__prompts": "[a, line]",
          "sample__max_new_tokens": 28}, ConfigError,
         r"'sample\.max_new_tokens' is 28; with the longest prompt, of 5 tokens .* the 32 positions .*max_new_tokens=27\."),
        ({"model__family": "gpt2", "model__n_heads": 2, "model__n_positions": 32, "sample__max_new_tokens": 1,
          "sample__prompts": f"[{'a' * 31}]"}, ConfigError,
         r"'sample\.max_new_tokens' is 1; with the longest prompt, of 32 tokens .*; shorten sample\.prompts\."),
        ({"model__family": "baka", "model__n_heads": 2, "model__chunk_boundary": "call", "data__joined": "true",
          "sample__prompts": "[a]"}, ConfigError,
         r"'sample\.prompts' is set and model\.chunk_boundary is 'call'.*Set sample\.prompts=\[\], or model\.chunk_boundary="),
        ({"model__family": "dense_retnet", "model__n_heads": 2, "model__dense_layers": 0,
          "model__score_normaliser": "sum_abs"}, ConfigError,
         r"'model\.score_normaliser' is 'sum_abs': such a model needs every sequence whole, .* Set it to null"),
        ({"data__path": "null"}, ConfigError, "section 'data': exactly one of path and mixture must be set"),
        ({"data__path": "/nowhere"}, DataError, r"/nowhere is not prepared data"),
        ({"batch__size": 12}, ConfigError, r"'batch\.size' is 12; .* mesh\.fsdp=8 .* choose a multiple of 8"),
        ({"batch__microbatches": 3}, ConfigError, "size 8 does not divide into 3 microbatches"),
        ({"batch__microbatches": 2}, ConfigError, r"batch\.microbatches=2; choose a multiple of 16"),
        ({"mesh__fsdp": 3}, ShardingError, r"data=1 x fsdp=3 .* does not fit 8 device\(s\)"),
        ({"mesh__fsdp": 1, "mesh__tensor": 8, "model__pad_vocab_size_multiple": 1}, ShardingError,
         r"embed/embedding: axis 'vocab' of size 257 does not divide over mesh\.tensor=8; .*pad_vocab_size_multiple"),
        ({"model__d_model": 12}, ShardingError, r"axis 'embed' of size 12 does not divide over mesh\.fsdp=8"),
        ({"mesh__sequence": 2}, ConfigError, r"mesh\.sequence is 2; only 1 works"),
        ({"optim__freeze": "[embde]"}, ConfigError, r"'optim\.freeze': 'embde' matches no parameter"),
        ({"checkpoint__keep": 0}, ConfigError, "keep must be at least 1"),
        ({"checkpoint__every": -1}, ConfigError, "every is -1; it must be a number of steps"),
        ({"eval__batches": 0}, ConfigError, "batches is 0; it must be at least 1, or null for all"),
        ({"sample__temperature": -1.0}, ConfigError, "temperature at least 0"),
        ({"sample__top_p": 0.0}, ConfigError, r"top_p is 0\.0; it must lie in \(0, 1\]"),
        ({"optim__lr": ".nan"}, ConfigError, "lr is nan; it must be above 0"),
        ({"optim__beta2": 1.5}, ConfigError, r"beta1 and beta2 must lie in \[0, 1\)"),
        ({"model__param_dtype": "bfloat16"}, ConfigError, r"Train with float32 parameters and set model\.dtype=bfloat16"),
    ],
)  # fmt: skip
def test_refused_before_anything_happens(
    run: Run, tmp_path: Path, changes: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_compilation")
def test_a_folder_with_something_else_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ConfigError, match="'output' is .*/run, which is not empty and not a run; choose another folder"
    ):
        run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="which is a file; choose a folder"):
        run()


def test_another_run_is_not_touched(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(train__steps=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"holds another run: model\.d_model is 8 there and 16 here; optim\.lr is 0\.01 there"
    ):
        run(train__steps=2, optim__lr=0.02, model__d_model=16)
    with pytest.raises(ConfigError, match=r"train\.steps is 2 there and 3 here\. .*train\.accept_changes=true"):
        run(train__steps=3)
    with pytest.raises(ConfigError, match=r"data\.seed is 0 there and 1 here; seed is 0 there and 1 here"):
        run(train__steps=2, seed=1, data__seed=1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(train__steps=2, log__every=2)["steps"] == 2
    assert run(train__steps=3, train__accept_changes="true")["steps"] == 3


def test_another_batch_size_goes_on_with_the_rows_that_were_not_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train__steps=2)
    started, batches = [], loop.batches

    def record(*arguments: Any, start_row: int, **options: Any) -> Any:
        started.append(start_row)
        return batches(*arguments, start_row=start_row, **options)

    monkeypatch.setattr(loop, "batches", record)
    run(train__steps=3, batch__size=16, train__accept_changes="true")
    run(train__steps=4, batch__size=8, train__accept_changes="true")
    assert started == [2 * 8, 2 * 8 + 16]


def test_data_that_changed_under_the_run_is_refused(run: Run, tmp_path: Path, data: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    run(train__steps=1, data__path=copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data\.content is '\w+' there and '\w+' here"):
        run(train__steps=1, data__path=copy)


def test_a_damaged_checkpoint_is_set_aside(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "run" / "checkpoints"
    run(train__steps=4)
    assert checkpoint.steps(root) == [2, 4]
    victim = max((root / "00000004" / "arrays" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    reader, _ = checkpoint.load_model(tmp_path / "run")
    assert reader.config.d_model == 8
    assert f"{victim} is damaged" in capsys.readouterr().err
    assert checkpoint.steps(root) == [2, 4]
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load_model(tmp_path / "run", step=4)
    assert run(train__steps=4)["finished"]
    assert f"{victim} is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in root.iterdir()) == ["00000002", "00000004", "00000004.damaged"]
    for step in (2, 4):
        (root / f"{step:08d}" / "MANIFEST.json").unlink()
    for attempt, damaged in (("first", 2), ("again", 3)):
        with pytest.raises(CheckpointError, match=rf"All {damaged} checkpoint\(s\) in .* are damaged"):
            run(train__steps=4)
        assert (tmp_path / "run" / "metrics.jsonl").read_text(), attempt


def test_load_model_says_what_is_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder with a checkpoint nor a checkpoint"):
        checkpoint.load_model(tmp_path / "run")
    run(train__steps=1)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; it has: 1"):
        checkpoint.load_model(tmp_path / "run", step=7)


def test_weights_that_do_not_fit_leave_the_folder_as_it_is(run: Run, tmp_path: Path) -> None:
    run(train__steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.yaml")}
    with pytest.raises(
        CheckpointError, match=r"embed/embedding is float32\[264, 8\] there and float32\[264, 16\] here"
    ):
        run(train__steps=1, model__d_model=16, train__accept_changes="true")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.yaml")} == before


def test_the_script_prints_one_line_and_fails(tmp_path: Path, overrides: Overrides) -> None:
    arguments = overrides(tmp_path / "run", optim__lrr=1)
    command = [sys.executable, "-m", "train.pretrain", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: Config key 'optim.lrr' is unknown; did you mean 'lr'?\n"
    assert not (tmp_path / "run").exists()
