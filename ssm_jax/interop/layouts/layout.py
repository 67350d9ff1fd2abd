"""What a row of the table of layouts says."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssm_jax.interop.folder import WeightFile
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.tensor_map import TensorMap

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One public format of one family: how to recognise, read and write it.

    name: what ``save_pretrained(layout=...)`` calls it. family: a key of ``models.FAMILIES``.
    detect: (config JSON, tensor names) -> whether a folder is in this layout; from files alone.
    read_config: config JSON -> fields of our config; supplies the format's defaults for what is missing and raises
        LayoutError for what our model would compute differently.
    write_files: (our config, type of the stored weights, special token ids) -> file name -> JSON, every field explicit;
        raises LayoutError for what the format cannot say. None: the layout is only read.
    tensors: published names and how they are made of our leaves.
    variants: our config -> entries that stand in the place of those in ``tensors`` for this model.
    buffers: our config -> tensors that are no parameters, which the original stores: written, and dropped when read.
    aliases: other spellings of published names, old -> the one in ``tensors``.
    rename: the same for spellings that follow a rule; None for a tensor that is no parameter. Comes before ``aliases``.
    spelling: (our config, name in ``tensors``) -> the name to write, where it depends on the model.
    infer: (fields read, tensors under their canonical names) -> fields that the weights say better than the config does.
    embedding, head: published names of the token table and the head, for the rules of tied heads.
    differing_head: a folder that says tied and stores two different matrices is loaded untied, or refused, as the
        original does.
    stores_tied_head: whether a tied head is listed a second time.
    weights: kind of the weight file that the original reads.
    packages: what ``torch_logits`` needs.
    load_in_torch: code that loads an exported folder, with ``{path}``.
    torch_logits: (folder, tokens) -> float32 logits of PyTorch on an exported folder; raises LayoutError when PyTorch
        reports missing or unexpected tensors. None when the original cannot run here; ``unchecked`` says why.
    """

    name: str
    family: str
    detect: Callable[[Json, Collection[str]], bool]
    read_config: Callable[[Json], dict[str, Any]]
    write_files: Callable[[Any, str, Json], dict[str, dict[str, Any]]] | None
    tensors: TensorMap
    aliases: Mapping[str, str]
    embedding: str
    head: str
    differing_head: Literal["untie", "refuse"]
    stores_tied_head: bool
    weights: WeightFile
    load_in_torch: str
    config_file: str = "config.json"
    torch_logits: Callable[[Path, np.ndarray], np.ndarray] | None = None
    unchecked: str = "the original package needs a GPU"
    packages: tuple[str, ...] = ("torch", "transformers")
    rename: Callable[[str], str | None] = lambda name: name
    spelling: Callable[[Any, str], str] = lambda config, name: name
    infer: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]] = lambda fields, tensors: {}
    variants: Callable[[Any], TensorMap] = lambda config: {}
    buffers: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}

    def tensors_of(self, config: Any) -> TensorMap:
        """``tensors`` for a model with this config."""
        return {**self.tensors, **self.variants(config)}
