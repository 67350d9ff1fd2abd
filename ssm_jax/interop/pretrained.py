"""From a folder of weights to a model and its parameters, and back."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ssm_jax.errors import LayoutError
from ssm_jax.interop import native, parity, tokenizer_files
from ssm_jax.interop.folder import new_folder, open_weights, read_json, refuse_existing, write_json, write_weights
from ssm_jax.interop.layouts import Layout, detect, nearest, writable
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.interop.tensor import Tensor, raw_bytes
from ssm_jax.interop.tensor_map import to_params, to_tensors
from ssm_jax.models import LanguageModel, build, config_from_dict, config_to_dict
from ssm_jax.models.registry import family_name
from ssm_jax.typing import Params, PyTree

OURS = "ssm_jax.json"
"""Beside an exported config: the fields of our config that the published one has no place for."""

Shardings = PyTree | Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened folder: its layout, the model that it describes, and its tensors under the layout's names."""

    layout: Layout
    model: LanguageModel
    tensors: Mapping[str, Tensor]


def from_pretrained(
    path: str | Path, *, dtype: Any = None, shardings: Shardings | None = None, **config_overrides: Any
) -> tuple[LanguageModel, Params]:
    """The model and its parameters from a Hugging Face folder, an original one, or a checkpoint of ours.

    The layout is recognised from the files. Leaves are filled one after another, each placed as soon as it is complete, so
    that the whole model never exists twice. Pickled weights are read without executing anything.

    Args:
        path: the folder.
        dtype: type to store the parameters and to compute in, such as "bfloat16". Default: float32, or what an exported
            folder was stored in. ``param_dtype=`` sets the storage alone.
        shardings: one sharding for every leaf, a tree of them, or a function from the tree of shapes to such a tree.
        config_overrides: fields of the model's config to change, such as ``remat="full"``.

    Raises:
        LayoutError: no such folder or layout, damaged files, a config that asks for what the model does not compute, or
            tensors that are missing, left over or of another shape.
        ConfigError: an override that does not exist or does not fit.
    """
    path = Path(path)
    overrides = _with_dtype(dtype, config_overrides)
    if native.is_native(path):
        return native.read_native(path, shardings, overrides)
    source = open_folder(path, **overrides)
    abstract = abstract_params(source.model)
    place = _placer(abstract, shardings)
    try:
        return source.model, to_params(source.layout.tensors_of(source.model.config), source.tensors, abstract, place)
    except LayoutError as error:
        read_as = f"{source.layout.family} in the layout {source.layout.name!r}"
        corrected = f" with {OURS}" if (path / OURS).is_file() else ""
        raise LayoutError(f"{path}, read as {read_as}{corrected}: {error}{_hint(source)}") from error


def model_of(path: str | Path) -> dict[str, Any]:
    """``family`` and the fields of the config of the model in a folder that ``from_pretrained`` reads; no weights are loaded.

    Raises:
        LayoutError, CheckpointError: as ``from_pretrained``.
    """
    path = Path(path)
    if native.is_native(path):
        return native.read_model(path)
    return config_to_dict(open_folder(path).model.config)


def open_folder(path: Path, **config_overrides: Any) -> Source:
    """Recognises a folder and reads its config; the tensors are not loaded (but for a head that may be tied)."""
    if not path.is_dir():
        raise LayoutError(f"{path} is not a folder; download the model first (hf download NAME --local-dir FOLDER).")
    found = open_weights(path)
    layout, content = detect(path, found)
    tensors = _canonical(path, layout, found)
    try:
        fields = layout.read_config(content)
    except LayoutError as error:
        raise LayoutError(f"{path / layout.config_file}: {error}") from error
    if (path / OURS).is_file():
        ours = read_json(path / OURS)
        if ours.get("family", layout.family) != layout.family:
            raise LayoutError(
                f"{path / OURS} is of a {ours['family']} model, and the rest of the folder of {layout.family}; remove it."
            )
        fields |= ours.get("config", {})
    fields |= layout.infer(fields, tensors)
    tied, wanted = fields["tie_embeddings"], config_overrides.get("tie_embeddings")
    fields["tie_embeddings"], tensors = _resolve_head(path, layout, tied, wanted, tensors)
    model = build(config_from_dict({"family": layout.family, **fields}), **config_overrides)
    for name in layout.buffers(model.config):
        tensors.pop(name, None)
    return Source(layout, model, tensors)


