"""RetNet: the state dicts of torchscale's ``RetNetDecoder``, and folders of syncdoth/RetNet (``RetNetForCausalLM``).

Both have torchscale's names; syncdoth's stand below ``model.``, but for the head. torchscale has no folder format: its folder is
``config.json`` with the arguments of ``RetNetConfig`` beside the weights.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import rel_pos, transformers
from ssm_jax.interop.layouts.fields import boolean, expect, integer, number, text
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.tensor_map import TensorMap, linear, same, vector
from ssm_jax.models import RetNetConfig

_EMBEDDING, _HEAD, _FINAL_NORM = "embed_tokens.weight", "output_projection.weight", "layer_norm.weight"
_PREFIX, _SYNCDOTH_HEAD = "model.", "lm_head.weight"
_LAYER = "layers.{i}."
_FFN = _LAYER + "ffn."
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu": "gelu", "relu": "relu"}
"""Published name -> ours. The first of several is the one to write."""
_TENSORS: TensorMap = {
    _EMBEDDING: (same("embed/embedding"),),
    "layernorm_embedding.weight": (vector("norm_embed/scale"),),
    **{
        _LAYER + f"retention.{name}.weight": (linear(f"layers/mixer/{name}/kernel"),)
        for name in ("q_proj", "k_proj", "v_proj", "g_proj")
    },
    _LAYER + "retention.out_proj.weight": (linear("layers/mixer/out_proj/kernel", inputs=2),),
    _LAYER + "retention_layer_norm.weight": (vector("layers/norm/scale"),),
    _FFN + "fc1.weight": (linear("layers/mlp/gate_proj/kernel"),),
    _FFN + "gate.weight": (linear("layers/mlp/up_proj/kernel"),),
    _FFN + "fc2.weight": (linear("layers/mlp/down_proj/kernel"),),
    _LAYER + "final_layer_norm.weight": (vector("layers/mlp_norm/scale"),),
    _FINAL_NORM: (vector("norm_f/scale"),),
    _HEAD: (linear("head/kernel"),),
}
_PLAIN: TensorMap = {
    _FFN + "fc1.weight": (linear("layers/mlp/up_proj/kernel"),),
    _FFN + "fc1.bias": (vector("layers/mlp/up_proj/bias"),),
    _FFN + "gate.weight": (linear("layers/mlp/gate_proj/kernel"),),
    _FFN + "ffn_layernorm.weight": (vector("layers/mlp/norm/scale"),),
    _FFN + "ffn_layernorm.bias": (vector("layers/mlp/norm/bias"),),
    _FFN + "fc2.bias": (vector("layers/mlp/down_proj/bias"),),
}


def _detect(config: Json, names: Collection[str]) -> bool:
    return "layers.0.retention.q_proj.weight" in names


def _detect_syncdoth(config: Json, names: Collection[str]) -> bool:
    return _PREFIX + "layers.0.retention.q_proj.weight" in names


def _rename(name: str) -> str:
    return _HEAD if name == _SYNCDOTH_HEAD else name.removeprefix(_PREFIX)


def _spelling(config: RetNetConfig, name: str) -> str:
    return _SYNCDOTH_HEAD if name == _HEAD else _PREFIX + name


def _read(config: Json) -> dict[str, Any]:
    """Old torchscale had LayerNorms and biases everywhere; such weights fail by their names."""
    for key, off in (("multiway", False), ("moe_freq", 0), ("xpos_rel_pos", False)):
        expect(config, key, off, None)
    activation = text(config, "activation_fn", "gelu")
    if activation not in _ACTIVATIONS:
        raise LayoutError(f"'activation_fn' is {activation!r}; ssm_jax has {', '.join(_ACTIVATIONS)}.")
    glu, deepnorm = boolean(config, "use_glu", True), boolean(config, "deepnorm", False)
    sub_norm = "rms" if boolean(config, "use_ffn_rms_norm", False) else "layer"
    subln = boolean(config, "subln", True) and not deepnorm
    return {
        "vocab_size": integer(config, "vocab_size"),
        "d_model": integer(config, "decoder_embed_dim", 768),
        "n_layers": integer(config, "decoder_layers", 12),
        "n_heads": integer(config, "decoder_retention_heads", 3),
        "d_value": integer(config, "decoder_value_embed_dim", 1280),
        "d_mlp": integer(config, "decoder_ffn_embed_dim", 1280),
        "decay": "log_spaced" if boolean(config, "use_lm_decay", False) else "powers",
        "mlp": "glu" if glu else "plain",
        "mlp_norm": sub_norm if subln and not glu else None,
        "activation": _ACTIVATIONS[activation],
        "post_norm": not boolean(config, "decoder_normalize_before", True),
        "deepnorm": deepnorm,
        "embedding_scale": not boolean(config, "no_scale_embedding", True),
        "embedding_norm": boolean(config, "layernorm_embedding", False),
        "score_normaliser": config.get("score_normaliser"),
        "trained_normaliser": None,  # torchscale's versions differ, and its files do not say which it was
        "tie_embeddings": boolean(
            config, "share_decoder_input_output_embed", boolean(config, "tie_word_embeddings", False)
        ),
        "norm_eps": number(config, "layernorm_eps", 1e-6),
        # Those of activations and of whole paths have no counterpart here.
        "dropout": number(config, "dropout", 0.0),
    }


def _read_syncdoth(config: Json) -> dict[str, Any]:
    return {**_read(config), "trained_normaliser": "sum_abs"}


def _infer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What weights say better: versions disagree about what ``deepnorm`` does to the norms, and buffers hold the decays."""
    found: dict[str, Any] = {"decay": rel_pos.decay_rule(tensors, fields["decay"])}
    if any(name.startswith("layers.") for name in tensors):
        found["post_norm"] = _FINAL_NORM not in tensors
    if fields["vocab_size"] < 1 and _EMBEDDING in tensors:
        found["vocab_size"] = tensors[_EMBEDDING].shape[0]
    return found


