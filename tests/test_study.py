"""The driver of controlled studies: what it repeats, what it compares, and the studies that are shipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import ssm_jax
from benchmarks import study as study_lib
from ssm_jax.config import from_dict
from ssm_jax.models import config_from_dict
from ssm_jax.training import RunConfig

STUDIES = sorted((Path(__file__).parents[1] / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_compare_models_of_one_size(path: Path) -> None:
    study = yaml.safe_load(path.read_text())
    study_lib.check(study, [], Path("none"))
    runs = {arm: study_lib.run_of(study, arm, Path("runs"), 0) for arm in study["arms"]}
    for run in runs.values():
        from_dict(RunConfig, run, "")
    sizes = {
        arm: ssm_jax.count_parameters(config_from_dict({"vocab_size": 257, **_model(study, runs, arm)})) for arm in runs
    }
    assert len(study["seeds"]) >= 3
    for one, other in study["pairs"]:
        assert abs(sizes[one] / sizes[other] - 1) <= study_lib.TOLERANCE, (one, other, sizes)
    header = path.read_text().split("\noutput:")[0]
    assert f"benchmarks.study configs/study/{path.name}" in header
    assert "# Expected:" in header


def _model(study: dict[str, Any], runs: dict[str, Any], arm: str) -> dict[str, Any]:
    """The model section of an arm, or of the one with whose weights it begins."""
    source = study_lib.source_of(study, arm)
    model: dict[str, Any] = runs[arm]["model"] if source is None else _model(study, runs, source)
    return model


def test_arms_change_the_run_and_begin_with_each_other(tmp_path: Path) -> None:
    arms: dict[str, Any] = {
        "plain": {"family": "mamba"},
        "longer": {"model": {"family": "mamba"}, "run": {"train": {"steps": 9}, "optim": {"lr": 1.0}}},
        "tuned": {"from": "plain", "run": {"data": {"joined": True}}},
    }
    study = {"run": {"data": {"path": "x"}, "train": {"steps": 3, "epochs": None}}, "arms": arms, "pairs": []}
    plain, longer, tuned = (study_lib.run_of(study, arm, tmp_path, 1) for arm in arms)
    assert plain == {
        "data": {"path": "x", "seed": 1},
        "train": {"steps": 3, "epochs": None},
        "output": str(tmp_path / "plain-1"),
        "model": {"family": "mamba"},
        "seed": 1,
    }
    assert (longer["train"], longer["optim"]) == ({"steps": 9, "epochs": None}, {"lr": 1.0})
    assert (tuned["model"], tuned["init_from"]) == ({}, str(tmp_path / "plain-1"))
    assert tuned["data"] == {"path": "x", "joined": True, "seed": 1}
    before = study_lib.fingerprint(study, "tuned")
    assert study_lib.fingerprint({**study, "arms": arms | {"plain": {"family": "mamba2"}}}, "tuned") != before
    with pytest.raises(ValueError, match="'tuned' begins with the weights of 'plain'; put that arm before it"):
        study_lib.check({**study, "arms": dict(reversed(arms.items()))}, [], tmp_path)


def line(arm: str, seed: int, score: float, parameters: int = 1000) -> dict[str, Any]:
    sizes = {"parameters": parameters, "trained": parameters, "step_bytes": 3 * 2**20}
    return {"arm": arm, "seed": seed, "bits_per_byte": score, "tokens_per_s": 10.0, "tflop": 0.5, **sizes}


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds differ by much more than the arms do, and always in the same direction."""
    lines = [line("a", seed, 2.0 + seed) for seed in (0, 1, 2)] + [line("b", seed, 1.9 + seed) for seed in (0, 1, 2)]
    rows = study_lib.table(lines, [["a", "b"]]).splitlines()
    assert rows[1].split() == ["a", "1,000", "3.0000", "+-", "1.0000", "1,000", "3.0", "0.50", "10"]
    assert rows[-1].startswith("b - a: -0.1000 +- 0.0000 bits per byte")


def test_pairs_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 1,000 parameters and b 1,030: more than 2 % apart"):
        study_lib.table([line("a", 0, 2.0), line("b", 0, 1.9, 1030)], [["a", "b"]])


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(study: Any, arm: str, output: Path, seed: int) -> dict[str, Any]:
        trained.append(f"{arm}-{seed}")
        return {key: value for key, value in line("", 0, 2.0).items() if key not in ("arm", "seed")}

    monkeypatch.setattr(study_lib, "train", train)
    content: dict[str, Any] = {"output": str(tmp_path / "out"), "seeds": [0, 1], "pairs": [["a", "b"]], "run": {}}
    content["arms"] = {"a": {}, "b": {}}

    def run(**changed: Any) -> None:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content | changed))
        study_lib.main()

    monkeypatch.setattr("sys.argv", ["study", str(tmp_path / "study.yaml")])
    run()
    results = tmp_path / "out" / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:3]))
    run()
    assert trained == ["a-0", "b-0", "a-1", "b-1", "b-1"]
    assert [json.loads(text)["arm"] for text in results.read_text().splitlines()] == ["a", "b", "a", "b"]
    with pytest.raises(ValueError, match="has a run of the arm 'b' with another config; remove its lines"):
        run(arms={"a": {}, "b": {"d_model": 8}})
    with pytest.raises(ValueError, match="pairs name the arm 'c'; the arms are a, b"):
        run(pairs=[["a", "c"]])
    assert len(trained) == 5


def test_unequal_arms_stop_a_study_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(study: Any, arm: str, output: Path, seed: int) -> dict[str, Any]:
        trained.append(f"{arm}-{seed}")
        return {"bits_per_byte": 2.0, "tokens_per_s": 10.0, "parameters": study["arms"][arm]["size"]}

    monkeypatch.setattr(study_lib, "train", train)
    content = {"output": str(tmp_path / "out"), "seeds": [0, 1], "pairs": [["a", "b"]], "run": {}}
    content["arms"] = {"a": {"size": 100}, "b": {"size": 103}, "c": {"size": 100}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("sys.argv", ["study", str(tmp_path / "study.yaml")])
    with pytest.raises(ValueError, match="a has 100 parameters and b 103"):
        study_lib.main()
    assert trained == ["a-0", "b-0"]
