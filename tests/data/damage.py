"""Data with a wrong bit that only a record's own checksum can tell: size and manifest fit."""

import json
from collections.abc import Callable
from pathlib import Path

import grain
from array_record.python import array_record_module

from ssm_jax.data.shards import open_dataset


def rewrite_shard(folder: Path, split: str, change: Callable[[list[bytes]], object]) -> Path:
    """The split's first shard with its records changed in place, its new size in the manifest; returns the file."""
    file = folder / open_dataset(folder, split).split.shards[0].file
    records = list(grain.sources.ArrayRecordDataSource(str(file)))
    change(records)
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    content = json.loads((folder / "manifest.json").read_text())
    content["splits"][split]["shards"][0]["size"] = file.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(content))
    return file
