"""Gated state spaces: the state dicts of gated-state-spaces-pytorch, and those of the published checkpoint around them.

``PACKAGE`` has the names of ``GatedStateSpacesLM``; ``PUBLISHED`` those that naxalpha/gated-state-space has in ``model.pt``, the
state dict of the package's ``AutoregressiveWrapper``. Either is read in any of these spellings:

* a prefix ``net.`` (the wrapper's);
* a patched head: ``to_logits.0.*`` is a LayerNorm and ``to_logits.1.weight`` the head that is ``to_logits.weight`` else;
* one list more around each block, ``layers.{i}.0.*``, as in releases 0.0.4 to 0.0.6;
* the head or the token table left out: they are one matrix.

A folder of ``PACKAGE`` is also one of ``transformers``, for the model in ``interop.torch``: beside the arguments of
``GatedStateSpacesLM`` its config.json has what the Auto classes look for, and what the package has no argument for.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf, nextafter
from pathlib import Path
from typing import Any

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import open_weights, read_json
from ssm_jax.interop.layouts.fields import boolean, integer, number
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.tensor_map import TensorMap, linear, same, vector
from ssm_jax.models import GSSConfig

_EMBEDDING, _HEAD, _NORM = "token_emb.weight", "to_logits.weight", "to_logits.0."
_PREFIX = "net."
_KEYS = ("num_tokens", "dim", "depth")
_ARGUMENTS = (*_KEYS, "dim_expansion_factor", "dss_kernel_N", "dss_kernel_H", "dss_kernel_lambda_imag_exp")
_MODEL_TYPE = "gated_state_spaces"
_LAYER = "layers.{i}."
_MIXER = "layers/mixer/"
_TENSORS: TensorMap = {
    _EMBEDDING: (same("embed/embedding"),),
    _LAYER + "norm.weight": (vector("layers/norm/scale"),),
    _LAYER + "norm.bias": (vector("layers/norm/bias"),),
    _LAYER + "to_u.0.weight": (linear(_MIXER + "u_proj/kernel"),),
    _LAYER + "to_v.0.weight": (linear(_MIXER + "v_proj/kernel"),),
    **{_LAYER + f"dss.{name}": (same(_MIXER + name),) for name in ("Lambda_real", "Lambda_imag", "C_real", "C_imag")},
    _LAYER + "dss.param_D": (vector(_MIXER + "D"),),
    _LAYER + "dss.norm.weight": (vector(_MIXER + "dss_norm/scale"),),
    _LAYER + "dss.norm.bias": (vector(_MIXER + "dss_norm/bias"),),
    _LAYER + "to_gate.weight": (linear(_MIXER + "gate_proj/kernel"),),
    _LAYER + "to_out.weight": (linear(_MIXER + "out_proj/kernel"),),
    _LAYER + "to_out.bias": (vector(_MIXER + "out_proj/bias"),),
    _NORM + "weight": (vector("norm_f/scale"),),
    _NORM + "bias": (vector("norm_f/bias"),),
    _HEAD: (linear("head/kernel"),),
}
_LOAD_PACKAGE = """import inspect, json, pathlib, torch
from gated_state_spaces_pytorch import GatedStateSpacesLM
from safetensors.torch import load_file
config = json.loads(pathlib.Path("{path}/config.json").read_text())
model = GatedStateSpacesLM(**{{name: config[name] for name in inspect.signature(GatedStateSpacesLM).parameters}})
weights = load_file("{path}/model.safetensors")
if "to_logits.0.weight" in weights:  # a LayerNorm before the head, which the package does not have
    model.to_logits = torch.nn.Sequential(torch.nn.LayerNorm(config["dim"]), model.to_logits)
model.load_state_dict(weights)"""
_LOAD_PUBLISHED = """import json, pathlib, torch
from gated_state_spaces_pytorch import GatedStateSpacesLM
from gated_state_spaces_pytorch.autoregressive_wrapper import AutoregressiveWrapper
config = json.loads(pathlib.Path("{path}/config.json").read_text())
model = AutoregressiveWrapper(GatedStateSpacesLM(**config))
weights = torch.load("{path}/model.pt")
if "net.to_logits.0.weight" in weights:  # a LayerNorm before the head, which the package does not have
    model.net.to_logits = torch.nn.Sequential(torch.nn.LayerNorm(config["dim"]), model.net.to_logits)
