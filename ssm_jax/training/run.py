"""A run: its resolved config, its identity, and its folder. Everything here happens before anything compiles.

A run folder holds ``config.yaml``, ``identity.yaml``, ``tokenizer/``, ``checkpoints/``, ``metrics.jsonl``, ``samples.jsonl``,
``tensorboard/`` and ``summary.json``; nothing outside it is needed to evaluate, to generate or to export.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh

from ssm_jax import distributed, files, sharding
from ssm_jax.checkpoint import store
from ssm_jax.checkpoint.model import CHECKPOINTS
from ssm_jax.config import dump_yaml, read_yaml, to_dict
from ssm_jax.data.mixture import Mixture, open_held_out, open_mixture, require_same_tokenizer
from ssm_jax.data.tokenizers import Tokenizer, load_tokenizer
from ssm_jax.errors import ConfigError, DataError, UserError
from ssm_jax.interop import from_pretrained, model_of
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.models import LanguageModel, build, config_from_dict, config_to_dict
from ssm_jax.models.registry import context_limit, family_name, restarts_within_calls
from ssm_jax.optim.relora import Spec
from ssm_jax.training import low_rank
from ssm_jax.training.config import RunConfig, SampleConfig
from ssm_jax.training.lanes import Lanes, open_lanes, require_lanes_for_carry
from ssm_jax.training.teacher import Teacher, open_teacher
from ssm_jax.typing import Params, PyTree

CONFIG, IDENTITY, TOKENIZER = "config.yaml", "identity.yaml", "tokenizer"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works with. ``config`` is resolved; ``held_out`` are the validation splits, and ``teacher``, if there are any;
    ``lanes`` where it reads whole articles; ``spec`` where it trains low-rank paths, in the end."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    data: Mixture
    held_out: Mixture | None
    tokenizer: Tokenizer
    model: LanguageModel
    teacher: Teacher | None = None
    lanes: Lanes | None = None
    spec: Spec | None = None


def prepare(config: RunConfig) -> Run:
    """Opens the data, makes the mesh and builds the models; writes nothing, loads no weights.

    Raises:
        ShardingError, DataError, ConfigError: mesh, data or config cannot be used, or do not fit each other.
    """
    require_lanes_for_carry(config)
    mesh = sharding.make_mesh(config.mesh)
    corpora = [(corpus.path, corpus.weight) for corpus in config.data.corpora]
    window = None if config.data.lanes is None else config.data.lanes.window
    data, held_out = open_mixture(corpora, window=window), open_held_out(corpora, window)
    begun = _model_begun_with(config)
    if config.init_from is not None:
        initial = begun or _initial_model(config.init_from, data)
        if config.model.get("family", initial["family"]) != initial["family"]:
            raise ConfigError(
                f"Config key 'model.family' is {config.model['family']!r}, and 'init_from' ({config.init_from}) holds a model of "
                f"{initial['family']}; leave model.family out."
            )
        config = dataclasses.replace(config, model={**initial, **config.model})
    config = resolve(config, data, mesh)
    model = build(config_from_dict(config.model))
    _require_carried_states(model)
    if config.init_from is not None and begun is None:
        _require_same_shapes(model, config.init_from)
    teacher = None if config.distill is None else open_teacher(config.distill, model, data, config.data.joined)
    tokenizer = load_tokenizer(data.path)
    _require_room_for_samples(config.sample, model, tokenizer)
    lanes = open_lanes(config, data, held_out, context_limit(model.config))
    spec = low_rank.plan(model, config.optim)
    return Run(config, Path(config.output), mesh, data, held_out, tokenizer, model, teacher, lanes, spec)


def _require_carried_states(model: LanguageModel) -> None:
    """Samples and evaluations go on from states."""
    normaliser = getattr(model.config, "score_normaliser", None)
    if normaliser is not None:
        raise ConfigError(
            f"Config key 'model.score_normaliser' is {normaliser!r}: such a model needs every sequence whole, and samples and "
            "evaluations of a run go on from states. Set it to null, the exact form; the weights are the same."
        )


def _require_room_for_samples(config: SampleConfig, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Samples are written at the end in any case, when it would be late to find that they do not fit."""
    limit = context_limit(model.config)
    if config.prompts and getattr(model.config, "chunk_boundary", "stream") == "call":
        raise ConfigError(
            "Config key 'sample.prompts' is set and model.chunk_boundary is 'call': every call closes a chunk, and each new token "
            "would be one. Set sample.prompts=[], or model.chunk_boundary=stream; the weights are the same."
        )
    if limit is None or not config.prompts:
        return
    longest = 1 + max(len(tokenizer.encode(prompt)) for prompt in config.prompts)
    if longest + config.max_new_tokens > limit:
        room = limit - longest
        fix = f"set sample.max_new_tokens={room}" if room > 0 else "shorten sample.prompts"
        raise ConfigError(
            f"Config key 'sample.max_new_tokens' is {config.max_new_tokens}; with the longest prompt, of {longest} tokens and its "
            f"start mark, that exceeds the {limit} positions of the model; {fix}."
        )


