"""A run: its resolved config, its identity, and its folder. Everything here happens before anything compiles.

A run folder holds ``config.yaml``, ``tokenizer/``, ``checkpoints/``, ``metrics.jsonl``, ``samples.jsonl``, ``tensorboard/`` and
``summary.json``; nothing outside it is needed to go on, to evaluate or to export.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh

from ssm_jax import checkpoint
from ssm_jax.config import dump_yaml, to_dict
from ssm_jax.data.shards import PackedDataset
from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import CheckpointError, ConfigError, DataError
from ssm_jax.models import config_from_dict, config_to_dict
from ssm_jax.sharding import BATCH_AXES
from ssm_jax.training.config import RunConfig

CONFIG, TOKENIZER, IDENTITY = "config.yaml", "tokenizer", "identity.yaml"


def resolve(config: RunConfig, data: PackedDataset, mesh: Mesh) -> RunConfig:
    """The config with every default of the model written out, checked against the data and the mesh.

    ``model.vocab_size`` defaults to the tokenizer's; ``model.dtype`` to bfloat16 on accelerators and float32 elsewhere.

    Raises:
        ConfigError: unknown model key, a vocabulary smaller than the data's, a batch that does not divide over the mesh.
        DataError: rows of another length than ``data.seq_len``.
    """
    fields = dict(config.model)
    if "preset" not in fields:
        fields.setdefault("vocab_size", data.vocab_size)
    fields.setdefault("dtype", "float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = config_from_dict(fields)
    if model.vocab_size < data.vocab_size:
        raise ConfigError(
            f"Config key 'model.vocab_size' is {model.vocab_size} and the data in {data.path} has {data.vocab_size} token ids; "
            f"set model.vocab_size={data.vocab_size} or prepare the data with the model's tokenizer."
        )
    if config.data.seq_len not in (None, data.seq_len):
        raise DataError(
            f"Config key 'data.seq_len' is {config.data.seq_len} and the data in {data.path} has rows of {data.seq_len}; "
            f"set data.seq_len={data.seq_len} or prepare the data with --seq-len {config.data.seq_len}."
        )
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.batch.microbatches
    if config.batch.size % parts:
        over = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ConfigError(
            f"Config key 'batch.size' is {config.batch.size}; it does not divide over {over} x "
            f"batch.microbatches={config.batch.microbatches} = {parts}; choose a multiple of {parts}."
        )
    resolved_data = dataclasses.replace(config.data, seq_len=data.seq_len)
    return dataclasses.replace(config, model=config_to_dict(model), data=resolved_data)


def identity(config: RunConfig, data: PackedDataset) -> dict[str, Any]:
    """What must be the same for a run to go on: model, data (its content, not its path), optimizer, batch, seeds, length."""
    content = to_dict(config)
    shards = [shard.sha256 for shard in data.split.shards]
    content_hash = hashlib.sha256(json.dumps([shards, data.manifest.tokenizer], sort_keys=True).encode()).hexdigest()
    return {
        "model": content["model"],
        "data": {"content": content_hash[:16], "seq_len": data.seq_len, "seed": config.data.seed},
        "optim": content["optim"],
        "batch": content["batch"],
        "train": {"steps": config.train.steps, "time_budget_s": config.train.time_budget_s},
        "seed": config.seed,
    }


def open_folder(config: RunConfig, data: PackedDataset, tokenizer: Tokenizer) -> Path:
    """The run folder: made if it is not there, else checked to hold this very run. The resolved config is written.

    Raises:
        ConfigError: the folder holds another run (the differences are shown), or something else.
    """
    folder, wanted = Path(config.output), identity(config, data)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Config key 'output' is {folder}, which is a file; choose a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        _require_same_run(folder, wanted, config.train.accept_changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).mkdir(exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    (folder / CONFIG).write_text(dump_yaml(config), encoding="utf-8")
    (folder / IDENTITY).write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    return folder


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key is X there and Y here`` for every leaf that differs."""
    found = []
    for key in {**saved, **now}:
        old, new = saved.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {old!r} there and {new!r} here")
    return found
