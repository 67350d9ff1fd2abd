"""DenseMamba, which nobody has published: the folder of transformers' Mamba, and the names of DenseSSM for what fusion adds."""

from collections.abc import Collection
from typing import Any

from ssm_jax.interop.layouts import transformers
from ssm_jax.interop.layouts.fields import integer, text
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.layouts.mamba_names import HEAD, mamba_tensors
from ssm_jax.interop.tensor_map import TensorMap, linear
from ssm_jax.models import DenseMambaConfig

MODEL_TYPE = "dense_mamba"
_MIXER = "backbone.layers.{i}.mixer."
_TENSORS: TensorMap = {
    **mamba_tensors(transformers.EMBEDDING),
    _MIXER + "h_select.fc1.weight": (linear("layers/mixer/gate/down/kernel"),),
    _MIXER + "h_select.fc2.weight": (linear("layers/mixer/gate/up/kernel"),),
}
_GATES = {"channel": "channel", "state": "state", "none": None}


def _detect(config: Json, names: Collection[str]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def _read(config: Json) -> dict[str, Any]:
    return transformers.MAMBA.read_config(config) | {
        "dense_layers": integer(config, "dense_block_layers", 2),
        "gate": _GATES.get(text(config, "h_select", "channel"), "unknown"),
        "gate_ratio": integer(config, "intermediate_h_select_scale", 32),
        "projection": text(config, "source_projection", "identity"),
    }


def _write(config: DenseMambaConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    assert transformers.MAMBA.write_files is not None
    files = transformers.MAMBA.write_files(config, dtype, special)
    files["config.json"] |= {
        "architectures": ["DenseMambaForCausalLM"],
        "model_type": MODEL_TYPE,
        "dense_block_layers": config.dense_layers,
        "h_select": config.gate or "none",
        "intermediate_h_select_scale": config.gate_ratio,
        "source_projection": config.projection,
    }
    return files


def _matrices(config: DenseMambaConfig) -> TensorMap:
    sources = range(config.dense_layers if config.projection == "linear" else 0)
    return {_MIXER + f"h_source.{k}.weight": (linear(f"layers/mixer/source_{k}/kernel"),) for k in sources}


DENSE_MAMBA = Layout(
    name="dense_mamba",
    family="dense_mamba",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors=_TENSORS,
    variants=_matrices,
    aliases={},
    embedding=transformers.EMBEDDING,
    head=HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch="import ssm_jax.interop\n" + transformers.LOAD,
    torch_logits=transformers.torch_logits,
)
