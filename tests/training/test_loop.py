"""Whole runs on real files: what a run leaves, and that one which stopped and went on is the one that never stopped."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import ssm_jax
from ssm_jax import checkpoint, config, optim, sharding
from ssm_jax.data.mixture import Mixture
from ssm_jax.data.pipeline import evaluation_batches
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import Manifest, PackedDataset, Split, open_dataset
from ssm_jax.data.sources import TextFile
from ssm_jax.data.tokenizers import ByteTokenizer, SubwordTokenizer, load_tokenizer
from ssm_jax.errors import UserError
from ssm_jax.evaluation import evaluate_split
from ssm_jax.training import load_run_config, loop, low_rank, saving, train, validation
from ssm_jax.training import run as run_lib
from ssm_jax.training import state as state_lib
from ssm_jax.training.metrics import TIMES
from ssm_jax.training.progress import TrainingProgress
from ssm_jax.training.validation import scores
from tests.training.conftest import Overrides, Run, prepare_bytes
from train import evaluate as evaluate_script

REPOSITORY = Path(__file__).parents[2]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM comes when the metrics of ``step`` are read."""
    update = TrainingProgress.update

    def update_and_signal(self: TrainingProgress, row: dict[str, Any]) -> None:
        update(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingProgress, "update", update_and_signal)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times, and without a line that is being written."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def final_arrays(folder: Path) -> list[np.ndarray]:
    """Every array of the last checkpoint: parameters, moments, counts, key, carried state."""
    run = run_lib.prepare(load_run_config(folder / "config.yaml", []))
    spec = run.spec if saving.holds_low_rank_paths(folder) else None
    shapes = low_rank.stored_shapes(run.model, run.config, run.mesh, spec)
    restored = saving.restore(folder, *shapes, saving.lanes_of(run), spec)
    assert restored is not None
    assert not restored.changed
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in jax.tree.leaves(restored[:2])]


