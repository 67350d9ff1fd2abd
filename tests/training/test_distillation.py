"""Learning from a teacher: its part of the loss, the order of the turns, what stays fixed, and whole runs that stop and go on."""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

import ssm_jax
import train.pretrain
from ssm_jax import checkpoint, optim, sharding
from ssm_jax.config import read_yaml
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.errors import ConfigError, DataError, LayoutError, ShardingError, UserError
from ssm_jax.interop import from_pretrained
from ssm_jax.models import LanguageModel
from ssm_jax.optim import OptimConfig
from ssm_jax.sharding import MeshConfig
from ssm_jax.training import distillation, loop
from ssm_jax.training import state as state_lib
from ssm_jax.training.config import DistillConfig
from ssm_jax.training.step import abstract_batch, compile_step, make_step
from ssm_jax.training.teacher import with_tables
from ssm_jax.typing import Params
from tests.conformance.compare import assert_trees_close
from tests.conformance.jaxpr import array_sizes
from tests.interop.folders import random_params
from tests.training.conftest import Overrides, Run
from tests.training.test_loop import arrays, assert_same_run, rows, stop_at, subword_tokenizer
from tests.training.test_processes import assert_close_runs, finish, launch

VOCAB, LANES, LENGTH = 29, 12, 6
PLAIN = OptimConfig(lr=1e-4, schedule="constant", clip_norm=None)
"""Small steps: after one of 1e-2 the last bit of a parameter moves the gradient by 4e-4 of its largest entry."""


@functools.cache
def student() -> LanguageModel:
    return ssm_jax.build("mamba", vocab_size=VOCAB, d_model=8, n_layers=1, d_state=4)


@functools.cache
def teacher() -> tuple[LanguageModel, Params]:
    """Wider than the student, of another family, and with more rows after the last token."""
    model = ssm_jax.build(
        "mamba2", vocab_size=VOCAB, d_model=24, n_layers=1, d_state=4, headdim=6, pad_vocab_size_multiple=40
    )
    return model, jax.tree.map(lambda x: 0.5 * x, random_params(model, seed=1))


