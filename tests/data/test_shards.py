import json
import shutil
from pathlib import Path

import pytest

from ssm_jax.data.shards import open_dataset, verify_dataset
from ssm_jax.errors import DataError


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def edit_manifest(folder: Path, **changes) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def test_open_gives_the_facts(prepared: Path):
    dataset = open_dataset(prepared, "validation")
    assert (dataset.seq_len, dataset.vocab_size) == (16, 257)
    assert dataset.rows == dataset.split.rows > 0


def test_folder_that_is_not_prepared(tmp_path: Path):
    with pytest.raises(DataError, match=r"no manifest\.json.*train\.prepare_data"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version 99, this program reads 1"),
        ({"format": "other"}, "does not describe"),
        ({"seq_len": "16"}, "damaged .*seq_len"),
        ({"colour": 3}, "damaged .*colour"),
    ],
)
def test_manifest_that_cannot_be_used(copy: Path, changes: dict, message: str):
    edit_manifest(copy, **changes)
    with pytest.raises(DataError, match=message):
        open_dataset(copy)


def test_manifest_cut_short(copy: Path):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        open_dataset(copy)


def test_unknown_split(prepared: Path):
    with pytest.raises(DataError, match=r"no split 'test' \(it has train, validation\)"):
        open_dataset(prepared, "test")


def test_missing_and_truncated_shards(copy: Path):
    shard = sorted(copy.glob("train-*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{shard.name} has {len(content) - 1} bytes instead of {len(content)}"):
        open_dataset(copy)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing"):
        open_dataset(copy)
    assert open_dataset(copy, "validation").rows


def test_verify_names_the_damaged_shard(copy: Path):
    verify_dataset(copy)
    shard = sorted(copy.glob("validation-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.name} is damaged"):
        verify_dataset(copy)
