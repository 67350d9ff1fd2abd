"""GPT-NeoX: ``transformers`` folders (GPTNeoXForCausalLM), Pythia's among them.

Rows of the one matrix of q, k and v stand head by head: those of q, k and v of the first head, then of the second.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import transformers
from ssm_jax.interop.layouts.fields import boolean, integer, number
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor_map import TensorMap, head_linear, head_vector, linear, same, vector
from ssm_jax.models import GPTNeoXConfig

_EMBEDDING, _HEAD = "gpt_neox.embed_in.weight", "embed_out.weight"
_PREFIX = "gpt_neox."
_ARCHITECTURES = ("GPTNeoXForCausalLM", "GPTNeoXModel")
_QKV = ("q_proj", "k_proj", "v_proj")
_LINEAR = {
    "attention.dense": ("mixer/out_proj", 2),
    "mlp.dense_h_to_4h": ("mlp/up_proj", 1),
    "mlp.dense_4h_to_h": ("mlp/down_proj", 1),
}
"""Published name -> ours, and its number of input axes."""
_NORMS = {"input_layernorm": "norm", "post_attention_layernorm": "mlp_norm"}
_HEAD_OF_MODULE = {"lm_head.weight": _HEAD}
"""What the head is called in memory since transformers 5.23; files keep the old name."""


def _tensors(layer: str) -> TensorMap:
    qkv = layer + "attention.query_key_value"
    return {
        **{f"{layer}{theirs}.weight": (vector(f"layers/{ours}/scale"),) for theirs, ours in _NORMS.items()},
        **{f"{layer}{theirs}.bias": (vector(f"layers/{ours}/bias"),) for theirs, ours in _NORMS.items()},
        f"{qkv}.weight": tuple(head_linear(f"layers/mixer/{name}/kernel") for name in _QKV),
        f"{qkv}.bias": tuple(head_vector(f"layers/mixer/{name}/bias") for name in _QKV),
        **{
            f"{layer}{theirs}.weight": (linear(f"layers/{ours}/kernel", inputs),)
            for theirs, (ours, inputs) in _LINEAR.items()
        },
        **{f"{layer}{theirs}.bias": (vector(f"layers/{ours}/bias"),) for theirs, (ours, _) in _LINEAR.items()},
    }


def _detect(config: Json, names: Collection[str]) -> bool:
    architecture = (config.get("architectures") or [None])[0]
    kind = config.get("model_type", "gpt_neox" if architecture in _ARCHITECTURES else None)
    return kind == "gpt_neox" and architecture in (None, *_ARCHITECTURES)


def _rename(name: str) -> str | None:
    """Old releases stored the causal mask, its value and the frequencies; the model without its head lacks the prefix."""
    if re.search(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$", name):
        return None
    return name if name in (_HEAD, *_HEAD_OF_MODULE) or name.startswith(_PREFIX) else _PREFIX + name


def _read(config: Json) -> dict[str, Any]:
    angles = transformers.read_angles(config)
    return {
        # The file states rows; what they were padded from is not known.
        "vocab_size": integer(config, "vocab_size", 50432),
        "pad_vocab_size_multiple": 1,
        "d_model": integer(config, "hidden_size", 6144),
        "n_layers": integer(config, "num_hidden_layers", 44),
        "n_heads": integer(config, "num_attention_heads", 64),
        "d_mlp": integer(config, "intermediate_size", 24576),
        "n_positions": integer(config, "max_position_embeddings", 2048),
        "rotary_fraction": _angle(config, angles, "partial_rotary_factor", "rotary_pct", 0.25),
        "rope_base": _angle(config, angles, "rope_theta", "rotary_emb_base", 10_000.0),
        "parallel_residual": boolean(config, "use_parallel_residual", True),
        "activation": transformers.read_activation(config, "hidden_act", "gelu"),
        "attention_bias": boolean(config, "attention_bias", True),
        "norm_eps": number(config, "layer_norm_eps", 1e-5),
        # There also that of the embedding; that of the attention weights (attention_dropout) has no counterpart here.
        "dropout": number(config, "hidden_dropout", 0.0),
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
    }


def _angle(config: Json, angles: Mapping[str, Any], new: str, old: str, default: float) -> float:
    """``new`` of the table of angles, or else ``old`` beside it: what transformers reads.

    Raises:
        LayoutError: something else that the config says as well, and of which releases of transformers would make another model.
    """
    value = number(angles, new, number(config, old, default))
    for key in (old, new):
        if number(config, key, value) != value:
            raise LayoutError(
                f"{key!r} is {config[key]!r}, and transformers would take {value:g}; keep one of the two."
            )
    return value


def _write(config: GPTNeoXConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    angles = {"rope_theta": config.rope_base, "partial_rotary_factor": config.rotary_fraction}
    content = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp_resolved,
        "hidden_act": transformers.write_activation(config.activation),
        "max_position_embeddings": config.n_positions,
        "rope_parameters": {"rope_type": "default", **angles},
        "rotary_emb_base": config.rope_base,  # for releases before 5, as is the next
        "rotary_pct": config.rotary_fraction,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": config.dropout,
        "classifier_dropout": 0.0,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the class has numbers for what is left out
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


TRANSFORMERS = Layout(
    name="transformers",
    family="gpt_neox",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors={
        _EMBEDDING: (same("embed/embedding"),),
        **_tensors("gpt_neox.layers.{i}."),
        "gpt_neox.final_layer_norm.weight": (vector("norm_f/scale"),),
        "gpt_neox.final_layer_norm.bias": (vector("norm_f/bias"),),
        _HEAD: (linear("head/kernel"),),
    },
    aliases=_HEAD_OF_MODULE,
    rename=_rename,
    embedding=_EMBEDDING,
    head=_HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=transformers.LOAD,
    torch_logits=transformers.torch_logits,
)