def batch(seed: int) -> dict[str, jax.Array]:
    """Two documents per row, uneven weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (LANES, LENGTH + 1), dtype=np.int32)
    positions = np.tile(np.r_[np.arange(2), np.arange(LENGTH - 2)].astype(np.int32), (LANES, 1))
    weights = (rng.random((LANES, LENGTH)) < 0.7).astype(np.float32)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "weights": weights}
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def distill(**fields: Any) -> DistillConfig:
    return DistillConfig(teacher="unused", **fields)


@functools.partial(jax.jit, static_argnames="temperature")
def by_hand(
    params: Params, batch: Mapping[str, jax.Array], share: Mapping[str, Any], temperature: float = 1.0
) -> tuple[dict[str, jax.Array], Params]:
    """The weighted sums of share * CE and share * KL, from whole logits, and the gradient of both together; shares are [B, 1] or
    numbers. Rows after the last token have a part in CE only."""

    def sums(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        ours, theirs = (
            model.apply({"params": each}, batch["tokens"], positions=batch["positions"])[0]
            for model, each in ((student(), params), teacher())
        )
        ce = -jnp.take_along_axis(jax.nn.log_softmax(ours), batch["targets"][..., None], axis=-1)[..., 0]
        log_p, log_q = (jax.nn.log_softmax(x[..., :VOCAB] / temperature) for x in (theirs, ours))
        kl = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        found = {name: jnp.sum(batch["weights"] * share[name] * x) for name, x in (("ce", ce), ("kl", kl))}
        return found["ce"] + found["kl"], found

    (_, found), gradient = jax.value_and_grad(sums, has_aux=True)(params)
    return found, gradient


@functools.cache
def student_params() -> Params:
    return random_params(student(), seed=2)


def evaluated(config: DistillConfig, taught_by: Any = None) -> tuple[Any, Any]:
    """(sums, gradient) of an objective over one batch."""
    model, params = taught_by or teacher()
    objective = jax.jit(distillation.make_objective(student(), model, config))
    fixed = distillation.fixed({}, params)
    sums, gradient, carry = objective(student_params(), fixed, batch(0), jax.random.key(0), jnp.int32(0))
    assert carry is None
    return sums, gradient


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    sums, gradient = evaluated(distill(mode="mix", weight=1.0), taught_by=(student(), student_params()))
    weight = batch(0)["weights"].sum()
    assert abs(float(sums["kl"][0]) / weight) < 1e-6
    _, towards_data = evaluated(distill(mode="mix", weight=0.0), taught_by=(student(), student_params()))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(towards_data))
    assert all(float(jnp.abs(x).max()) < 3e-6 * largest for x in jax.tree.leaves(gradient))
    assert float(sums["ce"][0]) / weight > 0.1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mixture_is_the_mixture_of_both(temperature: float) -> None:
    sums, gradient = evaluated(distill(mode="mix", weight=0.3, temperature=temperature))
    shares = {"ce": 0.7, "kl": 0.3}
    expected, expected_gradient = by_hand(student_params(), batch(0), shares, temperature)
    weight = float(batch(0)["weights"].sum())
    assert {name: float(w) for name, (_, w) in sums.items()} == {"loss": weight, "ce": weight, "kl": weight}
    got = {name: float(total) for name, (total, _) in sums.items()}
    each = {name: float(x) / shares[name] for name, x in expected.items()}
    assert got == pytest.approx({"loss": float(expected["ce"] + expected["kl"]), **each}, rel=1e-5)
    assert_trees_close(gradient, expected_gradient, 1e-4, relative=True)


@pytest.mark.parametrize(
    ("unit", "microbatches", "turns"),
    [
        ("microbatch", 1, ["c", "k", "c"]),
        ("microbatch", 2, ["ck", "ck"]),
        ("microbatch", 3, ["ckc", "kck"]),
        ("update", 2, ["cc", "kk", "cc"]),
    ],
)
def test_turns_follow_the_microbatch_or_the_update(unit: Any, microbatches: int, turns: list[str]) -> None:
    """``turns``: of each update, the loss that each of its microbatches takes. The gradient is read from Adam's first moment."""
    objective = distillation.make_objective(student(), teacher()[0], distill(unit=unit), microbatches)
    step = jax.jit(make_step(student(), PLAIN, microbatches, objective=objective))
    state, frozen = state_lib.create(jax.random.key(0), jnp.int32(9), student_params(), model=student(), config=PLAIN)
    moment = jax.tree.map(jnp.zeros_like, state.params)
    for update, turn in enumerate(turns):
        # Lane b belongs to microbatch b % microbatches.
        lanes = jnp.asarray([turn[lane % microbatches] == "k" for lane in range(LANES)], jnp.float32)[:, None]
        shares, weights = {"ce": 1 - lanes, "kl": lanes}, batch(update)["weights"]
        found, gradient = by_hand(state.params, batch(update), shares)
        state, metrics = step(state, distillation.fixed(frozen, teacher()[1]), batch(update))
        mean = jax.tree.map(lambda g, weights=weights: g / weights.sum(), gradient)
        moment = jax.tree.map(lambda m, g: PLAIN.beta1 * m + (1 - PLAIN.beta1) * g, moment, mean)
        assert_trees_close(state.opt_state.inner_state[1].mu, moment, 1e-4, relative=True)
        assert float(metrics["loss"]) == pytest.approx(float(sum(found.values()) / weights.sum()), rel=1e-5)
        for name, share in shares.items():
            weight = float((share * weights).sum())
            assert float(metrics[f"{name}_weight"]) == weight
            assert float(metrics[name]) == pytest.approx(float(found[name]) / (weight or 1.0), rel=1e-5)


def test_the_teacher_runs_only_in_its_turn() -> None:
    """Nothing of its width, which nothing else has, is computed in the other branch."""
    model, params = teacher()
    program = jax.make_jaxpr(distillation.make_objective(student(), model, distill()))(
        student_params(), distillation.fixed({}, params), batch(0), jax.random.key(0), jnp.int32(0)
    )
    (turns,) = (equation for equation in program.eqns if equation.primitive.name == "cond")

    def is_taught(branch: Any) -> bool:
        sizes = array_sizes(jaxpr_as_fun(branch), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in branch.in_avals))
        return any(f"[{LANES},{LENGTH},24]" in shape for _, shape, _ in sizes)

    assert [is_taught(branch) for branch in turns.params["branches"]] == [False, True]


