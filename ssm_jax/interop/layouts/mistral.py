"""The original files of Mamba-Codestral: ``params.json`` and ``consolidated.safetensors``, read only.

They hold mamba_ssm's Mamba-2 under a wrapper, which puts ``model.`` before every name.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ssm_jax.interop.layouts import mamba_ssm
from ssm_jax.interop.layouts.fields import boolean, integer
from ssm_jax.interop.layouts.layout import Json


def _detect(config: Json, names: Collection[str]) -> bool:
    return config.get("model_type") == "mamba" and "dim" in config


def _read(config: Json) -> dict[str, Any]:
    return mamba_ssm.MAMBA2.read_config(
        {
            "d_model": integer(config, "dim"),
            "n_layer": integer(config, "n_layers"),
            "vocab_size": integer(config, "vocab_size"),
            "ssm_cfg": {"layer": "Mamba2", "ngroups": integer(config, "n_groups", 1)},
            "rms_norm": boolean(config, "rms_norm", True),
            "residual_in_fp32": boolean(config, "residual_in_fp32", True),
            "pad_vocab_size_multiple": integer(config, "pad_vocab_size_multiple", 1),
            "tie_embeddings": boolean(config, "tie_embeddings", False),
        }
    )


MAMBA2 = replace(
    mamba_ssm.MAMBA2,
    name="mistral",
    detect=_detect,
    read_config=_read,
    write_files=None,
    config_file="params.json",
)