def _model_begun_with(config: RunConfig) -> dict[str, Any] | None:
    """The model of a run that has a checkpoint already: it needs the weights that it began with no more."""
    folder = Path(config.output)
    if not store.steps(folder / CHECKPOINTS) or not (folder / CONFIG).is_file():
        return None
    saved = read_yaml(folder / CONFIG)
    return saved.get("model") if saved.get("init_from") == config.init_from else None


def initial_params(run: Run) -> Params | None:
    """The weights to start from, each leaf placed on the mesh as it is read; None for new ones.

    Raises:
        LayoutError, CheckpointError: the folder's weights are damaged, or do not fit the run's model.
    """
    if run.config.init_from is None:
        return None
    fields = {key: value for key, value in run.config.model.items() if key != "family"}

    def place(shapes: PyTree) -> PyTree:
        return sharding.shardings(shapes, run.mesh)

    try:
        model, params = from_pretrained(run.config.init_from, shardings=place, **fields)
    except UserError as error:
        raise type(error)(f"Config key 'init_from': {error}") from error
    if model.config != run.model.config:
        raise ConfigError(
            f"Config key 'init_from': {run.config.init_from} holds a {type(model.config).__name__} that differs."
        )
    return params


def _require_same_shapes(model: LanguageModel, path: str) -> None:
    ours, theirs = (
        {
            sharding.path_name(place): leaf.shape
            for place, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(each))
        }
        for each in (model, build(config_from_dict(model_of(path))))
    )
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"Config key 'init_from': parameter {name} is {theirs.get(name, 'absent')} in {path} and "
                f"{ours.get(name, 'absent')} in this run's model; drop the keys in section 'model' that change its shape."
            )


def _initial_model(path: str, data: Mixture) -> dict[str, Any]:
    """The model section of a folder of weights, to be trained in float32 parameters."""
    try:
        fields = model_of(path)
    except UserError as error:
        raise type(error)(f"Config key 'init_from': {error}") from error
    require_same_tokenizer(data, path, "init_from")
    if fields["vocab_size"] < data.vocab_size:
        raise ConfigError(
            f"Config key 'init_from': the model in {path} has {fields['vocab_size']} token ids and the data in {data.path} "
            f"{data.vocab_size}; prepare the data with the model's tokenizer."
        )
    return {**fields, "param_dtype": "float32", "dtype": None}