@functools.cache
def compiled(mode: Any, mesh_sizes: tuple[int, int, int], microbatches: int) -> tuple[Any, ...]:
    """(mesh, compiled step, state, fixed) with the embeddings frozen; the teacher lies on the mesh as the student does."""
    config = OptimConfig(lr=1e-2, schedule="constant", freeze=("embed",))
    sizes = MeshConfig(*mesh_sizes)
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(mesh_sizes))])
    shapes, frozen_shapes = state_lib.abstract(student(), config, mesh)
    model, params = teacher()
    params = jax.device_put(params, sharding.shardings(params, mesh))
    parts = sharding.batch_parts(mesh)
    objective = distillation.make_objective(student(), model, distill(mode=mode), microbatches, parts)
    step = make_step(student(), config, microbatches, parts, objective)
    fixed_shapes = distillation.fixed(frozen_shapes, params)
    program = compile_step(step, shapes, fixed_shapes, abstract_batch(LANES, LENGTH, mesh), mesh)
    state, frozen = state_lib.initialize(student(), config, mesh, 0, 100)
    return mesh, program, state, distillation.fixed(frozen, params)


def test_the_teacher_is_not_trained_donated_or_returned_and_eight_devices_are_one() -> None:
    outcomes = []
    for sizes in ((1, 1, 1), (1, 2, 4)):
        mesh, step, state, fixed = compiled("alternate", sizes, microbatches=2)
        before, losses = jax.device_get(fixed), []
        trained = {name.split("params/")[-1] for name in optim.partition.paths({"params": state.params})}
        assert set(optim.partition.paths(state.opt_state.inner_state[1].mu)) == trained
        assert " conditional(" in step.as_text(), "the compiler may have turned the choice into computing both"
        if mesh.size == 1:
            memory, taught = step.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(fixed["teacher"]))
            state_bytes = 3 * sum(x.nbytes for x in jax.tree.leaves(state.params))
            assert memory.output_size_in_bytes - state_bytes < 1000 < taught
            assert memory.alias_size_in_bytes - state_bytes < 1000
        else:
            assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(fixed["teacher"]))
        for _ in range(4):
            state, metrics = step(state, fixed, sharding.put_batch(jax.device_get(batch(0)), mesh))
            losses.append([float(metrics[name]) for name in ("loss", "ce", "kl")])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(fixed), before)
        outcomes.append(losses)
    np.testing.assert_allclose(*outcomes, rtol=1e-5)
    assert all(last < first for first, last in zip(outcomes[0][0], outcomes[0][-1], strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("teacher_multiple", [8, 40])
def test_tables_are_copied_where_both_have_a_row(tied: bool, teacher_multiple: int) -> None:
    fields = {"vocab_size": VOCAB, "d_model": 8, "n_layers": 1}
    own_model = ssm_jax.build("mamba", **fields, tie_embeddings=tied, pad_vocab_size_multiple=16)
    model = ssm_jax.build("mamba", **fields, tie_embeddings=False, pad_vocab_size_multiple=teacher_multiple)
    own, params = random_params(own_model, seed=1), random_params(model, seed=2)
    new = with_tables(own, (params["embed"]["embedding"].astype(jnp.bfloat16), model.readout(params)))
    n = min(32, model.config.padded_vocab_size)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), own)
    embedding = params["embed"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(new["embed"]["embedding"][:n], embedding[:n])
    np.testing.assert_array_equal(new["embed"]["embedding"][n:], own["embed"]["embedding"][n:])
    if not tied:
        np.testing.assert_array_equal(new["head"]["kernel"][:, :n], params["head"]["kernel"][:, :n])
        np.testing.assert_array_equal(new["head"]["kernel"][:, n:], own["head"]["kernel"][:, n:])
    jax.tree.map(np.testing.assert_array_equal, new["layers"], own["layers"])


def save_teacher(folder: Path, seed: int = 0, tokenizer: Any = None, **fields: Any) -> Path:
    sizes = {"vocab_size": 257, "d_model": 8, "n_layers": 1, "d_state": 4, "headdim": 8, "tie_embeddings": False}
    model = ssm_jax.build("mamba2", **{**sizes, **fields})
    ssm_jax.save_pretrained(model, random_params(model, seed), folder, "ssm_jax", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def taught_by(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "mamba2", tokenizer=ByteTokenizer())


RECIPE = {"distill__copy_embeddings": "true", "optim__freeze": "[embed, head]", "model__tie_embeddings": "false"}
"""As published for GSS: the teacher's embeddings at both ends, fixed; the data and the teacher in turn."""


@pytest.fixture(scope="module")
def straight(overrides: Overrides, taught_by: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher that nothing disturbed, by the command."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train.pretrain.run(overrides(folder, distill__teacher=taught_by, **RECIPE))
    return folder


def test_a_run_by_the_published_recipe(straight: Path, taught_by: Path) -> None:
    steps = [row for row in rows(straight) if "loss" in row]
    assert [[name for name in ("ce", "kl") if name in row] for row in steps] == [["ce"], ["kl"]] * 3
    assert all(row["loss"] == pytest.approx(row.get("ce", row.get("kl")), rel=1e-6) for row in steps)
    assert not any(name.endswith("_weight") for row in steps for name in row)
    assert steps[4]["ce"] < steps[0]["ce"]
    learned, (_, theirs) = arrays(straight), from_pretrained(taught_by)
    # 272 rows of the teacher's table and 264 of the student's.
    np.testing.assert_array_equal(learned["embed/embedding"], theirs["embed"]["embedding"][:264])
    np.testing.assert_array_equal(learned["head/kernel"], theirs["head"]["kernel"][:, :264])
    for manifest in (straight / "checkpoints").rglob("MANIFEST.json"):
        assert "teacher" not in manifest.read_text()
        assert "mamba2" not in manifest.read_text()
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["parameters"] == sum(x.size for x in learned.values())
    model, params = checkpoint.load_model(straight)
    assert (model.config.vocab_size, params["embed"]["embedding"].shape) == (257, (264, 8))


def test_validation_is_the_loss_on_the_data_alone(run: Run, straight: Path, tmp_path: Path) -> None:
    """A run that begins where this one ended, without a teacher, and has not learned yet, scores the same."""
    run(output=tmp_path / "on", init_from=straight, model__family=None, model__d_model=None, model__n_layers=None,
        train__steps=1, optim__lr=1e-30, optim__final_lr=0.0)  # fmt: skip
    scores = [[row for row in rows(folder) if "eval/loss" in row][-1] for folder in (straight, tmp_path / "on")]
    assert scores[0]["eval/loss"] == pytest.approx(scores[1]["eval/loss"], rel=1e-6)


def test_a_run_that_stopped_and_went_on_is_the_run_that_did_not(
    run: Run, straight: Path, taught_by: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after an odd number of updates, and the teacher has moved meanwhile."""
    stop_at(3, monkeypatch)
    run(distill__teacher=taught_by, **RECIPE)
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == 3
    shutil.copytree(taught_by, tmp_path / "moved")
    assert run(distill__teacher=tmp_path / "moved", **RECIPE)["finished"]
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.multiprocess
def test_two_processes_learn_what_one_does(
    overrides: Overrides, straight: Path, taught_by: Path, tmp_path: Path
) -> None:
    mesh = {"mesh__data": 2, "mesh__fsdp": 4}
    finish(launch(2, overrides(tmp_path / "run", distill__teacher=taught_by, **RECIPE, **mesh)))
    assert_close_runs(tmp_path / "run", straight)
    assert read_yaml(tmp_path / "run/identity.yaml") == read_yaml(straight / "identity.yaml")


def test_another_teacher_or_another_way_of_teaching_is_another_run(
    run: Run, straight: Path, taught_by: Path, tmp_path: Path
) -> None:
    other = save_teacher(tmp_path / "other", seed=1)
    for changes, message in [
        ({"distill__teacher": other}, r"distill\.teacher is '\w{16}' there and '\w{16}' here\. "),
        ({"distill__temperature": 2}, r"distill\.temperature is 1\.0 there and 2\.0 here\. "),
        ({"distill__mode": "mix", "distill__weight": 1}, r"mode is 'alternate' there and 'mix' here; distill\.weight is"),
        ({"distill__unit": "update"}, r"distill\.unit is 'microbatch' there"),
        ({"distill__copy_embeddings": "false"}, r"distill\.copy_embeddings is True there"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=rf"holds another run: .*{message}"):
            run(output=straight, **{"distill__teacher": taught_by, **RECIPE, **changes})
    without = {key: value for key, value in RECIPE.items() if "distill" not in key}
    with pytest.raises(ConfigError, match=r"holds another run: distill is \{.*\} there and None here"):
        run(output=straight, **without)


@pytest.mark.parametrize(
    ("fields", "changes", "error", "message"),
    [
        ({}, {"distill__temperature": 0.0}, ConfigError, r"section 'distill': temperature is 0\.0; it must be above 0"),
        ({}, {"distill__weight": 1.5}, ConfigError, r"weight is 1\.5; it must lie in \[0, 1\]"),
        ({}, {"distill__weight": 0.9}, ConfigError, r"weight is 0\.9 and mode is alternate, .* set mode=mix, or drop weight"),
        ({}, {"distill__mode": "mix", "distill__unit": "update"}, ConfigError, r"unit is update and mode is mix, "),
        ({}, {"distill__mode": "mixed"}, ConfigError, r"'distill\.mode' is 'mixed'; did you mean 'mix'"),
        ({}, {"distill__teacher": None, "distill__weight": 0.1}, ConfigError, r"'distill\.teacher' is required"),
        ({}, {"distill__teacher": "/nowhere"}, LayoutError, r"'distill\.teacher': /nowhere is not a folder; download"),
        ({"vocab_size": 300}, {}, ConfigError,
         r"'distill\.teacher': .* has 300 token ids and this run's 257; both need the same vocabulary"),
        ({"tokenizer": subword_tokenizer()}, {}, DataError,
         r"prepared with another tokenizer than that of distill\.teacher=.*; prepare it with --tokenizer .*tokenizer"),
        ({"d_model": 16}, {"distill__copy_embeddings": "true"}, ConfigError,
         r"'distill\.copy_embeddings': the embeddings in .* are 16 wide and this run's 8; set model\.d_model=16, or"),
        ({"d_model": 12}, {}, ShardingError, r"'distill\.teacher': .* of size 12 does not divide over mesh\.fsdp=8"),
    ],
)  # fmt: skip
def test_refused_before_anything_happens(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    changes: dict[str, Any],
    error: type[UserError],
    message: str,
) -> None:
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("the step was compiled"))
    teacher = save_teacher(tmp_path / "teacher", **fields)
    with pytest.raises(error, match=message) as caught:
        run(**{"distill__teacher": teacher, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_read_the_rows_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a compiled step it would give NaN, and the student would learn from the data alone."""
    monkeypatch.setattr(loop, "compile_step", lambda *_: pytest.fail("the step was compiled"))
    for limit in (31, 32):
        model = ssm_jax.build("gpt2", vocab_size=257, d_model=8, n_layers=1, n_heads=2, n_positions=limit)
        ssm_jax.save_pretrained(
            model, random_params(model, 0), tmp_path / f"{limit}", "ssm_jax", tokenizer=ByteTokenizer()
        )
    with pytest.raises(
        ConfigError, match=r"'distill\.teacher': .* reads at most 31 tokens and .* rows of 32; .*--seq-len 31"
    ):
        run(distill__teacher=tmp_path / "31")
    monkeypatch.undo()
    run(distill__teacher=tmp_path / "32", train__steps=2)
    taught = [row for row in rows(tmp_path / "run") if "kl" in row]
    assert [row["step"] for row in taught] == [2]
    assert taught[0]["kl"] > 0
    assert taught[0]["skipped_in_a_row"] == 0


def test_a_folder_without_a_model_is_no_teacher(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayoutError, match=r"Config key 'distill\.teacher': Folder .*empty holds no weights; one of"):
        run(distill__teacher=tmp_path / "empty")
    (tmp_path / "empty/checkpoints").mkdir()
    with pytest.raises(UserError, match=r"Config key 'distill\.teacher': .*empty"):
        run(distill__teacher=tmp_path / "empty")
    assert not (tmp_path / "run").exists()
