"""DenseRetNet: folders of the DenseSSM repository and of its published checkpoints.

The repository's classes are called Llama*, and so are its configs; the published checkpoints have a model type of their own and say
how narrow the gates of keys and values are. Neither always fits its weights, so widths come from the weights.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import rel_pos, transformers
from ssm_jax.interop.layouts.fields import boolean, integer, number
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.tensor_map import Part, TensorMap, linear, same, vector
from ssm_jax.models import DenseRetNetConfig
from ssm_jax.models.common import round_up

_PREFIX = "model."
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_LAYER, _MIXER = "layers.{i}.", "layers/mixer/"
_ATTENTION = _LAYER + "self_attn."
_K_SCALE, _V_SCALE = "intermediate_k_select_scale", "intermediate_v_select_scale"


def _fusion(letter: str) -> dict[str, tuple[Part, ...]]:
    leaf = f"{_MIXER}{letter}_fusion/"
    return {
        _ATTENTION + f"{letter}_select.fc1.weight": (linear(leaf + "gate/down/kernel"),),
        _ATTENTION + f"{letter}_select.fc2.weight": (linear(leaf + "gate/up/kernel"),),
        _ATTENTION + f"{letter}_norm.weight": (vector(leaf + "norm/scale"),),
    }


_TENSORS: TensorMap = {
    _EMBEDDING: (same("embed/embedding"),),
    _LAYER + "input_layernorm.weight": (vector("layers/norm/scale"),),
    _ATTENTION + "q_proj.weight": (linear(_MIXER + "q_proj/kernel"),),
    _ATTENTION + "k_proj.weight": (linear(_MIXER + "k_proj/kernel"),),
    _ATTENTION + "to_hidden.0.weight": (linear(_MIXER + "v_proj/kernel"), linear(_MIXER + "g_proj/kernel")),
    _ATTENTION + "to_out.0.weight": (linear(_MIXER + "out_proj/kernel", inputs=2),),
    _ATTENTION + "group_norm.weight": (vector(_MIXER + "head_norm/scale"),),
    **_fusion("k"),
    **_fusion("v"),
    "norm.weight": (vector("norm_f/scale"),),
    _HEAD: (linear("head/kernel"),),
}


def _detect(config: Json, names: Collection[str]) -> bool:
    return any(name.endswith("layers.0.self_attn.to_hidden.0.weight") for name in names)


def _detect_hub(config: Json, names: Collection[str]) -> bool:
    return _detect(config, names) and (config.get("model_type") == "DenseGauRetNet" or _K_SCALE in config)


def _read(config: Json) -> dict[str, Any]:
    width = integer(config, "hidden_size")
    return {
        "vocab_size": integer(config, "vocab_size", 32000),
        "d_model": width,
        "n_layers": integer(config, "num_hidden_layers"),
        "n_heads": integer(config, "num_attention_heads"),
        "d_key": integer(config, "query_key_dim", width // 2),
        "d_value": round(number(config, "v_factor", 2.0) * width),
        "dense_layers": integer(config, "dense_block_layers", 1),
        "key_gate_ratio": integer(config, _K_SCALE, 32),
        "value_gate_ratio": integer(config, _V_SCALE, 32),
        "score_normaliser": config.get("score_normaliser"),
        "trained_normaliser": "sum_abs",
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "dropout": number(config, "dropout", 0.1),
    }


def _infer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every width, as published configs are wrong about some (a hidden size of 1526, no word on the gates)."""
    rel_pos.decay_rule(tensors, "powers")
    attention = "layers.0.self_attn."

    def shape(name: str) -> tuple[int, int] | None:
        tensor = tensors.get(name)
        return (tensor.shape[0], tensor.shape[1]) if tensor is not None and len(tensor.shape) == 2 else None

    found: dict[str, Any] = {}
    width = fields["d_model"]
    if table := shape(_EMBEDDING):
        rows, width = table
        found["d_model"] = width
        if rows != round_up(fields["vocab_size"], fields.get("pad_vocab_size_multiple", 1)):
            found["vocab_size"], found["pad_vocab_size_multiple"] = rows, 1
    keys, out = shape(attention + "q_proj.weight"), shape(attention + "to_out.0.weight")
    if keys and keys[0] != (fields["d_key"] or width // 2):
        found["d_key"] = keys[0]
    if out and out[1] != (fields["d_value"] or 2 * width):
        found["d_value"] = out[1]
    for field, letter in (("key_gate_ratio", "k"), ("value_gate_ratio", "v")):
        gate = shape(f"{attention}{letter}_select.fc1.weight")
        if gate:
            found[field] = width // gate[0]
            if width // found[field] != gate[0]:
                raise LayoutError(
                    f"the {letter}_select gates have {gate[0]} features, which is no whole part of {width}."
                )
    return found


def _write(config: DenseRetNetConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    if not config.dense_layers or not config.gate or config.projection != "identity":
        raise LayoutError("DenseSSM always has gates, no matrices per source, and at least one dense layer.")
    factor = config.d_value_resolved / config.d_model
    content = {
        "architectures": ["DenseGauRetNetForCausalLM"],
        "model_type": "DenseGauRetNet",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "query_key_dim": config.d_key_resolved,
        "v_factor": int(factor) if factor.is_integer() else factor,
        "dense_block_layers": config.dense_layers,
        _K_SCALE: config.key_gate_ratio,
        _V_SCALE: config.value_gate_ratio,
        "rms_norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "deepnorm": False,
        "tie_word_embeddings": config.tie_embeddings,
        "score_normaliser": config.score_normaliser,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


def _write_github(config: DenseRetNetConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    fixed = {"d_key": config.d_model // 2, "d_value": 2 * config.d_model, "key_gate_ratio": 32, "value_gate_ratio": 32}
    ours = {"d_key": config.d_key_resolved, "d_value": config.d_value_resolved}
    ours |= {"key_gate_ratio": config.key_gate_ratio, "value_gate_ratio": config.value_gate_ratio}
    for name, value in fixed.items():
        if ours[name] != value:
            raise LayoutError(
                f"{name} is {ours[name]}, and DenseSSM's repository fixes it at {value}; use 'dense_ssm_hub'."
            )
    content = _write(config, dtype, special)["config.json"]
    for key in (_K_SCALE, _V_SCALE, "score_normaliser"):
        del content[key]
    return {"config.json": {**content, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}}


def _buffers(config: DenseRetNetConfig) -> dict[str, np.ndarray]:
    return rel_pos.buffers(config.n_heads, config.d_key_resolved // config.n_heads)


_LOAD_HUB = """import ssm_jax.interop
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{path}")"""
_LOAD_GITHUB = """# with DenseSSM's modeling/dense_gau_retnet_350m on the path
from modeling_dense_gau_retnet import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained("{path}")"""

HUB = Layout(
    name="dense_ssm_hub",
    family="dense_retnet",
    detect=_detect_hub,
    read_config=_read,
    write_files=_write,
    tensors=_TENSORS,
    buffers=_buffers,
    aliases={},
    embedding=_EMBEDDING,
    head=_HEAD,
    differing_head="refuse",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=_LOAD_HUB,
    torch_logits=transformers.torch_logits,
    rename=lambda name: name.removeprefix(_PREFIX),
    spelling=lambda config, name: name if name == _HEAD else _PREFIX + name,
    infer=_infer,
)
GITHUB = replace(
    HUB,
    name="dense_ssm",
    detect=_detect,
    write_files=_write_github,
    stores_tied_head=True,
    load_in_torch=_LOAD_GITHUB,
    torch_logits=None,
    unchecked="DenseSSM is no package; the layout 'dense_ssm_hub' holds the same tensors and is compared",
)