def resolve(config: RunConfig, data: Mixture, mesh: Mesh) -> RunConfig:
    """The config with every default of the model written out, checked against the data and the mesh.

    ``model.vocab_size`` defaults to the tokenizer's; ``model.dtype`` to bfloat16 on accelerators and float32 elsewhere.

    Raises:
        ConfigError: unknown model key, a vocabulary smaller than the data's, a batch that does not divide over the mesh.
        DataError: rows, or windows of lanes, of another length than ``data.seq_len``, or longer than the model reads.
    """
    fields = dict(config.model)
    if "preset" not in fields:
        fields.setdefault("vocab_size", data.vocab_size)
    if fields.get("dtype") is None:
        fields["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = config_from_dict(fields)
    if model.param_dtype != "float32":
        raise ConfigError(
            f"Config key 'model.param_dtype' is {model.param_dtype!r}; small updates would vanish in rounding. Train with float32 "
            "parameters and set model.dtype=bfloat16 to compute in it."
        )
    if model.vocab_size < data.vocab_size:
        raise ConfigError(
            f"Config key 'model.vocab_size' is {model.vocab_size} and the data in {data.path} has {data.vocab_size} token ids; "
            f"set model.vocab_size={data.vocab_size} or prepare the data with the model's tokenizer."
        )
    if data.window is not None and config.data.seq_len not in (None, data.window):
        raise ConfigError(
            f"Config key 'data.seq_len' is {config.data.seq_len} and data.lanes.window {data.window}; leave data.seq_len out."
        )
    if config.data.seq_len not in (None, data.seq_len):
        raise DataError(
            f"Config key 'data.seq_len' is {config.data.seq_len} and the data in {data.path} has rows of {data.seq_len}; "
            f"set data.seq_len={data.seq_len} or prepare the data with --seq-len {config.data.seq_len}."
        )
    if data.window is None and not config.data.joined and not restarts_within_calls(model):
        raise ConfigError(
            f"The data in {data.path} has rows with several documents, and a {family_name(model)} model begins one only "
            "with a call; read articles in lanes (prepare data with --form documents and set data.lanes.window), or rows as one "
            "document (data.joined=true)."
        )
    limit = context_limit(model)
    if limit is not None and data.window is not None and data.window > limit:
        raise ConfigError(
            f"Config key 'data.lanes.window' is {data.window}, and the model reads at most {limit} tokens; set "
            f"data.lanes.window={limit}, or model.n_positions={data.window} for a new model."
        )
    if limit is not None and data.seq_len > limit:
        raise DataError(
            f"The data in {data.path} has rows of {data.seq_len} tokens, and the model reads at most {limit}; prepare the data "
            f"with --seq-len {limit}, or set model.n_positions={data.seq_len} for a new model."
        )
    parts = sharding.batch_parts(mesh) * config.batch.microbatches
    if config.batch.size % parts:
        over = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in sharding.BATCH_AXES)
        raise ConfigError(
            f"Config key 'batch.size' is {config.batch.size}; it does not divide over {over} x "
            f"batch.microbatches={config.batch.microbatches}; choose a multiple of {parts}."
        )
    if sharding.batch_parts(mesh) % distributed.process_count():
        raise ConfigError(
            f"The batch is split over {sharding.batch_parts(mesh)} device(s), for {distributed.process_count()} processes; "
            "choose mesh.data x mesh.fsdp as a multiple of the processes, which each read their part of the batch."
        )
    resolved_data = dataclasses.replace(config.data, seq_len=data.seq_len)
    return dataclasses.replace(config, model=config_to_dict(model), data=resolved_data)


def identity(config: RunConfig, data: Mixture, teacher: Teacher | None = None) -> dict[str, Any]:
    """What must be the same for a run to go on: model, data and teacher (their content, not their path), optimizer, batch, seeds,
    length."""
    content = to_dict(config)
    shards = [shard.sha256 for dataset in data.datasets for shard in dataset.split.shards]
    digest = hashlib.sha256(json.dumps([shards, data.tokenizer, data.weights], sort_keys=True).encode()).hexdigest()
    return {
        "model": content["model"],
        "init_from": config.init_from,
        "distill": None if teacher is None else {**content["distill"], "teacher": teacher.fingerprint},
        "data": {
            **{"content": digest[:16], "seq_len": data.seq_len, "seed": config.data.seed},
            **({"joined": True} if config.data.joined else {}),
            **({"lanes": content["data"]["lanes"]} if config.data.lanes is not None else {}),
        },
        "optim": content["optim"],
        "batch": content["batch"],
        "train": {
            **{name: content["train"][name] for name in ("steps", "epochs", "time_budget_s")},
            **({"carry_state": True} if config.train.carry_state else {}),
        },
        "seed": config.seed,
    }


def check_folder(run: Run) -> None:
    """Writes nothing.

    Raises:
        ConfigError: the run folder holds another run (the differences are shown), or something else.
    """
    folder = run.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Config key 'output' is {folder}, which is a file; choose a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / IDENTITY).is_file():
        raise ConfigError(f"Config key 'output' is {folder}, which is not empty and not a run; choose another folder.")
    changed = differences(read_yaml(folder / IDENTITY), identity(run.config, run.data, run.teacher))
    if changed and not run.config.train.accept_changes:
        raise ConfigError(
            f"Folder {folder} holds another run: {'; '.join(changed)}. Choose another output, or go on with the new values by "
            "train.accept_changes=true."
        )


def describe_in_folder(run: Run) -> None:
    """Makes the run folder, with the resolved config, the identity and the tokenizer."""
    distributed.barrier("the run folder was checked")
    if not distributed.is_main():
        return
    folder, wanted = run.folder, identity(run.config, run.data, run.teacher)
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    files.write_text(folder / IDENTITY, yaml.safe_dump(wanted, sort_keys=False))
    files.write_text(folder / CONFIG, dump_yaml(run.config))
    run.tokenizer.save(folder / TOKENIZER)


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
