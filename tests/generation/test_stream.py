"""Streaming shows what ``generate`` returns, and the script prints it."""

from pathlib import Path

import jax
import numpy as np
import pytest

import ssm_jax
from ssm_jax.config import main
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.errors import DataError, GenerationError
from ssm_jax.generation.stream import BLOCK
from tests.generation.tiny import tiny
from train import generate as script

DRAWN = {"temperature": 0.9, "top_p": 0.95, "key": jax.random.key(4)}


@pytest.mark.parametrize(
    ("family", "count"),
    [("mamba", 1), ("mamba", 2), ("mamba", BLOCK + 1), ("mamba", 3 * BLOCK - 1), ("mamba2", BLOCK + 2)],
)
def test_blocks_joined_are_what_generate_returns(family: str, count: int) -> None:
    blocks = list(ssm_jax.stream(*tiny(family), [1, 2, 3], count, **DRAWN))
    expected = ssm_jax.generate(*tiny(family), [[1, 2, 3]], count, **DRAWN)[0]
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    assert max(map(len, blocks)) <= BLOCK


def test_it_ends_with_eos() -> None:
    free = np.concatenate(list(ssm_jax.stream(*tiny("mamba"), [1, 2, 3], 30, **DRAWN)))
    for place in (0, 4, 11):
        eos = int(free[place])
        got = np.concatenate(list(ssm_jax.stream(*tiny("mamba"), [1, 2, 3], 30, eos_id=eos, **DRAWN)))
        np.testing.assert_array_equal(got, free[: np.argmax(free == eos) + 1])


def test_bad_input_is_refused_before_the_first_block() -> None:
    with pytest.raises(GenerationError, match="Prompt 0 is empty"):
        ssm_jax.stream(*tiny("mamba"), [], 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    path = tmp_path_factory.mktemp("models") / "bytes"
    ssm_jax.save_pretrained(model, params, path, layout="ssm_jax", tokenizer=ByteTokenizer())
    return path


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    script.run(arguments)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_script_prints_prompt_text_and_speed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--max-new-tokens", "40", "--temperature", "0.7", "--seed", "3")
    out, err = _printed(capsys, str(folder), "--prompt", "def ü", *settings)
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    tokenizer = ByteTokenizer()
    prompt = np.concatenate([[256], tokenizer.encode("def ü")])
    tokens = ssm_jax.generate(
        model, params, [prompt], 40, temperature=0.7, top_p=0.95, eos_id=256, key=jax.random.key(3)
    )
    assert out == "def ü" + tokenizer.decode(tokens[0]) + "\n"
    assert "tokens/s" in err

    (tmp_path / "prompt.txt").write_text("def ü", encoding="utf-8")
    whole, _ = _printed(capsys, str(folder), "--prompt-file", str(tmp_path / "prompt.txt"), "--no-stream", *settings)
    assert whole == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-file", "absent.txt"), "Prompt file absent.txt cannot be read"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--no-start-mark",), "Prompt 0 is empty"),
        (("--top-p", "2"), "top_p is 2.0"),
    ],
)
def test_the_script_fails_with_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["generate", str(folder), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main(script.run)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_the_script_names_a_folder_that_is_not_there() -> None:
    with pytest.raises(DataError, match="Model folder absent does not exist"):
        script.run(["absent"])
