"""``python -m train.convert``: any layout to any other, and what it says."""

import json
import sys
from pathlib import Path

import pytest

import ssm_jax
from ssm_jax.config import main
from ssm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from tests.conformance.golden import GOLDENS
from tests.interop.folders import assert_same, copy_golden, random_params
from train import convert


@pytest.mark.parametrize("folder", ["mamba_original/tied_padded_vocab", "mamba2/two_groups_biases_tied"])
def test_a_round_through_every_layout_changes_nothing(tmp_path: Path, folder: str) -> None:
    source = GOLDENS / folder
    for number, layout in enumerate(("mamba_ssm", "ssm_jax", "transformers", "ssm_jax", "mamba_ssm")):
        target = tmp_path / str(number)
        convert.run([str(source), str(target), "--layout", layout, "--no-check"])
        source = target
    (model, params), (again, read) = ssm_jax.from_pretrained(GOLDENS / folder), ssm_jax.from_pretrained(source)
    assert again.config == model.config
    assert_same(read, params)


def test_it_says_what_it_did_and_how_to_load_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.run([str(GOLDENS / "mamba_original/tied_padded_vocab"), str(tmp_path / "m"), "--no-check"])
    said = capsys.readouterr().out
    assert "mamba, layout mamba_ssm, 19,936 parameters" in said
    assert f"written  {tmp_path / 'm'}: layout transformers" in said
    assert "nothing against PyTorch: not asked for" in said
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "m"}")' in said


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
def test_the_check_compares_with_pytorch(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    convert.run([str(GOLDENS / "mamba2/one_group"), str(tmp_path / "m"), "--layout", layout, "--check"])
    assert "against torch 2.13.0" in capsys.readouterr().out
    logits = json.loads((tmp_path / "m" / "parity.json").read_text())["logits"]
    assert 0 < logits["largest_difference"] < 1e-4


@pytest.mark.torch
def test_weights_that_pytorch_would_read_differently_are_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssm_jax.interop.layouts import transformers

    honest = transformers._write_files
    # The one field that makes transformers alter loaded weights silently.
    monkeypatch.setattr(
        transformers,
        "_write_files",
        lambda *args: {n: c | {"rescale_prenorm_residual": True} for n, c in honest(*args).items()},
    )
    with pytest.raises(ssm_jax.errors.LayoutError, match=r"logits differ from ours"):
        convert.run([str(GOLDENS / "mamba/tied_defaults"), str(tmp_path / "m"), "--check"])
    assert not list(tmp_path.iterdir())


def test_tokenizer_and_special_tokens_come_along(tmp_path: Path) -> None:
    source = copy_golden("mamba/long257_eps", tmp_path / "hf")
    convert.run([str(source), str(tmp_path / "again"), "--no-check"])
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)

    model = ssm_jax.build("mamba", vocab_size=257, d_model=8, n_layers=1)
    run = tmp_path / "run"
    ssm_jax.save_pretrained(model, random_params(model), run, "ssm_jax", tokenizer=ByteTokenizer())
    for source in (run, next((run / "checkpoints").iterdir())):
        target = tmp_path / f"from_{source.name}"
        convert.run([str(source), str(target), "--no-check"])
        assert load_tokenizer(target).fingerprint == ByteTokenizer.fingerprint
        assert json.loads((target / "config.json").read_text())["eos_token_id"] == 256
    back = tmp_path / "back"
    convert.run([str(target), str(back), "--layout", "ssm_jax"])
    assert load_tokenizer(back / "tokenizer").fingerprint == ByteTokenizer.fingerprint


def test_a_folder_can_be_converted_in_place(tmp_path: Path) -> None:
    folder = copy_golden("mamba/tied_defaults", tmp_path / "m")
    expected = ssm_jax.from_pretrained(folder)[1]
    convert.run([str(folder), str(folder), "--layout", "mamba_ssm", "--overwrite", "--no-check"])
    assert (folder / "pytorch_model.bin").is_file()
    assert_same(ssm_jax.from_pretrained(folder)[1], expected)


def test_half_precision(tmp_path: Path) -> None:
    convert.run([str(GOLDENS / "mamba/tied_defaults"), str(tmp_path / "m"), "--dtype", "bfloat16", "--no-check"])
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert ssm_jax.from_pretrained(tmp_path / "m")[0].config.param_dtype == "bfloat16"


def test_errors_are_one_line_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for source, target, message in (
        (tmp_path / "nowhere", tmp_path / "m", "is not a folder"),
        (GOLDENS / "mamba/tied_defaults", tmp_path / "taken", "choose another path"),
    ):
        monkeypatch.setattr(sys, "argv", ["convert", str(source), str(target)])
        with pytest.raises(SystemExit) as stopped:
            main(convert.run)
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "m").exists()