def is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_same_run(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    arrays_a, arrays_b = final_arrays(a), final_arrays(b)
    assert len(arrays_a) > 30
    for x, y in zip(arrays_a, arrays_b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def straight(overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(load_run_config(None, overrides(folder)))
    return folder


def test_a_run_leaves_everything_behind(straight: Path, data: Path) -> None:
    training = [row for row in rows(straight) if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["loss"] < training[0]["loss"]
    assert [row["step"] for row in rows(straight) if "eval/loss" in row] == [3, 6]
    assert checkpoint.steps(straight / "checkpoints") == [4, 6]
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["finished"]
    assert (summary["steps"], summary["total_steps"]) == (6, 6)
    assert summary["tokens"] == training[-1]["tokens"] <= 6 * 8 * 32
    model, params = checkpoint.load_model(straight)
    assert (
        summary["parameters"]
        == sum(leaf.size for leaf in jax.tree.leaves(params))
        == ssm_jax.count_parameters(model.config)
    )
    assert summary["memory"]["step_temp_bytes"] > 0
    assert load_tokenizer(straight / "tokenizer").fingerprint == load_tokenizer(data).fingerprint
    saved = config.read_yaml(straight / "config.yaml")
    assert saved["model"]["vocab_size"] == 257
    assert load_run_config(straight / "config.yaml", []).data.seq_len == 32


def test_evaluation_is_bits_per_byte_of_the_held_out_text(straight: Path, data: Path) -> None:

    held_out = open_dataset(data, "validation")
    model, params = checkpoint.load_model(straight)
    total = weight = 0.0
    for batch in itertools.islice(evaluation_batches(held_out, batch_size=8), 2):
        tokens, positions = jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"])
        logits, _ = model.apply({"params": params}, tokens, positions=positions)
        nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], 2)[..., 0]
        total += float(np.sum(nll * batch["weights"]))
        weight += float(np.sum(batch["weights"]))
    last = rows(straight)[-1]
    assert last["eval/loss"] == pytest.approx(total / weight, rel=1e-5)
    split = held_out.split
    assert last["eval/bits_per_byte"] == pytest.approx(
        total / weight / math.log(2) * split.targets / split.text_bytes, rel=1e-5
    )


def test_evaluation_runs_under_the_mesh(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training does: kernels divide their work over it."""
    run = run_lib.prepare(load_run_config(straight / "config.yaml", []))
    seen: list[tuple[str, ...]] = []

    def loss(*args: Any, carry: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        seen.append(jax.sharding.get_abstract_mesh().axis_names)
        return (jnp.ones(()), jnp.ones(())), carry

    monkeypatch.setattr(validation, "next_token_loss", loss)
    evaluate = validation.make_evaluation(run, run.model)
    assert evaluate is not None
    assert evaluate({}, {})["eval/loss"] == 1
    assert seen == [run.mesh.axis_names]


def test_load_model_onto_a_mesh(straight: Path) -> None:
    model, params = checkpoint.load_model(straight)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    wanted = sharding.shardings(params, mesh)
    same, placed = checkpoint.load_model(straight, step=6, shardings=wanted, dtype="bfloat16")
    assert (model.config.dtype, same.config.dtype) == ("float32", "bfloat16")
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == wanted
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_model(straight / "checkpoints" / "00000006")[1], params)


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_stopped_and_went_on_is_the_run_that_did_not(
    run: Run, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    stop_at(step, monkeypatch)
    assert not run()["finished"]
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stopped_at = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert step <= stopped_at < 6
    assert run()["finished"]
    assert_same_run(tmp_path / "run", straight)


KILLED_IN_A_SAVE = """
import os, signal, sys
from ssm_jax.checkpoint import manifest
write, saves = manifest.write, []
def write_or_die(*arguments):
    saves.append(arguments)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the arrays lie on disk, the manifest does not
    write(*arguments)
manifest.write = write_or_die
from train.pretrain import run
run(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def long_run(overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of ``LONG`` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("long") / "run"
    train(load_run_config(None, overrides(folder, **LONG)))
    return folder


LONG = {"train__steps": 150, "checkpoint__every": 40, "eval__every": 50}


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "SIGKILL in a save"])
def test_a_killed_process_goes_on_bit_for_bit(overrides: Overrides, tmp_path: Path, long_run: Path, how: str) -> None:
    folder = tmp_path / "killed"
    script = ["-c", KILLED_IN_A_SAVE] if "save" in how else ["-m", "train.pretrain"]

    def begin(script: list[str]) -> subprocess.Popen:
        command = [sys.executable, "-W", "error", *script, *overrides(folder, **LONG)]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process, metrics = begin(script), folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(rows(folder)) > 45):
        time.sleep(0.01)
    if "save" not in how:
        process.send_signal(getattr(signal, how))
    output, _ = process.communicate()
    saved = checkpoint.steps(folder / "checkpoints")
    if how == "SIGTERM":
        assert process.returncode == 0, output
        assert "the same command goes on" in output
    else:
        assert process.returncode == -signal.SIGKILL, output
    if "save" in how:
        assert saved == [40]
        assert list((folder / "checkpoints").glob("*.partial"))
    assert 40 <= saved[-1] < 150
    process = begin(["-m", "train.pretrain"])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"going on from step {saved[-1]}" in output
    assert list((folder / "checkpoints").glob("*.partial")) == []
    assert_same_run(folder, long_run)
    assert json.loads((folder / "summary.json").read_text())["finished"]


def test_a_run_killed_before_its_summary_writes_it_when_started_again(run: Run, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    again, before = run(), json.loads((straight / "summary.json").read_text())
    assert again["finished"]
    assert {key: again[key] for key in ("steps", "tokens", "eval/loss")} == {
        key: before[key] for key in ("steps", "tokens", "eval/loss")
    }
    assert rows(tmp_path / "run") == rows(straight)


def test_another_mesh_may_go_on(run: Run, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(3, monkeypatch)
    run()
    monkeypatch.undo()
    run(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    ours, theirs = rows(tmp_path / "run"), rows(straight)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert [a[key] for key in a if "loss" in key] == pytest.approx([b[key] for key in b if "loss" in key], rel=1e-5)


def test_nothing_compiles_and_nothing_piles_up_after_the_second_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update, compiled, alive = TrainingProgress.update, [], []

    def count(self: TrainingProgress, row: dict[str, Any]) -> None:
        update(self, row)
        compiled.append(sum("Finished XLA compilation" in record.message for record in caplog.records))
        alive.append(len(jax.live_arrays()))

    monkeypatch.setattr(TrainingProgress, "update", count)
    with jax.log_compiles():
        run(train__steps=12, eval__every=0, checkpoint__every=0)
    assert compiled[0] > 0
    assert len(set(compiled[1:])) == 1
    assert len(set(alive[1:-1])) == 1


def test_a_time_budget_decides_the_length_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"train__steps": None, "train__time_budget_s": 2.0}
    stop_at(1, monkeypatch)
    total = run(**settings)["total_steps"]
    assert total > 3
    monkeypatch.undo()
    monkeypatch.setattr(loop, "_steps_in_budget", lambda *_: pytest.fail("measured again"))
    ended = run(**settings)
    assert ended["finished"]
    assert ended["steps"] == total
    rates = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01], rel=1e-5)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-5)
    assert sorted(rates[2:], reverse=True) == rates[2:]


def test_max_seconds_ends_the_session_and_not_the_run(run: Run) -> None:
    assert run(train__max_seconds=1e-9)["steps"] == 0
    assert run()["finished"]


def test_gradients_that_stay_non_finite_stop_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = loop._rows

    def spoiled(*arguments: Any) -> Iterator[dict[str, np.ndarray]]:
        for step, row in enumerate(read(*arguments), start=1):
            yield {**row, "weights": row["weights"] + (np.inf if step > 2 else 0)}

    monkeypatch.setattr(loop, "_rows", spoiled)
    with pytest.raises(UserError, match=r"not finite in 11 updates in a row, up to step 13; lower optim\.lr"):
        run(train__steps=40, eval__every=0, checkpoint__every=0)
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["loss"] is None for row in logged] == [False] * 2 + [True] * 11
    assert len({row["param_norm"] for row in logged[1:]}) == 1


