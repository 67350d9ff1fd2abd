"""RetNet in folders of flash-linear-attention (``RetNetForCausalLM`` of its version 0.6; not syncdoth's class of that name).

Its retention differs from the published one: pairs for rotation are the halves of a head, scores are not divided by sqrt(S_n), and
the norm after retention has a scale.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts.fields import boolean, expect, integer, number
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.tensor_map import TensorMap, linear, same, vector
from ssm_jax.models import RetNetConfig
from ssm_jax.models.common import round_up

_EMBEDDING, _HEAD = "model.embeddings.weight", "lm_head.weight"
_LAYER = "model.layers.{i}."
_GATE = "model.layers.0.mlp.gate_proj.weight"
_TENSORS: TensorMap = {
    _EMBEDDING: (same("embed/embedding"),),
    _LAYER + "attn_norm.weight": (vector("layers/norm/scale"),),
    **{
        _LAYER + f"attn.{name}.weight": (linear(f"layers/mixer/{name}/kernel"),)
        for name in ("q_proj", "k_proj", "v_proj", "g_proj")
    },
    _LAYER + "attn.g_norm_swish_gate.weight": (vector("layers/mixer/head_norm/scale"),),
    _LAYER + "attn.o_proj.weight": (linear("layers/mixer/out_proj/kernel", inputs=2),),
    _LAYER + "mlp_norm.weight": (vector("layers/mlp_norm/scale"),),
    **{
        _LAYER + f"mlp.{name}.weight": (linear(f"layers/mlp/{name}/kernel"),)
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    "model.norm.weight": (vector("norm_f/scale"),),
    _HEAD: (linear("head/kernel"),),
}
_OURS = {
    "rotary": "halves",
    "score_scale": False,
    "score_normaliser": None,
    "decay": "powers",
    "mlp": "glu",
    "activation": "silu",
    "post_norm": False,
    "deepnorm": False,
    "embedding_scale": False,
    "embedding_norm": False,
}
"""What every such model is."""


def _detect(config: Json, names: Collection[str]) -> bool:
    return "model.layers.0.attn.g_proj.weight" in names


def _rename(name: str) -> str | None:
    """``fuse_norm=False`` spells the norm differently; the frequencies of the angles are a buffer."""
    return (
        None
        if name.endswith("rotary.inv_freq")
        else name.replace(".attn.g_norm.weight", ".attn.g_norm_swish_gate.weight")
    )


def _read(config: Json) -> dict[str, Any]:
    """Other options of the package (convolutions, attention between, shared keys) fail here or by their tensors' names."""
    expect(config, "hidden_act", "swish")
    expect(config, "expand_k", 1.0, 1)
    expect(config, "use_output_gate", True)
    for key in ("feature_map", "attn", "attnres_block_size"):
        expect(config, key, None)
    heads = integer(config, "num_heads", 8)
    expect(config, "num_kv_heads", None, heads)
    width = integer(config, "hidden_size", 2048)
    ratio = 2 if config.get("hidden_ratio", 2) is None else number(config, "hidden_ratio", 2)
    inner = config.get("intermediate_size")
    return {
        "vocab_size": integer(config, "vocab_size", 32000),
        "d_model": width,
        "n_layers": integer(config, "num_hidden_layers", 24),
        "n_heads": heads,
        "d_value": round(width * number(config, "expand_v", 2.0)),
        "d_mlp": round_up(int(width * ratio * 2 / 3), 256) if inner is None else integer(config, "intermediate_size"),
        "norm_scale": boolean(config, "elementwise_affine", True),
        "norm_eps": number(config, "norm_eps", 1e-6),
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
        **_OURS,
    }


def _infer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"d_mlp": tensors[_GATE].shape[0]} if _GATE in tensors else {}


def _write(config: RetNetConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    for name, value in _OURS.items():
        if getattr(config, name) != value:
            raise LayoutError(
                f"{name} is {getattr(config, name)!r}, and flash-linear-attention has only {value!r}; use the layout 'syncdoth'."
            )
    if (keys := config.d_model // config.n_heads) > 256:
        raise LayoutError(
            f"keys are {keys} wide, and flash-linear-attention has at most 256; use the layout 'ssm_jax'."
        )
    content = {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "attn_mode": "chunk",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "expand_k": 1.0,
        "expand_v": config.d_value / config.d_model,
        "hidden_ratio": None,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_heads": config.n_heads,
        "num_kv_heads": None,
        "feature_map": None,
        "hidden_act": "swish",
        "use_short_conv": False,
        "use_output_gate": True,
        "elementwise_affine": config.norm_scale,
        "norm_eps": config.norm_eps,
        "attn": None,
        "fuse_norm": True,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the class has numbers for what is left out
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


FLA = Layout(
    name="fla",
    family="retnet",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors=_TENSORS,
    aliases={},
    rename=_rename,
    embedding=_EMBEDDING,
    head=_HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch="import fla\nfrom transformers import AutoModelForCausalLM\n"
    'model = AutoModelForCausalLM.from_pretrained("{path}")',
    unchecked="flash-linear-attention needs a GPU; its reading of the layout is pinned by stored numbers",
    infer=_infer,
)