model.load_state_dict(weights)"""


def _rename(name: str) -> str:
    plain = re.sub(r"^layers\.(\d+)\.0\.", r"layers.\1.", name.removeprefix(_PREFIX))
    return _HEAD if plain == "to_logits.1.weight" else plain


def _spelling(config: GSSConfig, name: str) -> str:
    return "to_logits.1.weight" if name == _HEAD and config.final_norm else name


def _detect(config: Json, names: Collection[str]) -> bool:
    return _ours(config) and not _wrapped(names)


def _detect_published(config: Json, names: Collection[str]) -> bool:
    return _ours(config) and _wrapped(names)


def _ours(config: Json) -> bool:
    return set(_KEYS) <= set(config) and config.get("model_type", _MODEL_TYPE) == _MODEL_TYPE


def _wrapped(names: Collection[str]) -> bool:
    return any(name.startswith(_PREFIX) for name in names)


def _read(config: Json) -> dict[str, Any]:
    fields = {
        "vocab_size": integer(config, "num_tokens"),
        "d_model": integer(config, "dim"),
        "n_layers": integer(config, "depth"),
        "dim_expansion_factor": number(config, "dim_expansion_factor", 4.0),
        "dss_kernel_N": integer(config, "dss_kernel_N", 512),
        "dss_kernel_H": integer(config, "dss_kernel_H", 256),
        "dss_kernel_lambda_imag_exp": boolean(config, "dss_kernel_lambda_imag_exp", True),
    }
    unknown = sorted(set(config) - set(_ARGUMENTS))
    if unknown and "model_type" not in config:  # transformers writes its own keys beside a model's
        raise LayoutError(f"{unknown[0]!r} is not an argument of GatedStateSpacesLM; remove it if it has no effect.")
    return {
        **fields,
        "final_norm": boolean(config, "final_norm", False),
        "accurate": boolean(config, "accurate", False),
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
    }


def _infer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the config has no word for, and widths that old releases took as fixed whatever the config says."""
    found: dict[str, Any] = {}
    if _NORM + "weight" in tensors:
        found["final_norm"] = True
    if (_HEAD in tensors) != (_EMBEDDING in tensors):
        found["tie_embeddings"] = True
    wide, modes = tensors.get("layers.0.to_u.0.weight"), tensors.get("layers.0.dss.C_real")
    if (
        wide is not None
        and len(wide.shape) == 2
        and int(fields["dim_expansion_factor"] * wide.shape[1]) != wide.shape[0]
    ):
        factor = wide.shape[0] / wide.shape[1]
        found["dim_expansion_factor"] = (
            factor if int(factor * wide.shape[1]) == wide.shape[0] else nextafter(factor, inf)
        )
    if modes is not None and len(modes.shape) == 2:
        found["dss_kernel_H"], found["dss_kernel_N"] = modes.shape
    return found


def _write(config: GSSConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    content = {
        "architectures": ["GatedStateSpacesForCausalLM"],
        "model_type": _MODEL_TYPE,
        **_arguments(config),
        "final_norm": config.final_norm,
        "accurate": config.accurate,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


def _write_published(config: GSSConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    return {"config.json": _arguments(config)}


def _arguments(config: GSSConfig) -> dict[str, Any]:
    if config.attention_every:
        raise LayoutError("attention_every is set, and the package has no attention; use the layout 'ssm_jax'.")
    if config.norm_eps != 1e-5:
        raise LayoutError(f"norm_eps is {config.norm_eps}, and the package has only 1e-05.")
    if config.padded_vocab_size != config.vocab_size:
        raise LayoutError(
            "the token table is padded; the package has no padding. Train with pad_vocab_size_multiple=1."
        )
    return {
        "num_tokens": config.vocab_size,
        "dim": config.d_model,
        "depth": config.n_layers,
        "dim_expansion_factor": config.dim_expansion_factor,
        "dss_kernel_N": config.dss_kernel_N,
        "dss_kernel_H": config.dss_kernel_H,
        "dss_kernel_lambda_imag_exp": config.dss_kernel_lambda_imag_exp,
    }


def torch_model(folder: Path) -> Any:
    """The package's language model with the weights of an exported folder, every key checked."""
    import torch
    from gated_state_spaces_pytorch import GatedStateSpacesLM

    config = read_json(folder / "config.json")
    model = GatedStateSpacesLM(**{name: config[name] for name in _ARGUMENTS})
    loaded = {name.removeprefix(_PREFIX): np.array(tensor.load()) for name, tensor in open_weights(folder).items()}
    if _NORM + "weight" in loaded:
        model.to_logits = torch.nn.Sequential(torch.nn.LayerNorm(config["dim"]), model.to_logits)
    try:
        model.load_state_dict({name: torch.from_numpy(x.astype(np.float32)) for name, x in loaded.items()}, strict=True)
    except RuntimeError as error:
        raise LayoutError(f"PyTorch does not load {folder} as it is: {error}; please report this.") from error
    return model.eval()


def _torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = torch_model(folder)(torch.from_numpy(tokens.astype(np.int64))).numpy()
    return logits


PACKAGE = Layout(
    name="gated_state_spaces",
    family="gss",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors=_TENSORS,
    aliases={},
    embedding=_EMBEDDING,
    head=_HEAD,
    differing_head="refuse",
    stores_tied_head=True,
    weights="safetensors",
    load_in_torch=_LOAD_PACKAGE,
    torch_logits=_torch_logits,
    packages=("torch", "gated_state_spaces_pytorch"),
    rename=_rename,
    spelling=_spelling,
    infer=_infer,
)
PUBLISHED = replace(
    PACKAGE,
    name="naxalpha",
    detect=_detect_published,
    write_files=_write_published,
    spelling=lambda config, name: _PREFIX + _spelling(config, name),
    weights="model.pt",
    load_in_torch=_LOAD_PUBLISHED,
)