def save_pretrained(
    model: LanguageModel,
    params: Params,
    path: str | Path,
    layout: str | None = None,
    *,
    overwrite: bool = False,
    tokenizer: Any = None,
    special_tokens: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 * 2**30,
    check: bool | None = None,
) -> None:
    """Writes a folder that PyTorch loads: config, weights, tokenizer, and ``parity.json``, a report of what was checked.

    The folder appears complete or not at all. ``from_pretrained`` of it gives the same parameters, bit for bit.

    Args:
        path: the folder to make.
        layout: a format that the family has, such as "transformers", "mamba_ssm" or "gated_state_spaces"; None takes the most
            native one; "ssm_jax" makes a checkpoint of ours, which training can start from.
        overwrite: replace a folder of weights that is already there.
        tokenizer: one of ``ssm_jax.data.tokenizers``, or a folder whose tokenizer files are copied.
        special_tokens: ``{"bos_token_id": ..., "eos_token_id": ..., "pad_token_id": ...}``; default: the tokenizer's.
        max_shard_bytes: weights beyond it are split over several files, where the layout has shards.
        check: load the folder in PyTorch and compare logits. Default: if PyTorch and the original package are installed and
            the model has less than 200 million parameters.

    Raises:
        LayoutError: the layout cannot express the model, ``path`` is taken, or PyTorch does not load what was written.
    """
    path = Path(path)
    if layout == native.LAYOUT:
        return native.write_native(model, params, path, tokenizer, overwrite)
    family = family_name(model.config)
    row = writable(family, layout)
    refuse_existing(path, overwrite)
    special = dict(special_tokens) if special_tokens is not None else tokenizer_files.special_tokens(tokenizer)
    try:
        assert row.write_files is not None
        described = row.write_files(model.config, _widest(params), special)
        tensors = _published_tensors(row, model, params)
    except LayoutError as error:
        raise LayoutError(f"This model cannot be written in the layout {row.name!r}: {error}") from error
    with new_folder(path, overwrite) as folder:
        for name, content in described.items():
            write_json(folder / name, content)
        write_json(folder / OURS, {"family": family, "config": _unsaid(row, described[row.config_file], model.config)})
        tokenizer_files.write(tokenizer, folder)
        files = write_weights(folder, tensors, row.weights, max_shard_bytes)
        write_json(folder / parity.REPORT, parity.report(folder, row, model, params, files, check))


def _hint(source: Source) -> str:
    """The layout whose tensors these look like, where it is another one."""
    likely = nearest(source.tensors)
    if likely is None or likely.family == source.layout.family:
        return ""
    return f" The tensors look like {likely.family} in the layout {likely.name!r}; is the config another model's?"


def _with_dtype(dtype: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    if dtype is None:
        return overrides
    name = np.dtype(dtype).name
    return {"dtype": name, "param_dtype": name, **overrides}


def _placer(abstract: Params, shardings: Shardings | None) -> Callable[[str, np.ndarray], jax.Array]:
    if callable(shardings):
        shardings = shardings(abstract)
    if shardings is None:
        return lambda leaf, array: jax.device_put(array)
    one_for_all = isinstance(shardings, jax.sharding.Sharding)
    tree = jax.tree.map(lambda _: shardings, abstract) if one_for_all else shardings
    by_leaf = traverse_util.flatten_dict(tree, sep="/")

    def place(leaf: str, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, by_leaf[leaf], lambda index: array[index])

    return place


def _canonical(path: Path, layout: Layout, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the layout's names: without a wrapper's prefix, and other spellings replaced."""
    prefix = "model." if found and all(name.startswith("model.") for name in found) else ""
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        renamed = layout.rename(name.removeprefix(prefix))
        if renamed is None:
            continue
        plain = layout.aliases.get(renamed, renamed)
        if plain in tensors:
            raise LayoutError(f"{path} holds {plain!r} twice, once as {name!r}; remove one of the two.")
        tensors[plain] = tensor
    return tensors


def _resolve_head(
    path: Path, layout: Layout, tied: bool, wanted: bool | None, tensors: dict[str, Tensor]
) -> tuple[bool, dict[str, Tensor]]:
    """Whether the head is tied, and the tensors without a redundant copy of it. ``wanted``: what the caller asks for."""
    head, embedding = tensors.get(layout.head), tensors.get(layout.embedding)
    if wanted is False or not (tied or wanted) or head is None:
        return tied and wanted is not False, tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != layout.head}
    if embedding is None:
        return True, {**rest, layout.embedding: head}
    if _equal(head, embedding):
        return True, rest
    if wanted:
        raise LayoutError(f"{path}: tie_embeddings=True was passed, but head and token table differ; leave it out.")
    differ = f"{path}: the config says tied, but {layout.head!r} and {layout.embedding!r} differ"
    if layout.differing_head == "refuse":
        raise LayoutError(f"{differ}; set tie_embeddings to false in {layout.config_file} to use both, or remove one.")
    warnings.warn(f"{differ}; both are used, untied, as transformers does.", stacklevel=4)
    return False, tensors


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(np.array_equal(raw_bytes(one.load()), raw_bytes(other.load())))


def _published_tensors(row: Layout, model: LanguageModel, params: Params) -> dict[str, Tensor]:
    shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    expected = traverse_util.flatten_dict(abstract_params(model), sep="/")
    for name in sorted(set(shapes) | set(expected)):
        if name not in shapes or name not in expected or shapes[name] != expected[name].shape:
            there = f"has shape {shapes[name]}" if name in shapes else "is missing"
            wanted = f"wants {expected[name].shape}" if name in expected else "has no such parameter"
            raise LayoutError(f"the parameter {name!r} {there}, the model {wanted}; pass the model's own parameters.")
    tensors = to_tensors(row.tensors_of(model.config), params)
    for name, values in row.buffers(model.config).items():
        tensors[name] = Tensor(values.shape, values.dtype, functools.partial(np.asarray, values))
    if row.stores_tied_head and model.config.tie_embeddings:
        tensors[row.head] = tensors[row.embedding]
    return {row.spelling(model.config, name): tensor for name, tensor in tensors.items()}


def _widest(params: Params) -> str:
    """The one type that a config states for the whole model, such that nothing is rounded when PyTorch loads it."""
    return str(max((np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)), key=lambda dtype: dtype.itemsize).name)


def _unsaid(row: Layout, content: dict[str, Any], config: Any) -> dict[str, Any]:
    """The fields of our config that reading ``content`` back would not give."""
    said = config_to_dict(config_from_dict({"family": row.family, **row.read_config(content)}))
    return {key: value for key, value in config_to_dict(config).items() if said[key] != value}
