import json
from pathlib import Path

import pytest
import tokenizers

from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files in two folders, of unequal length."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        folder = root / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        (folder / f"{i:02d}.txt").write_text(f"Document {i}. " + "".join(f"{i * j} ü\n" for j in range(3 * i + 1)))
    return root


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in rows of 16 byte tokens, several shards, a fifth for validation. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(
        find_sources([corpus]), out, ByteTokenizer(), Settings(seq_len=16, validation_percent=20.0, rows_per_shard=100)
    )
    return out


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in GPT-2's two files: 256 bytes, three merges, the end-of-text token."""
    folder = tmp_path_factory.mktemp("gpt2")
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    names = [
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        *("".join(merge) for merge in merges),
        "<|endoftext|>",
    ]
    (folder / "encoder.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return folder
