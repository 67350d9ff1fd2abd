"""Runs with ReLoRA: the warm start, the merges and the low-rank paths between them, stopped anywhere, on any mesh."""

import functools
import gc
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax import checkpoint, optim, sharding
from ssm_jax.errors import ConfigError, UserError
from ssm_jax.optim import relora
from ssm_jax.optim.relora.trees import flat
from ssm_jax.training import load_run_config, loop, low_rank, saving, train, validation
from ssm_jax.training import run as run_lib
from tests.training.conftest import Overrides, Run
from tests.training.test_loop import assert_same_run, rows

STEPS, WARM, CYCLE = 8, 2, 2
RELORA: dict[str, Any] = {
    "train__steps": STEPS,
    "optim__relora__rank": 2,
    "optim__relora__cycle": CYCLE,
    "optim__relora__warm_start": WARM,
    "optim__relora__rewarmup": 1,
    "optim__relora__lr": 0.02,
    "optim__freeze": "[^norm_f/]",
    "checkpoint__every": 1,
    "checkpoint__keep": "null",
}
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"optim__relora__frozen_dtype": "bfloat16"},
    "master": {"optim__relora__frozen_dtype": "bfloat16", "optim__relora__master": "true"},
}


@pytest.fixture(scope="module")
def undisturbed(overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each form that nothing disturbed, made when it is first asked for."""

    @functools.cache
    def of_form(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "run"
        train(load_run_config(None, overrides(folder, **RELORA, **FORMS[name])))
        return folder

    return of_form


@pytest.fixture(params=FORMS)
def straight(request: pytest.FixtureRequest, undisturbed: Callable[[str], Path]) -> Path:
    return undisturbed(request.param)


@pytest.fixture(scope="module")
def plain(overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run at full rank."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    fields = {key: value for key, value in RELORA.items() if "relora" not in key}
    train(load_run_config(None, overrides(folder, **fields)))
    return folder


def test_full_rank_first_then_cycles_whose_rate_rises_anew(straight: Path, plain: Path) -> None:
    ours, theirs = ([row for row in rows(folder) if "loss" in row] for folder in (straight, plain))
    assert ours[:WARM] == theirs[:WARM]
    assert ours[WARM]["loss"] == pytest.approx(theirs[WARM]["loss"], rel=1e-6 if form(straight) == "float32" else 1e-3)
    rates = [row["lr"] for row in theirs[:WARM]] + [2 * row["lr"] for row in theirs[WARM:]]
    rates[2::CYCLE] = [0.0, 0.0, 0.0]
    assert [row["lr"] for row in ours] == pytest.approx(rates)
    merges = [row for row in rows(straight) if "relora/merges" in row]
    assert [(row["step"], row["relora/merges"]) for row in merges] == [(5, 1), (7, 2)]
    assert all(row["relora/state_zeroed"] == 1 and row["relora/merged_norm"] > 0 for row in merges)
    summary = json.loads((straight / "summary.json").read_text())
    assert (summary["merges"], summary["finished"]) == (2, True)
    assert summary["parameters"] == json.loads((plain / "summary.json").read_text())["parameters"]
    assert summary["trainable_parameters"] == summary["parameters"] - 8 - 8 * 32 - 16 * 8 + 2 * (8 + 32) + 2 * (16 + 8)


def form(folder: Path) -> str:
    """Which of ``FORMS``."""
    settings = load_run_config(folder / "config.yaml", []).optim.relora
    assert settings is not None
    return "master" if settings.master else settings.frozen_dtype or "float32"


def test_it_is_the_recipe_of_the_library_applied_by_hand(straight: Path) -> None:
    """From the full-rank checkpoint on: split, AdamW, merges, in a loop of a few lines."""
    run = run_lib.prepare(load_run_config(straight / "config.yaml", []))
    settings = run.config.optim.relora
    assert settings is not None
    assert run.spec is not None
    spec, optimizer = run.spec, relora.make_optimizer(run.config.optim, run.spec)
    model, params = checkpoint.load_model(straight, WARM)
    wrapped = relora.wrap(model, spec)
    key = jax.random.split(jax.random.key(run.config.seed))[1]
    trained, constant = optim.split(params, run.config.optim.freeze)
    kernels, trainable = relora.init(trained, spec, key=low_rank.state_lib.restart_key(key, 0))
    master, frozen = (
        kernels,
        kernels if settings.frozen_dtype is None else jax.tree.map(lambda w: w.astype("bfloat16"), kernels),
    )
    opt_state = optimizer.init(trainable)

    @jax.jit
    def update(trainable: Any, frozen: Any, opt_state: Any, batch: Any, lr: Any) -> Any:
        def loss(trainable: Any) -> Any:
            whole = relora.combine(relora.combine(trainable, frozen), constant)
            logits, _ = wrapped.apply({"params": whole}, batch["tokens"], positions=batch["positions"])
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], 2)[..., 0]
            return jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])

        updates, opt_state = optimizer.update(jax.grad(loss)(trainable), opt_state, trainable, learning_rate=lr)
        return jax.tree.map(jnp.add, trainable, updates), opt_state

    lr = [row["lr"] for row in rows(straight) if "loss" in row]
    batches = loop._rows(run, WARM * run.config.batch.size)
    for step in range(WARM, STEPS):
        if step in (4, 6):
            merge_key = low_rank.state_lib.restart_key(key, (step - WARM) // CYCLE)
            if settings.master:
                master, frozen, trainable, opt_state, _ = relora.merge_with_master(
                    master, frozen, trainable, opt_state, merge_key, spec=spec, donate=False
                )
            else:
                frozen, trainable, opt_state, _ = relora.merge_and_reset(
                    frozen, trainable, opt_state, merge_key, spec=spec, donate=False
                )
        trainable, opt_state = update(trainable, frozen, opt_state, next(batches), jnp.float32(lr[step]))
    found = checkpoint.load_model(straight)[1]
    ours = optim.merge(relora.export(master if settings.master else frozen, trainable, spec), constant)
    assert flat(found).keys() == flat(ours).keys()
    for path, leaf in flat(ours).items():
        np.testing.assert_allclose(flat(found)[path], leaf, rtol=2e-4, atol=2e-6, err_msg=path)


KILLED = [
    ("float32", 1),
    ("float32", WARM),
    ("float32", 3),
    ("float32", 4),
    ("float32", 5),
    ("bfloat16", 4),
    ("master", 4),
]


@pytest.mark.parametrize(("straight", "step"), KILLED, indirect=["straight"])
def test_killed_anywhere_and_resumed_it_is_the_same_run(
    straight: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the warm start, at its end, within a cycle, just before a merge (4) and just after it; bit for bit. And where kernels were
    read in float32, to be rounded, none of these outlives that."""
    restore, save = saving.restore, saving.save
    kernels: list[weakref.ref] = []

    def restored(*args: Any) -> Any:
        found = restore(*args)
        assert found is not None
        kernels.extend(weakref.ref(leaf) for path, leaf in flat(found.frozen).items() if path.endswith("proj/kernel"))
        return found

    def saved(*args: Any) -> Path:
        gc.collect()
        assert form(straight) != "master" or not any(kernel() for kernel in kernels)
        return save(*args)

    monkeypatch.setattr(saving, "restore", restored)
    monkeypatch.setattr(saving, "save", saved)
    shutil.copytree(straight, tmp_path / "run")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{later:08d}")
    (tmp_path / "run" / "summary.json").unlink()
    train(load_run_config(tmp_path / "run" / "config.yaml", [f"output={tmp_path / 'run'}"]))
    assert len(kernels) == (2 if step > WARM else 0)
    assert_same_run(straight, tmp_path / "run")


def test_what_is_read_samples_and_evaluates_is_one_function(straight: Path) -> None:
    """``load_model`` merges the low-rank paths: the same parameters as for samples, the same loss as the run's own evaluation."""
    run = run_lib.prepare(load_run_config(straight / "config.yaml", []))
    shapes = low_rank.stored_shapes(run.model, run.config, run.mesh, run.spec)
    restored = saving.restore(straight, *shapes, spec=run.spec)
    assert restored is not None
    frozen, _ = low_rank.rounded(restored.frozen, run.config.optim, run.spec)
    model, params = checkpoint.load_model(straight)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, low_rank.abstract_params(model))
    precise = 1e-6 if form(straight) == "float32" else 1e-2
    for path, leaf in flat(low_rank.whole_params(restored.state, frozen, run.spec)).items():
        np.testing.assert_allclose(leaf, flat(params)[path], rtol=precise, atol=precise)
    evaluate = validation.make_evaluation(run, model)
    assert evaluate is not None
    wanted = sharding.shardings(jax.eval_shape(lambda: params), run.mesh)
    _, placed = checkpoint.load_model(straight, shardings=wanted)
    last = [row for row in rows(straight) if "eval/loss" in row][-1]
    assert evaluate(placed, {})["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6 if precise < 1e-3 else 1e-4)


@pytest.mark.parametrize("straight", ["float32"], indirect=True)
def test_the_mesh_changes_nothing(straight: Path, run: Run, tmp_path: Path) -> None:
    run(**RELORA, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    ours, theirs = ([row["loss"] for row in rows(folder) if "loss" in row] for folder in (tmp_path / "run", straight))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(checkpoint.load_model(f)[1]) for f in (tmp_path / "run", straight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_from_the_first_step_on_over_microbatches_and_beside_frozen_embeddings(run: Run, tmp_path: Path) -> None:
    """A family whose updates derive leaves from the parameters."""
    fields = {"model__family": "gss", "model__dss_kernel_N": 4, "model__dss_kernel_H": 8}
    fields |= {
        **RELORA,
        "optim__freeze": "[^embed/]",
        "train__steps": 4,
        "optim__relora__warm_start": 0,
        "optim__relora__select": "[out_proj]",
    }
    for parts in (1, 2):
        run(**fields, batch__size=16, batch__microbatches=parts, output=tmp_path / str(parts))
    ours, theirs = ([row["loss"] for row in rows(tmp_path / f) if "loss" in row] for f in "12")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert [row["step"] for row in rows(tmp_path / "1") if "relora/merges" in row] == [3]
    kernels = checkpoint.store.read_info(tmp_path / "1" / "checkpoints" / "00000004")["relora"]["kernels"]
    assert list(kernels) == ["layers/mixer/out_proj/kernel"]
    first, last = (flat(checkpoint.load_model(tmp_path / "1", step)[1]) for step in (1, 4))
    np.testing.assert_array_equal(first["embed/embedding"], last["embed/embedding"])
    assert np.any(first["layers/mixer/out_proj/kernel"] != last["layers/mixer/out_proj/kernel"])


def test_a_teacher_teaches_low_rank_paths(plain: Path, run: Run, tmp_path: Path) -> None:
    """They are in the function whose distance from the teacher's falls, beside embeddings that are the teacher's."""
    fields = {
        **RELORA,
        "optim__relora__warm_start": 0,
        "train__steps": 2,
        "optim__freeze": "[^embed/]",
        "eval__every": 0,
    }
    run(**fields, distill__teacher=plain, distill__mode="mix", distill__weight=1.0, distill__copy_embeddings="true")
    assert all(math.isfinite(row["kl"]) for row in rows(tmp_path / "run") if "loss" in row)
    first, last, teacher = (
        flat(checkpoint.load_model(*each)[1]) for each in ((tmp_path / "run", 1), (tmp_path / "run", 2), (plain,))
    )
    np.testing.assert_array_equal(last["embed/embedding"], teacher["embed/embedding"])
    assert np.any(first["layers/mixer/out_proj/kernel"] != last["layers/mixer/out_proj/kernel"])


def test_a_longer_run_merges_where_the_shorter_one_ended(run: Run, tmp_path: Path) -> None:
    fields = {**RELORA, "optim__relora__warm_start": 0, "optim__relora__rewarmup": 0, "eval__every": 0}
    run(**{**fields, "train__steps": 2})
    assert not [row for row in rows(tmp_path / "run") if "relora/merges" in row]
    run(**{**fields, "train__steps": 4, "train__accept_changes": "true"})
    assert [row["step"] for row in rows(tmp_path / "run") if "relora/merges" in row] == [3]


def test_weights_of_a_full_rank_run_are_a_warm_start_too(plain: Path, run: Run, tmp_path: Path) -> None:
    fields = {
        **RELORA,
        "optim__relora__warm_start": 0,
        "model__family": None,
        "model__d_model": None,
        "model__n_layers": None,
        "train__steps": 2,
    }
    run(**fields, init_from=plain)
    params, before = (checkpoint.load_model(folder)[1] for folder in (tmp_path / "run", plain))
    assert jax.tree.structure(params) == jax.tree.structure(before)
    assert rows(tmp_path / "run")[0]["loss"] < rows(plain)[0]["loss"] - 0.1


def test_the_host_asks_the_device_only_where_a_merge_could_be_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the first six updates are skipped: the merge waits for four applied ones, and the next for four more."""
    config = optim.ReLoRAConfig(cycle=4, rewarmup=0)
    skipped = {2, 5}
    asked: list[int] = []
    monkeypatch.setattr(
        relora, "applied_updates", lambda done: asked.append(done) or done - len([s for s in skipped if s < done])
    )
    cadence, merged, merges = low_rank.Cadence(config), [], 0
    for done in range(14):
        state = low_rank.TrainState(params=None, opt_state=done, step=None, total_steps=None, key=None, merges=merges)
        if cadence.before(done, state) == "merge":
            merges += 1
            merged.append(done)
    # Four are applied after five, as the sixth comes to nothing; of the next four that one is none.
    assert merged == [5, 10]
    assert asked == [0, 4, 5, 9, 10]
    never = low_rank.Cadence(optim.ReLoRAConfig(cycle=None))
    assert {never.before(done, state) for done in range(20)} == {None}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a selection that matches nothing": ({"select": "[attention]"}, "'attention' matches none of the 2 kernels"),
    "a rank above the width": ({"rank": 9}, "rank is 9, above the width of layers/mixer/in_proj/kernel"),
    "a cycle that does not divide": (
        {"cycle": 4},
        "does not divide the 6 updates after the warm start of 2; set train.steps=10",
    ),
    "a warm start as long as the run": (
        {"warm_start": 8},
        "'optim.relora.warm_start' is 8, and the whole run has 8 updates",
    ),
    "no cycle": ({"cycle": None}, "'optim.relora.cycle' is required"),
    "a re-warm-up as long as the cycle": ({"rewarmup": 2}, "lower rewarmup to at most 1"),
    "a master of float32": ({"master": "true"}, "drop master"),
    "a share that zero does not keep": ({"keep": 0.5}, "Reset 'zero' keeps what it keeps"),
    "moments that are not there": ({"carry_moments": "true", "warm_start": 0}, "drop carry_moments"),
    "an unknown type": ({"frozen_dtype": "int8"}, "frozen_dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_anything_is_written(case: str, run: Run, tmp_path: Path) -> None:
    changes, message = BAD[case]
    fields = {**RELORA, **{f"optim__relora__{key}": value for key, value in changes.items()}}
    with pytest.raises(UserError, match=re.escape(message)):
        run(**fields)
    assert not (tmp_path / "run").exists()


def test_an_average_and_a_time_budget_with_a_warm_start_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ema is 0.9 and relora is set"):
        run(**RELORA, optim__ema=0.9)
    with pytest.raises(ConfigError, match="'train.time_budget_s' are both set"):
        run(**{**RELORA, "train__steps": None}, train__time_budget_s=1)
    assert not (tmp_path / "run").exists()


def test_a_budget_of_time_is_whole_cycles(run: Run) -> None:
    fields = {
        **RELORA,
        "checkpoint__every": 0,
        "optim__relora__warm_start": 0,
        "train__steps": None,
        "optim__relora__cycle": 3,
    }
    summary = run(**fields, train__time_budget_s=0.05)
    assert summary["steps"] % 3 == 0
    assert summary["steps"] > 0


@pytest.mark.parametrize("straight", ["float32"], indirect=True)
def test_going_on_with_other_low_rank_paths_is_refused_and_loses_nothing(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    common = [f"output={folder}", "train.steps=10", "train.accept_changes=true"]
    with pytest.raises(ConfigError, match="rank is 3, and the stored adapters have 2"):
        train(load_run_config(folder / "config.yaml", [*common, "optim.relora.rank=3"]))
    with pytest.raises(ConfigError, match="holds low-rank paths of rank 2, and config section 'optim.relora' is null"):
        train(load_run_config(folder / "config.yaml", [*common, "optim.relora=null"]))
    with pytest.raises(ConfigError, match="cycle' is 4, and this run had 2 merges in 6 updates; go on with the cycle"):
        train(load_run_config(folder / "config.yaml", [*common, "optim.relora.cycle=4"]))
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    assert math.isfinite(rows(folder)[-1]["eval/loss"])
