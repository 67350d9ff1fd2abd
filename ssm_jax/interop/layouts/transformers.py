"""Hugging Face ``transformers`` folders: MambaForCausalLM and Mamba2ForCausalLM.

Defaults for missing fields are those of the classes MambaConfig and Mamba2Config (the latter describe a 7B model).
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts.fields import boolean, expect, integer, limits, number, text
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.layouts.mamba_names import HEAD, has_mamba2_names, has_mamba_names, mamba2_tensors, mamba_tensors
from ssm_jax.models import Mamba2Config, MambaConfig

EMBEDDING = "backbone.embeddings.weight"
_ALIASES = {"backbone.embedding.weight": EMBEDDING}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Name there -> ours. The first of several is the one to write."""
LOAD = 'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("{path}")'


def _detect_mamba(config: Json, names: Collection[str]) -> bool:
    return _model_type(config) == "mamba" or (_unnamed(config) and has_mamba_names(names))


def _detect_mamba2(config: Json, names: Collection[str]) -> bool:
    return _model_type(config) == "mamba2" or (_unnamed(config) and has_mamba2_names(names))


def _model_type(config: Json) -> Any:
    classes = {"MambaForCausalLM": "mamba", "Mamba2ForCausalLM": "mamba2"}
    architectures = config.get("architectures") or [None]
    return config.get("model_type") or classes.get(architectures[0])


def _unnamed(config: Json) -> bool:
    return _model_type(config) is None and "hidden_size" in config


def _read_shared(config: Json, vocab_size: int, hidden_size: int, layers: int) -> dict[str, Any]:
    expect(config, "hidden_act", "silu", "swish")
    expect(config, "rms_norm", True)
    return {
        # The file states rows; what they were padded from is not known.
        "vocab_size": integer(config, "vocab_size", vocab_size),
        "pad_vocab_size_multiple": 1,
        "d_model": integer(config, "hidden_size", hidden_size),
        "n_layers": integer(config, "num_hidden_layers", layers),
        "d_conv": integer(config, "conv_kernel", 4),
        "expand": integer(config, "expand", 2),
        "bias": boolean(config, "use_bias", False),
        "conv_bias": boolean(config, "use_conv_bias", True),
        "norm_eps": number(config, "layer_norm_epsilon", 1e-5),
        "residual_in_fp32": boolean(config, "residual_in_fp32", True),
        "dt_min": number(config, "time_step_min", 1e-3),
        "dt_max": number(config, "time_step_max", 0.1),
        "dt_init_floor": number(config, "time_step_floor", 1e-4),
    }


def _read_mamba(config: Json) -> dict[str, Any]:
    fields = _read_shared(config, 50280, 768, 32)
    inner = fields["expand"] * fields["d_model"]
    if integer(config, "intermediate_size", inner) != inner:
        raise LayoutError(f"'intermediate_size' is {config['intermediate_size']}; expand * hidden_size is {inner}.")
    rank = config.get("time_step_rank", "auto")
    return fields | {
        "d_state": integer(config, "state_size", 16),
        "dt_rank": rank if rank == "auto" else integer(config, "time_step_rank"),
        "tie_embeddings": boolean(config, "tie_word_embeddings", True),
        "dt_init": text(config, "time_step_init_scheme", "random"),
        "dt_scale": number(config, "time_step_scale", 1.0),
    }


def _read_mamba2(config: Json) -> dict[str, Any]:
    fields = _read_shared(config, 32768, 4096, 64)
    heads, width = integer(config, "num_heads", 128), integer(config, "head_dim", 64)
    if heads * width != fields["expand"] * fields["d_model"]:
        raise LayoutError(
            f"'num_heads' x 'head_dim' is {heads} x {width}; the product must be expand * hidden_size = "
            f"{fields['expand'] * fields['d_model']}."
        )
    return fields | {
        "d_state": integer(config, "state_size", 128),
        "headdim": width,
        "ngroups": integer(config, "n_groups", 8),
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
        "dt_limit": limits(config, "time_step_limit"),
    }


