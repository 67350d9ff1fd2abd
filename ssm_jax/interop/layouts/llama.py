"""LLaMA: ``transformers`` folders (LlamaForCausalLM)."""

from collections.abc import Collection
from typing import Any

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import transformers
from ssm_jax.interop.layouts.fields import boolean, expect, integer, number
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor_map import TensorMap, linear, same, vector
from ssm_jax.models import LlamaConfig

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "model."
_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
"""Published name -> ours."""


def _tensors(layer: str) -> TensorMap:
    perceptron = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{layer}input_layernorm.weight": (vector("layers/norm/scale"),),
        **{
            f"{layer}self_attn.{theirs}.weight": (
                linear(f"layers/mixer/{ours}/kernel", inputs=2 if ours == "out_proj" else 1),
            )
            for theirs, ours in _ATTENTION.items()
        },
        **{
            f"{layer}self_attn.{theirs}.bias": (vector(f"layers/mixer/{ours}/bias"),)
            for theirs, ours in _ATTENTION.items()
        },
        f"{layer}post_attention_layernorm.weight": (vector("layers/mlp_norm/scale"),),
        **{f"{layer}mlp.{name}.weight": (linear(f"layers/mlp/{name}/kernel"),) for name in perceptron},
        **{f"{layer}mlp.{name}.bias": (vector(f"layers/mlp/{name}/bias"),) for name in perceptron},
    }


def _detect(config: Json, names: Collection[str]) -> bool:
    """DenseRetNet's folders say the same type and class; their attention has no ``o_proj``."""
    architecture = (config.get("architectures") or [None])[0]
    kind = config.get("model_type", "llama" if architecture in _ARCHITECTURES else None)
    said = kind == "llama" and architecture in (None, *_ARCHITECTURES)
    return said and any(name.endswith("layers.0.self_attn.o_proj.weight") for name in names)


def _rename(name: str) -> str | None:
    """The frequencies of the angles are a buffer of old releases; the model without its head lacks the prefix."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return name if name == _HEAD or name.startswith(_PREFIX) else _PREFIX + name


def _read(config: Json) -> dict[str, Any]:
    expect(config, "hidden_act", "silu", "swish")
    expect(config, "pretraining_tp", 1, None)

    def optional(key: str) -> int | None:
        return None if config.get(key) is None else integer(config, key)

    return {
        # The file states rows; what they were padded from is not known.
        "vocab_size": integer(config, "vocab_size", 32000),
        "pad_vocab_size_multiple": 1,
        "d_model": integer(config, "hidden_size", 4096),
        "d_mlp": integer(config, "intermediate_size", 11008),
        "n_layers": integer(config, "num_hidden_layers", 32),
        "n_heads": integer(config, "num_attention_heads", 32),
        "n_kv_heads": optional("num_key_value_heads"),
        "head_dim": optional("head_dim"),
        "n_positions": integer(config, "max_position_embeddings", config.get("max_sequence_length", 2048)),
        "rope_base": number(transformers.read_angles(config), "rope_theta", number(config, "rope_theta", 10_000.0)),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "attention_bias": boolean(config, "attention_bias", False),
        "mlp_bias": boolean(config, "mlp_bias", False),
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
        # The published dropout is that of the attention weights (attention_dropout), which has no counterpart here.
    }


def _write(config: LlamaConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    if config.d_model % config.n_heads:
        raise LayoutError(
            f"n_heads {config.n_heads} does not divide d_model = {config.d_model}, and transformers takes no such model; use the "
            "layout 'ssm_jax'."
        )
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp_resolved,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads_resolved,
        "head_dim": config.head_dim_resolved,
        "hidden_act": "silu",
        "max_position_embeddings": config.n_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,  # for releases before 5
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "pretraining_tp": 1,
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
    family="llama",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors={
        _EMBEDDING: (same("embed/embedding"),),
        **_tensors("model.layers.{i}."),
        "model.norm.weight": (vector("norm_f/scale"),),
        _HEAD: (linear("head/kernel"),),
    },
    aliases={},
    rename=_rename,
    embedding=_EMBEDDING,
    head=_HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=transformers.LOAD,
    torch_logits=transformers.torch_logits,
)