def test_microbatches_and_events_and_samples(run: Run, tmp_path: Path, straight: Path) -> None:
    run(
        batch__microbatches=2, mesh__fsdp=4, mesh__tensor=2, log__tensorboard="true", train__steps=6,
        sample__prompts="['line ', 'of']", sample__max_new_tokens=5, sample__every=3,
    )  # fmt: skip
    ours = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert ours == pytest.approx([row["loss"] for row in rows(straight) if "loss" in row], rel=1e-5)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [(3, "line "), (3, "of"), (6, "line "), (6, "of")]
    assert all(isinstance(row["text"], str) for row in samples)
    events = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"train/loss" in events
    assert b"eval/bits_per_byte" in events


def test_samples_fill_a_limited_context_and_come_after_the_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"model__family": "gpt2", "model__n_heads": 2, "model__n_positions": 32, "train__steps": 2}
    fields |= {"sample__prompts": "[line]", "sample__max_new_tokens": 27, "sample__every": 2, "checkpoint__every": 2}
    saved, write = [], loop.write_samples

    def spied(*arguments: Any) -> None:
        saved.append(checkpoint.steps(tmp_path / "run" / "checkpoints")[-1])
        write(*arguments)

    monkeypatch.setattr(loop, "write_samples", spied)
    run(**fields)
    assert saved == [2]
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [2]