def _write(config: RetNetConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    if config.rotary != "interleaved" or config.norm_scale or not config.score_scale:
        raise LayoutError(
            "rotary 'halves', norm_scale and score_scale=False are not torchscale's; use the layout 'fla' or 'ssm_jax'."
        )
    if config.activation not in _ACTIVATIONS.values():
        raise LayoutError(f"activation is {config.activation!r}, and torchscale has {', '.join(_ACTIVATIONS)}.")
    content = {
        "vocab_size": config.padded_vocab_size,
        "decoder_embed_dim": config.d_model,
        "decoder_value_embed_dim": config.d_value,
        "decoder_ffn_embed_dim": config.d_mlp,
        "decoder_layers": config.n_layers,
        "decoder_retention_heads": config.n_heads,
        "decoder_normalize_before": not config.post_norm,
        "activation_fn": next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
        "dropout": config.dropout,
        "no_scale_embedding": not config.embedding_scale,
        "layernorm_embedding": config.embedding_norm,
        "deepnorm": config.deepnorm,
        "subln": config.mlp_norm is not None,
        "share_decoder_input_output_embed": config.tie_embeddings,
        "layernorm_eps": config.norm_eps,
    }
    return {"config.json": content}


def _write_torchscale(config: RetNetConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    if config.mlp != "glu":
        raise LayoutError("torchscale has no plain feed-forward network; use the layout 'syncdoth'.")
    if config.decay != "powers":
        raise LayoutError(f"decay is {config.decay!r}, and torchscale has only 'powers'; use the layout 'syncdoth'.")
    return _write(config, dtype, special)


def _write_syncdoth(config: RetNetConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    if config.deepnorm and not config.post_norm:
        raise LayoutError("deepnorm without post_norm: syncdoth's deepnorm always puts the norms after the sums.")
    if config.mlp_norm and config.post_norm:
        raise LayoutError("mlp_norm with post_norm: syncdoth's subln always puts the norms before the sums.")
    content = _write(config, dtype, special)["config.json"]
    content |= {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "use_glu": config.mlp == "glu",
        "use_lm_decay": config.decay == "log_spaced",
        "use_ffn_rms_norm": config.mlp_norm == "rms",
        "tie_word_embeddings": config.tie_embeddings,
        "score_normaliser": config.score_normaliser,
        "pad_token_id": None,
        "dtype": dtype,
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


def _buffers(config: RetNetConfig) -> dict[str, np.ndarray]:
    return rel_pos.buffers(config.n_heads, config.d_model // config.n_heads, config.decay)


_LOAD_TORCHSCALE = """import json, pathlib, torch
from safetensors.torch import load_file
from torchscale.architecture.config import RetNetConfig
from torchscale.architecture.retnet import RetNetDecoder
config = json.loads(pathlib.Path("{path}/config.json").read_text())
table = torch.nn.Embedding(config["vocab_size"], config["decoder_embed_dim"])
model = RetNetDecoder(RetNetConfig(**config), embed_tokens=table)
model.load_state_dict(load_file("{path}/model.safetensors"))"""
_LOAD_SYNCDOTH = """import ssm_jax.interop
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{path}")"""

SYNCDOTH = Layout(
    name="syncdoth",
    family="retnet",
    detect=_detect_syncdoth,
    read_config=_read_syncdoth,
    write_files=_write_syncdoth,
    tensors=_TENSORS,
    variants=lambda config: _PLAIN if config.mlp == "plain" else {},
    buffers=_buffers,
    aliases={},
    embedding=_EMBEDDING,
    head=_HEAD,
    differing_head="refuse",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=_LOAD_SYNCDOTH,
    torch_logits=transformers.torch_logits,
    rename=_rename,
    spelling=_spelling,
    infer=_infer,
)
TORCHSCALE = replace(
    SYNCDOTH,
    name="torchscale",
    detect=_detect,
    read_config=_read,
    write_files=_write_torchscale,
    stores_tied_head=True,
    load_in_torch=_LOAD_TORCHSCALE,
    torch_logits=None,
    unchecked="torchscale needs packages that are not installed here; the layout 'syncdoth' holds the same tensors and is compared",
    rename=lambda name: name,
    spelling=lambda config, name: name,
)
