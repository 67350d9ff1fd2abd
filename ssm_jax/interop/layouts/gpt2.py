"""GPT-2: ``transformers`` folders (GPT2LMHeadModel), and OpenAI's original tensors, read only.

Both hold matrices as (in, out), with q, k and v side by side in one; OpenAI's have a leading axis of size 1 besides.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import transformers
from ssm_jax.interop.layouts.fields import boolean, expect, integer, number
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor_map import Part, TensorMap, conv1d, linear, same, vector
from ssm_jax.models import GPT2Config

_HEAD = "lm_head.weight"
_PREFIX = "transformer."
_QKV = ("q_proj", "k_proj", "v_proj")


def _tensors(layer: str, weight: str, bias: str, scale: str, leading: tuple[int, ...]) -> TensorMap:
    """The tensors of a layer: ``weight`` and ``bias`` of a projection, ``scale`` of a norm, are how names end."""

    def matrix(leaf: str, inputs: int = 1) -> Part:
        return conv1d(f"layers/{leaf}/kernel", inputs, leading)

    return {
        f"{layer}ln_1{scale}": (vector("layers/norm/scale"),),
        f"{layer}ln_1{bias}": (vector("layers/norm/bias"),),
        f"{layer}attn{weight[0]}c_attn{weight}": tuple(matrix(f"mixer/{name}") for name in _QKV),
        f"{layer}attn{weight[0]}c_attn{bias}": tuple(vector(f"layers/mixer/{name}/bias") for name in _QKV),
        f"{layer}attn{weight[0]}c_proj{weight}": (matrix("mixer/out_proj", inputs=2),),
        f"{layer}attn{weight[0]}c_proj{bias}": (vector("layers/mixer/out_proj/bias"),),
        f"{layer}ln_2{scale}": (vector("layers/mlp_norm/scale"),),
        f"{layer}ln_2{bias}": (vector("layers/mlp_norm/bias"),),
        f"{layer}mlp{weight[0]}c_fc{weight}": (matrix("mlp/up_proj"),),
        f"{layer}mlp{weight[0]}c_fc{bias}": (vector("layers/mlp/up_proj/bias"),),
        f"{layer}mlp{weight[0]}c_proj{weight}": (matrix("mlp/down_proj"),),
        f"{layer}mlp{weight[0]}c_proj{bias}": (vector("layers/mlp/down_proj/bias"),),
    }


def _detect(config: Json, names: Collection[str]) -> bool:
    architectures = config.get("architectures") or [None]
    if "model_type" in config or architectures[0]:
        return config.get("model_type", "gpt2") == "gpt2" and architectures[0] in (None, "GPT2LMHeadModel", "GPT2Model")
    return "n_embd" in config and any(name.endswith("h.0.attn.c_attn.weight") for name in names)


def _rename(name: str) -> str | None:
    """Files of the first releases lack the prefix; the causal mask and its value are buffers."""
    if re.search(r"h\.\d+\.attn\.(bias|masked_bias)$", name):
        return None
    return name if name == _HEAD or name.startswith(_PREFIX) else _PREFIX + name


def _read(config: Json) -> dict[str, Any]:
    expect(config, "scale_attn_weights", True)
    expect(config, "scale_attn_by_inverse_layer_idx", False)
    expect(config, "add_cross_attention", False)
    positions = integer(config, "n_positions", config.get("n_ctx", 1024))
    if integer(config, "n_ctx", positions) != positions:
        raise LayoutError(f"'n_ctx' is {config['n_ctx']} and 'n_positions' {positions}; they must be equal.")
    return {
        # The file states rows; what they were padded from is not known.
        "vocab_size": integer(config, "vocab_size", 50257),
        "pad_vocab_size_multiple": 1,
        "d_model": integer(config, "n_embd", 768),
        "n_layers": integer(config, "n_layer", 12),
        "n_heads": integer(config, "n_head", 12),
        "n_positions": positions,
        "d_mlp": None if config.get("n_inner") is None else integer(config, "n_inner"),
        "activation": transformers.read_activation(config, "activation_function", "gelu_new"),
        "norm_eps": number(config, "layer_norm_epsilon", 1e-5),
        # Those of the embedding and of the attention weights (embd_pdrop, attn_pdrop) have no counterpart here.
        "dropout": number(config, "resid_pdrop", 0.1),
        "tie_embeddings": boolean(config, "tie_word_embeddings", True),
    }


def _write(config: GPT2Config, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    content = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.padded_vocab_size,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "activation_function": transformers.write_activation(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


def _read_openai(config: Json) -> dict[str, Any]:
    return {
        "vocab_size": integer(config, "n_vocab"),
        "n_positions": integer(config, "n_ctx"),
        "d_model": integer(config, "n_embd"),
        "n_layers": integer(config, "n_layer"),
        "n_heads": integer(config, "n_head"),
        "tie_embeddings": True,
    }


TRANSFORMERS = Layout(
    name="transformers",
    family="gpt2",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors={
        "transformer.wte.weight": (same("embed/embedding"),),
        "transformer.wpe.weight": (same("embed_position/embedding"),),
        **_tensors("transformer.h.{i}.", ".weight", ".bias", ".weight", ()),
        "transformer.ln_f.weight": (vector("norm_f/scale"),),
        "transformer.ln_f.bias": (vector("norm_f/bias"),),
        _HEAD: (linear("head/kernel"),),
    },
    aliases={},
    rename=_rename,
    embedding="transformer.wte.weight",
    head=_HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=transformers.LOAD,
    torch_logits=transformers.torch_logits,
)
OPENAI = replace(
    TRANSFORMERS,
    name="openai",
    config_file="hparams.json",
    detect=lambda config, names: "n_embd" in config and "model/wte" in names,
    read_config=_read_openai,
    write_files=None,
    tensors={
        "model/wte": (same("embed/embedding"),),
        "model/wpe": (same("embed_position/embedding"),),
        **_tensors("model/h{i}/", "/w", "/b", "/g", (1,)),
        "model/ln_f/g": (vector("norm_f/scale"),),
        "model/ln_f/b": (vector("norm_f/bias"),),
    },
    rename=lambda name: name,
    embedding="model/wte",
    head="",
    torch_logits=None,
)