def test_joined_rows_are_one_document_in_training_validation_and_evaluation(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(90):
        (tmp_path / f"{i}.txt").write_text(f"file {i} is short\n")
    files = [TextFile(path, path.name) for path in sorted(tmp_path.glob("*.txt"))]
    data = tmp_path / "data"
    prepare(files, data, ByteTokenizer(), Settings(seq_len=32, validation_percent=20.0))
    starts = next(iter(evaluation_batches(open_dataset(data, "validation"), batch_size=4)))["positions"] == 0
    assert starts[:, 1:].any(), "documents begin inside of rows"
    fields = {"data__path": data, "train__steps": 2, "eval__every": 0, "eval__batches": "null", "checkpoint__every": 1}
    for name, joined in (("apart", {}), ("joined", {"data__joined": "true"})):
        run(**fields, **joined, output=tmp_path / name)
    stop_at(1, monkeypatch)
    assert not run(**fields, data__joined="true")["finished"]
    monkeypatch.undo()
    assert run(**fields, data__joined="true")["finished"]
    assert_same_run(tmp_path / "run", tmp_path / "joined")
    identities = [config.read_yaml(tmp_path / name / "identity.yaml")["data"] for name in ("apart", "joined")]
    assert "joined" not in identities[0], "runs that were begun before there was the key go on"
    assert identities[1] == {**identities[0], "joined": True}
    with pytest.raises(UserError, match=r"holds another run: data\.joined is "):
        run(**fields, output=tmp_path / "joined")

    found = {}
    for name in ("apart", "joined"):
        capsys.readouterr()
        evaluate_script.run([str(tmp_path / name), "--no-baseline"])
        assert ("every row as one document" in capsys.readouterr().out) == (name == "joined")
        scores = json.loads((tmp_path / name / "eval.json").read_text())
        (last,) = [row["eval/loss"] for row in rows(tmp_path / name) if "eval/loss" in row]
        assert scores["rows"]["loss"] == pytest.approx(last, rel=1e-6)
        assert scores.get("joined", False) == (name == "joined")
        found[name] = last
    assert found["apart"] != pytest.approx(found["joined"], rel=1e-5)
    model, params = checkpoint.load_model(tmp_path / "joined")
    held_out = open_dataset(data, "validation")
    joined_loss, apart_loss = (evaluate_split(model, params, held_out, 4, joined)["loss"] for joined in (True, False))
    assert joined_loss == pytest.approx(found["joined"], rel=1e-6)
    assert apart_loss != pytest.approx(joined_loss, rel=1e-6)


def test_frozen_parameters_stay_and_come_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(2, monkeypatch)
    run(optim__freeze="[embed]")
    monkeypatch.undo()
    summary = run(optim__freeze="[embed]")
    _, params = checkpoint.load_model(tmp_path / "run")
    first = state_lib.create(
        jax.random.key(0), jnp.int32(1), model=ssm_jax.build("mamba", vocab_size=257, d_model=8, n_layers=1),
        config=optim.OptimConfig(freeze=("embed",)),
    )[1]  # fmt: skip
    np.testing.assert_allclose(params["embed"]["embedding"], first["embed"]["embedding"], rtol=1e-6)
    assert summary["parameters"] - summary["trainable_parameters"] == params["embed"]["embedding"].size


def arrays(folder: Path) -> dict[str, np.ndarray]:
    params = checkpoint.load_model(folder)[1]
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_fine_tuning_from_a_folder_of_weights(run: Run, straight: Path, tmp_path: Path) -> None:
    model, params = ssm_jax.from_pretrained(straight)
    tokenizer = load_tokenizer(straight / "tokenizer")
    for layout in ("transformers", "mamba_ssm", "ssm_jax"):
        ssm_jax.save_pretrained(model, params, tmp_path / layout, layout=layout, tokenizer=tokenizer)
    fields = {"model__family": None, "model__d_model": None, "model__n_layers": None, "optim__warmup_steps": 0}
    for source in (straight, *(tmp_path / name for name in ("transformers", "mamba_ssm", "ssm_jax"))):
        folder = tmp_path / f"from_{source.name}"
        ended = run(**fields, output=folder, init_from=source, train__steps=1, optim__freeze="[embed, mixer]")
        assert ended["trainable_parameters"] == 8 + 8
        before, after = arrays(straight), arrays(folder)
        for name in before:
            assert np.array_equal(before[name], after[name]) == ("norm" not in name), (source, name)
    shutil.rmtree(source)  # a run that has begun needs what it began with no more
    again = {**fields, "output": folder, "init_from": source, "optim__freeze": "[embed, mixer]"}
    assert run(**again, train__steps=1)["finished"]
    assert run(**again, train__steps=2, train__accept_changes="true")["steps"] == 2


def test_frozen_parameters_of_another_start_are_not_taken_for_this_one(run: Run, tmp_path: Path) -> None:
    changes = {"optim__freeze": "[embed]", "train__steps": 2}
    run(**changes, output=tmp_path / "a")
    run(**changes, output=tmp_path / "b", seed=1)
    frozen = [tmp_path / name / "checkpoints/frozen" for name in "ab"]
    shutil.rmtree(frozen[0])
    shutil.copytree(frozen[1], frozen[0])
    with pytest.raises(UserError, match="holds other frozen parameters than checkpoint"):
        checkpoint.load_model(tmp_path / "a")
    with pytest.raises(UserError, match="holds other frozen parameters than checkpoint"):
        run(**changes, output=tmp_path / "a")
    shutil.rmtree(tmp_path / "a/checkpoints/00000002")  # nothing but frozen leaves of another start
    run(**changes, output=tmp_path / "a")
    assert not np.array_equal(*(arrays(tmp_path / name)["embed/embedding"] for name in "ab"))


def test_bits_per_byte_of_a_mixture_lie_between_those_of_its_corpora() -> None:
    def corpus(targets: int, text_bytes: int) -> PackedDataset:
        split = Split(documents=0, tokens=targets, rows=1, text_bytes=text_bytes, shards=())
        manifest = Manifest(seq_len=8, vocab_size=9, token_dtype="uint8", tokenizer={}, splits={"validation": split})
        return PackedDataset(Path("nowhere"), "validation", manifest)

    large, small = corpus(10**8, 450_000_000), corpus(10**6, 2_000_000)
    sums = [(3.0 * 1000, 1000.0), (1.5 * 1000, 1000.0)]
    each = [scores([part], Mixture((data,), (1.0,))) for part, data in zip(sums, (large, small), strict=True)]
    both = scores(sums, Mixture((large, small), (0.5, 0.5)))
    bits = [part["eval/bits_per_byte"] for part in each]
    assert bits == pytest.approx([3.0 / math.log(2) / 4.5, 1.5 / math.log(2) / 2.0])
    assert min(bits) < both["eval/bits_per_byte"] < max(bits)
    assert both["eval/loss"] == pytest.approx(2.25)


def test_weights_that_do_not_fit_are_refused_before_anything_compiles(
    run: Run, straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("compiled"))
    fields = {"model__family": None, "model__n_layers": None}
    with pytest.raises(
        UserError, match=r"Config key 'init_from': parameter .* is \(264, 8\) in .* and \(264, 16\) in this run's model"
    ):
        run(**fields, model__d_model=16, init_from=straight)
    with pytest.raises(UserError, match=r"Config key 'init_from': .*nowhere"):
        run(**fields, model__d_model=None, init_from=tmp_path / "nowhere")
    small, params = ssm_jax.from_pretrained(straight)
    ssm_jax.save_pretrained(small, params, tmp_path / "other", tokenizer=subword_tokenizer())
    with pytest.raises(UserError, match=r"prepared with another tokenizer than that of init_from="):
        run(**fields, model__d_model=None, init_from=tmp_path / "other")
    assert not (tmp_path / "run").exists()


def subword_tokenizer() -> SubwordTokenizer:
    names = {"<|endoftext|>": 0, "a": 1, "b": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="a"))
    model.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(model.to_str(), 0)


