"""Prepared data on disk: ``manifest.json``, the tokenizer, and ArrayRecord shards ``<split>-00000-of-0000N.array_record``.

One record is one row (packing.py). The manifest holds counts, the tokenizer's fingerprint, and each shard's size and SHA-256.
Files depend on the documents and the settings alone: the same preparation gives the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from array_record.python import array_record_module

from ssm_jax import config
from ssm_jax.data.packing import PackedRow, encode_record
from ssm_jax.errors import ConfigError, DataError

FORMAT = "ssm_jax packed rows"
VERSION = 1
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Shard:
    file: str
    rows: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Counts of one split. ``tokens`` includes both marks of every document; ``text_bytes`` is UTF-8 text without them."""

    documents: int
    tokens: int
    rows: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @property
    def targets(self) -> int:
        """Tokens with weight 1: all but the first of each document."""
        return self.tokens - self.documents


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: str = FORMAT
    version: int = VERSION
    form: Literal["rows", "documents"] = "rows"
    seq_len: int
    vocab_size: int
    token_dtype: str
    tokenizer: dict[str, Any]
    splits: dict[str, Split]
    dropped: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackedDataset:
    """One split of a prepared folder, checked to be complete. The tokenizer is ``load_tokenizer(dataset.path)``."""

    path: Path
    name: str
    manifest: Manifest

    @property
    def split(self) -> Split:
        return self.manifest.splits[self.name]

    @property
    def rows(self) -> int:
        return self.split.rows

    @property
    def seq_len(self) -> int:
        return self.manifest.seq_len

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size


def write_split(
    folder: Path, name: str, rows: Iterator[PackedRow], counts: dict[str, int], token_dtype: str, rows_per_shard: int
) -> Split:
    """Writes ``rows`` as shards of at most ``rows_per_shard`` rows. ``counts``: documents, tokens, rows, text_bytes."""
    shard_count = -(-counts["rows"] // rows_per_shard)
    shards = []
    for number in range(shard_count):
        path = folder / f"{name}-{number:05d}-of-{shard_count:05d}.array_record"
        first = number * rows_per_shard
        content = islice(rows, rows_per_shard)
        written = _write_shard(path, (encode_record(row, i, token_dtype) for i, row in enumerate(content, start=first)))
        shards.append(Shard(path.name, written, path.stat().st_size, _sha256(path)))
    return Split(**counts, shards=tuple(shards))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(config.to_dict(manifest), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a prepared folder; raises DataError if it is missing, damaged, or of another version."""
    file = Path(path) / MANIFEST_FILE
    fix = "prepare the data again with python -m train.prepare_data"
    if not file.is_file():
        raise DataError(
            f"Folder {path} is not prepared data (no {MANIFEST_FILE}); make it with python -m train.prepare_data."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Manifest {file} cannot be read ({error}); {fix}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"Manifest {file} does not describe {FORMAT}; {fix}.")
    if content.get("version") != VERSION:
        raise DataError(f"Manifest {file} has version {content.get('version')!r}, this program reads {VERSION}; {fix}.")
    try:
        return config.from_dict(Manifest, content)
    except ConfigError as error:
        raise DataError(f"Manifest {file} is damaged ({str(error).rstrip('.')}); {fix}.") from error


def open_dataset(path: str | Path, split: str = "train") -> PackedDataset:
    """One split of a prepared folder, its shards checked for presence and size.

    Raises:
        DataError: no manifest, another version, no such split, a shard that is missing or of another size than recorded.
    """
    manifest = read_manifest(path)
    if split not in manifest.splits:
        raise DataError(
            f"Prepared data {path} has no split {split!r} (it has {', '.join(manifest.splits)}); "
            "prepare it again with --validation-percent or --validation, or name another split."
        )
    dataset = PackedDataset(Path(path), split, manifest)
    for shard in dataset.split.shards:
        file = dataset.path / shard.file
        size = file.stat().st_size if file.is_file() else None
        if size != shard.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard.size}"
            raise DataError(f"Shard {file} {state}; restore the file or prepare the data again.")
    return dataset


def verify_dataset(path: str | Path) -> Manifest:
    """Reads every shard of every split and compares its SHA-256; raises DataError naming the first that differs."""
    manifest = read_manifest(path)
    for name in manifest.splits:
        for shard in open_dataset(path, name).split.shards:
            if _sha256(Path(path) / shard.file) != shard.sha256:
                raise DataError(
                    f"Shard {Path(path) / shard.file} is damaged (SHA-256 differs); restore it or prepare again."
                )
    return manifest


def _write_shard(path: Path, records: Iterable[bytes]) -> int:
    count = 0
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    except RuntimeError as error:
        raise DataError(
            f"Shard {path} cannot be written ({' '.join(str(error).split())}); free space there."
        ) from error
    return count


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
