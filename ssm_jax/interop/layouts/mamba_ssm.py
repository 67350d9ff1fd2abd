"""Folders of the original ``mamba_ssm`` package: MambaLMHeadModel with Mamba or Mamba2 mixers.

It reads ``pytorch_model.bin`` only, and strictly: a tied head must be listed too.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import read_json
from ssm_jax.interop.layouts import transformers
from ssm_jax.interop.layouts.fields import boolean, expect, integer, limits, number, text
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.layouts.mamba_names import HEAD, mamba2_tensors, mamba_tensors
from ssm_jax.interop.tensor_map import TensorMap
from ssm_jax.models import Mamba2Config, MambaConfig, config_from_dict

_EMBEDDING = "backbone.embedding.weight"
_EPS = 1e-5
_LOAD = (
    "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # needs an NVIDIA GPU\n"
    'model = MambaLMHeadModel.from_pretrained("{path}", device="cuda")'
)
_TOP = {
    *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
    *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
    # notes of other tools, without a meaning for the model
    *("architectures", "_name_or_path", "torch_dtype", "dtype", "transformers_version"),
}
_SHARED = {
    *("layer", "d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor", "bias", "conv_bias"),
}
_SPEED = {"use_fast_path", "use_mem_eff_path", "chunk_size"}
_MAMBA = _SHARED | _SPEED | {"dt_rank", "dt_init", "dt_scale"}
_MAMBA2 = _SHARED | _SPEED | {"headdim", "ngroups", "dt_limit", "A_init_range", "conv_init"}


def _detect(kind: str) -> Callable[[Json, Collection[str]], bool]:
    def detect(config: Json, names: Collection[str]) -> bool:
        cfg = config.get("ssm_cfg") or {}
        layer = cfg.get("layer", "Mamba1") if isinstance(cfg, dict) else None
        return "model_type" not in config and "d_model" in config and "n_layer" in config and layer == kind

    return detect


def _read_shared(config: Json, cfg: Json, known: set[str]) -> dict[str, Any]:
    if config.get("d_intermediate", 0) != 0 or config.get("attn_layer_idx"):
        raise LayoutError("'d_intermediate' or 'attn_layer_idx' is set; ssm_jax has no such hybrid of Mamba yet.")
    expect(config, "rms_norm", True)
    _refuse_unknown(config, _TOP, "")
    _refuse_unknown(cfg, known, "ssm_cfg.")
    return {
        "vocab_size": integer(config, "vocab_size", 50277),
        "pad_vocab_size_multiple": integer(config, "pad_vocab_size_multiple", 8),
        "d_model": integer(config, "d_model"),
        "n_layers": integer(config, "n_layer"),
        "residual_in_fp32": boolean(config, "residual_in_fp32", True),
        "tie_embeddings": boolean(config, "tie_embeddings", True),
        "norm_eps": _EPS,
        "d_conv": integer(cfg, "d_conv", 4),
        "expand": integer(cfg, "expand", 2),
        "bias": boolean(cfg, "bias", False),
        "conv_bias": boolean(cfg, "conv_bias", True),
        "dt_min": number(cfg, "dt_min", 1e-3),
        "dt_max": number(cfg, "dt_max", 0.1),
        "dt_init_floor": number(cfg, "dt_init_floor", 1e-4),
    }


def _refuse_unknown(content: Json, known: set[str], where: str) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise LayoutError(f"'{where}{unknown[0]}' is not a field that ssm_jax knows; remove it if it has no effect.")


def _read_mamba(config: Json) -> dict[str, Any]:
    cfg = config.get("ssm_cfg") or {}
    rank = cfg.get("dt_rank", "auto")
    return _read_shared(config, cfg, _MAMBA) | {
        "d_state": integer(cfg, "d_state", 16),
        "dt_rank": rank if rank == "auto" else integer(cfg, "dt_rank"),
        "dt_init": text(cfg, "dt_init", "random"),
        "dt_scale": number(cfg, "dt_scale", 1.0),
    }


def _read_mamba2(config: Json) -> dict[str, Any]:
    cfg = dict(config.get("ssm_cfg") or {})
    only = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None, "activation": "silu"}
    for key, value in only.items():
        expect(cfg, key, value)
        cfg.pop(key, None)
    fields = _read_shared(config, cfg, _MAMBA2)
    if "A_init_range" in cfg:
        fields["A_init_range"] = limits(cfg, "A_init_range")
    return fields | {
        "d_state": integer(cfg, "d_state", 128),
        "headdim": integer(cfg, "headdim", 64),
        "ngroups": integer(cfg, "ngroups", 1),
        "dt_limit": limits(cfg, "dt_limit"),
    }


def _write(config: MambaConfig | Mamba2Config, ssm_cfg: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if config.norm_eps != _EPS:
        raise LayoutError(
            f"norm_eps is {config.norm_eps}, and mamba_ssm has only {_EPS}; use the layout 'transformers'."
        )
    content = {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            **ssm_cfg,
            "d_state": config.d_state,
            "d_conv": config.d_conv,
            "expand": config.expand,
            "dt_min": config.dt_min,
            "dt_max": config.dt_max,
            "dt_init_floor": config.dt_init_floor,
            "bias": config.bias,
            "conv_bias": config.conv_bias,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }
    return {"config.json": content}


def _write_mamba(config: MambaConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    # No "layer": releases before Mamba-2 pass every key on to the mixer.
    return _write(config, {"dt_rank": config.dt_rank_resolved, "dt_init": config.dt_init, "dt_scale": config.dt_scale})


def _write_mamba2(config: Mamba2Config, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    cfg: dict[str, Any] = {
        "layer": "Mamba2",
        "headdim": config.headdim,
        "ngroups": config.ngroups,
        "A_init_range": list(config.A_init_range),
        "chunk_size": config.chunk_size or 256,
    }
    if config.dt_limit != (0.0, math.inf):
        cfg["dt_limit"] = list(config.dt_limit)
    return _write(config, cfg)


def _torch_logits(family: str, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """mamba_ssm itself needs a GPU; transformers' class computes the same model under another name of the token table."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    row, twin = {"mamba": (MAMBA, transformers.MAMBA), "mamba2": (MAMBA2, transformers.MAMBA2)}[family]
    config = config_from_dict({"family": family, **row.read_config(read_json(folder / row.config_file))})
    assert twin.write_files is not None
    content = twin.write_files(config, "float32", {})["config.json"]
    with transformers.quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    renamed = {name.replace(_EMBEDDING, twin.embedding): tensor.float() for name, tensor in weights.items()}
    try:
        model.load_state_dict(renamed, strict=True)
    except RuntimeError as error:
        raise LayoutError(f"PyTorch does not load {folder} as it is: {error}; please report this.") from error
    with transformers.quiet(), torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()


def _layout(
    family: Literal["mamba", "mamba2"],
    kind: str,
    read: Callable[[Json], dict[str, Any]],
    write: Callable[[Any, str, Json], dict[str, dict[str, Any]]],
    tensors: TensorMap,
) -> Layout:
    return Layout(
        name="mamba_ssm",
        family=family,
        detect=_detect(kind),
        read_config=read,
        write_files=write,
        tensors=tensors,
        aliases={"backbone.embeddings.weight": _EMBEDDING},
        embedding=_EMBEDDING,
        head=HEAD,
        differing_head="refuse",
        stores_tied_head=True,
        weights="pytorch_model.bin",
        load_in_torch=_LOAD,
        torch_logits=lambda folder, tokens: _torch_logits(family, folder, tokens),
    )


MAMBA = _layout("mamba", "Mamba1", _read_mamba, _write_mamba, mamba_tensors(_EMBEDDING))
MAMBA2 = _layout("mamba2", "Mamba2", _read_mamba2, _write_mamba2, mamba2_tensors(_EMBEDDING))