def test_a_mixture_reads_its_corpora_by_weight_and_resumes(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    other = prepare_bytes(tmp_path / "b", "other", word="LINE")
    corpora = f"[{{path: {data}, weight: 3}}, {{path: {other}, weight: 1}}]"
    mixed = {"data__path": None, "data__mixture": corpora, "output": tmp_path / "mixed"}
    assert run(**mixed)["finished"]
    evaluations = [row for row in rows(tmp_path / "mixed") if "eval/loss" in row]
    last = evaluations[-1]
    assert data.name != other.name
    assert last[f"eval/{data.name}/loss"] != last[f"eval/{other.name}/loss"]
    assert min(last[f"eval/{p.name}/loss"] for p in (data, other)) < last["eval/loss"]
    stop_at(3, monkeypatch)
    run(**{**mixed, "output": tmp_path / "stopped"})
    monkeypatch.undo()
    run(**{**mixed, "output": tmp_path / "stopped"})
    assert_same_run(tmp_path / "mixed", tmp_path / "stopped")
    with pytest.raises(UserError, match=r"data\.content is .* there"):
        run(**{**mixed, "data__mixture": corpora.replace("weight: 3", "weight: 2")})


def test_a_moving_average_is_kept_evaluated_and_exported(run: Run, straight: Path, tmp_path: Path) -> None:
    """The same updates as without it; what is exported is the average of the parameters after each of them."""
    every = {"checkpoint__every": 1, "checkpoint__keep": "null"}
    run(**every, output=tmp_path / "plain")
    run(**every, output=tmp_path / "averaged", optim__ema=0.5)
    plain = [arrays(tmp_path / f"plain/checkpoints/{step:08d}") for step in range(1, 7)]
    for name in plain[0]:
        state = state_lib.initialize(*_model_and_optimizer(tmp_path / "plain"), 0, 6)[0]
        average = dict(zip(optim.partition.paths(state.params), jax.tree.leaves(state.params), strict=True))[name]
        for step, params in enumerate(plain):
            d = min(0.5, (1 + step) / (10 + step))
            average = d * average + (1 - d) * params[name]
        np.testing.assert_allclose(arrays(tmp_path / "averaged")[name], average, rtol=1e-5, atol=1e-7)
    losses = {name: [row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "averaged")}
    assert losses["plain"] == losses["averaged"]
    scores = [next(row for row in rows(tmp_path / name) if "eval/loss" in row) for name in ("plain", "averaged")]
    assert scores[0]["eval/loss"] != scores[1]["eval/loss"]


def _model_and_optimizer(folder: Path) -> tuple[Any, ...]:
    run = run_lib.prepare(load_run_config(folder / "config.yaml", []))
    return run.model, run.config.optim, run.mesh


def test_dropout_is_drawn_anew_and_the_same_after_a_resume(
    run: Run, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model__dropout": 0.3, "optim__ema": 0.9, "optim__freeze": "[norm_f]"}
    run(**changes, output=tmp_path / "whole")
    assert rows(tmp_path / "whole")[0]["loss"] != rows(straight)[0]["loss"]
    stop_at(3, monkeypatch)
    run(**changes, output=tmp_path / "stopped")
    monkeypatch.undo()
    run(**changes, output=tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_epochs_are_steps_and_some_checkpoints_stay(run: Run, data: Path, tmp_path: Path) -> None:
    per_epoch = -(-open_dataset(data).rows // 8)
    ended = run(train__steps=None, train__epochs=1.5, checkpoint__every=1, checkpoint__keep=1, checkpoint__keep_every=4)
    assert ended["steps"] == math.ceil(1.5 * open_dataset(data).rows / 8) > per_epoch
    expected = [step for step in range(1, ended["steps"]) if step % 4 == 0] + [ended["steps"]]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == sorted(set(expected))


def test_a_trace_of_the_steps_asked_for(run: Run, tmp_path: Path) -> None:
    run(train__profile="[2, 3]")
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_weights_and_biases_gets_the_same_rows(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType("wandb")
    tracker = types.SimpleNamespace(
        log=lambda row, step: calls.append((step, row)), finish=lambda exit_code: calls.append(("finish", exit_code))
    )
    fake.init = lambda **options: calls.append(options) or tracker
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(log__wandb="books")
    assert calls[0]["project"] == "books"
    assert calls[0]["config"]["train"]["steps"] == 6
    assert calls[-1] == ("finish", 0)
    logged = [(step, row["train/loss"]) for step, row in calls[1:-1] if "train/loss" in row]
    assert logged == [(row["step"], row["loss"]) for row in rows(tmp_path / "run") if "loss" in row]
    first = calls[0]["id"]
    run(log__wandb="books", train__steps=7, train__accept_changes="true")
    assert next(call["id"] for call in calls[1:] if isinstance(call, dict)) == first, "the run that goes on"
    shutil.rmtree(tmp_path / "run")
    run(log__wandb="books")
    assert [call["id"] for call in calls if isinstance(call, dict)][-1] != first, "another run in its place"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"'log\.wandb' is set and the package 'wandb' is not installed; pip install wandb"
    ):
        run(log__wandb="books", output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_rows_say_where_the_time_went(straight: Path) -> None:
    times = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for row in times:
        if "loss" in row:
            assert 0 <= row["data_s"] + row["wait_s"] <= row["step_s"]
            assert row["model_tflops_per_s"] > 0
            assert "mfu" not in row, "what this CPU can do is not known"


def test_a_full_disk_during_a_save_is_named_and_costs_nothing(overrides: Overrides, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: a real process meets a real error of the file system."""
    changes = {"train__steps": 6, "checkpoint__every": 2, "eval__every": 0}
    train(load_run_config(None, overrides(tmp_path / "straight", **changes)))
    program = """
import resource, sys
from ssm_jax import checkpoint
save, saves = checkpoint.save, []
def limited(*arguments):
    saves.append(arguments)
    if len(saves) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
    return save(*arguments)
checkpoint.save = limited
from ssm_jax.config import main
from train.pretrain import run
main(run)
"""
    folder = tmp_path / "full"
    ended = subprocess.run(
        [sys.executable, "-c", program, *overrides(folder, **changes)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert re.search(
        r"error: Checkpoint .* could not be written \(.*\); earlier checkpoints are untouched\.", ended.stderr
    )
    assert checkpoint.steps(folder / "checkpoints") == [2]
    train(load_run_config(None, overrides(folder, **changes)))
    assert_same_run(folder, tmp_path / "straight")
