"""Every config that is shipped can be read and built."""

from pathlib import Path

import pytest

import ssm_jax
from ssm_jax.config import read_yaml
from ssm_jax.errors import ConfigError
from ssm_jax.models import config_from_dict
from ssm_jax.training import load_run_config
from ssm_jax.training.config import interval

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted((CONFIGS / "run").glob("*.yaml"))
DEMO = CONFIGS / "run" / "demo.yaml"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_configs(path: Path) -> None:
    fields = read_yaml(path)
    if "preset" not in fields:
        fields["vocab_size"] = 257
    assert ssm_jax.count_parameters(config_from_dict(fields)) > 100_000


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_configs_and_their_headers(path: Path) -> None:
    config = load_run_config(path, [])
    assert "base" not in config.model
    header = path.read_text().split("\noutput:")[0]
    assert f"--config configs/run/{path.name}" in header
    assert "# Cost:" in header
    assert "# Expected:" in header


def test_a_model_file_is_no_run() -> None:
    with pytest.raises(
        ConfigError, match=r"is a model section, not a run; name it in one: .* model\.base=configs/model"
    ):
        load_run_config("configs/model/baka-tiny.yaml", ["data.path=x"])


def test_fields_of_the_run_win_over_the_base(tmp_path: Path) -> None:
    changes = [
        "model.base=configs/model/mamba-tiny.yaml",
        "model.d_model=64",
        "train.steps=1",
        "train.time_budget_s=null",
    ]
    assert load_run_config(DEMO, changes).model == {"family": "mamba", "d_model": 64, "n_layers": 4, "d_state": 8}
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_run_config(DEMO, ["model.base=nowhere.yaml"])
    with pytest.raises(
        ConfigError, match=r"'model\.preset' \('mamba-130m'\) and 'model\.base' .* are both set; drop one"
    ):
        load_run_config(DEMO, [changes[0], "model.preset=mamba-130m"])
    preset = load_run_config(DEMO, ["model.base=null", "model.preset=mamba-130m"])
    assert preset.model["preset"] == "mamba-130m"
    with pytest.raises(ConfigError, match=r"'model\.base' is 3"):
        load_run_config(DEMO, ["model.base=3"])


def test_intervals() -> None:
    assert [interval(every, 200) for every in (0, 0.25, 0.001, 50, 1)] == [0, 50, 1, 50, 1]
