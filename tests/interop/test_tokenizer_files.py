"""The tokenizer in an exported folder: ours reads it, and so does ``transformers``, to the same ids."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

import ssm_jax
from ssm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from ssm_jax.errors import LayoutError
from ssm_jax.interop import tokenizer_files
from ssm_jax.interop.folder import read_json
from tests.interop.folders import random_params

TEXTS = (
    "",
    "plain text",
    "def f(x):\n\treturn  x ** 2  # tabs,  spaces\r\n",
    "naïve café, Ωμέγα, 日本語, 🙂👩‍👩‍👧, \u0301 alone, \x00\x01\x7f, \ufeff",
    " leading and trailing ",
    "a special <|endoftext|> spelled out",
    "".join(map(chr, range(32, 1024))),
)


def test_bytes_as_a_tokenizer_json(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    tokenizer_files.write(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == 257
    assert theirs.token_to_id("<|endoftext|>") == 256
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        np.testing.assert_array_equal(ids, ours.encode(text))
        assert theirs.decode(ids) == text
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint


@pytest.mark.torch
def test_bytes_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = ByteTokenizer()
    tokenizer_files.write(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == 256
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        np.testing.assert_array_equal(ids, ours.encode(text))
        assert theirs.decode(ids) == text
    assert theirs.decode([72, 105, 256], skip_special_tokens=True) == "Hi"


def test_the_tokenizer_and_its_end_of_text_travel_with_the_weights(tmp_path: Path) -> None:
    model = ssm_jax.build("mamba", vocab_size=257, d_model=8, n_layers=1)
    ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", tokenizer=ByteTokenizer(), check=False)
    special = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    for name in ("config.json", "generation_config.json"):
        assert special.items() <= read_json(tmp_path / "m" / name).items()
    ssm_jax.save_pretrained(model, random_params(model), tmp_path / "copy", tokenizer=tmp_path / "m", check=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "ssm_tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = ssm_jax.build("mamba", vocab_size=257, d_model=8, n_layers=1)
    with pytest.raises(LayoutError, match=r"holds no tokenizer files"):
        ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", tokenizer=tmp_path, check=False)
    assert not (tmp_path / "m").exists()