def _write_files(
    model_type: str,
    architecture: str,
    config: MambaConfig | Mamba2Config,
    own: Json,
    dtype: str,
    special: Json,
) -> dict[str, dict[str, Any]]:
    content = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "state_size": config.d_state,
        "num_hidden_layers": config.n_layers,
        "expand": config.expand,
        "conv_kernel": config.d_conv,
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        "time_step_min": config.dt_min,
        "time_step_max": config.dt_max,
        "time_step_floor": config.dt_init_floor,
        "initializer_range": 0.1,
        # True makes transformers 5.23 rescale out_proj after loading it, without a word.
        "rescale_prenorm_residual": False,
        "use_cache": True,
        "dtype": dtype,
        **own,
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": True}}


def _write_mamba(config: MambaConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    own = {
        "intermediate_size": config.d_inner,
        "time_step_rank": config.dt_rank_resolved,
        "time_step_init_scheme": config.dt_init,
        "time_step_scale": config.dt_scale,
    }
    return _write_files("mamba", "MambaForCausalLM", config, own, dtype, special)


def _write_mamba2(config: Mamba2Config, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    own: dict[str, Any] = {
        "num_heads": config.heads,
        "head_dim": config.headdim,
        "n_groups": config.ngroups,
        "chunk_size": config.chunk_size or 256,
    }
    low, high = config.dt_limit
    if (low, high) != (0.0, math.inf):  # absent means (0, inf): strict JSON that every release reads
        own["time_step_limit"] = [low, {"__float__": "Infinity"} if high == math.inf else high]
    return _write_files("mamba2", "Mamba2ForCausalLM", config, own, dtype, special)


def read_activation(config: Json, key: str, default: str) -> str:
    """Our name of an activation. Raises LayoutError for one that ssm_jax lacks."""
    activation = text(config, key, default)
    if activation not in ACTIVATIONS:
        raise LayoutError(f"{key!r} is {activation!r}; ssm_jax has {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[activation]


def write_activation(activation: str) -> str:
    """The name there of an activation of ours."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


def read_angles(config: Json) -> dict[str, Any]:
    """What a config says of rotary angles, in either spelling: ``rope_parameters`` (transformers 5) or ``rope_scaling``.

    Raises:
        LayoutError: angles that are stretched.
    """
    angles: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        said = config.get(key) or {}
        if not isinstance(said, Mapping):
            raise LayoutError(f"{key!r} is {said!r}; it must be a table.")
        kind = said.get("rope_type", said.get("type", "default"))
        if kind != "default":
            raise LayoutError(
                f"{key!r} is of the kind {kind!r}; ssm_jax has only 'default', angles as they were published."
            )
        angles |= said
    return angles


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits of the class that ``AutoModelForCausalLM`` picks for the folder.

    Raises:
        LayoutError: tensors that transformers misses, does not expect, or finds in another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet(), torch.no_grad():
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
        if wrong:
            raise LayoutError(f"transformers does not load {folder} as it is: {wrong}; please report this.")
        return model.eval()(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers and its advice about kernels."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


MAMBA = Layout(
    name="transformers",
    family="mamba",
    detect=_detect_mamba,
    read_config=_read_mamba,
    write_files=_write_mamba,
    tensors=mamba_tensors(EMBEDDING),
    aliases=_ALIASES,
    embedding=EMBEDDING,
    head=HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=LOAD,
    torch_logits=torch_logits,
)
MAMBA2 = Layout(
    name="transformers",
    family="mamba2",
    detect=_detect_mamba2,
    read_config=_read_mamba2,
    write_files=_write_mamba2,
    tensors=mamba2_tensors(EMBEDDING),
    aliases=_ALIASES,
    embedding=EMBEDDING,
    head=HEAD,
    differing_head="untie",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch=LOAD,
    torch_logits=torch_logits,
)
