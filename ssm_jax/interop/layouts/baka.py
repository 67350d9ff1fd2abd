"""Baka: the state dicts of Maykeye's BakaLLM, in the spellings of its branches.

The author saved ``state_dict()`` alone: a folder of his is ``config.json`` with the fields of his config beside the weights.
What they do not say is read from the weights: which norm, gates, steps, the layers with a Mamba, rows of memory. Read are

* ``attn.q``, ``mlp.fc_up``, ``norm_mamba``, ``mamba.A_log`` (005_rmt, 007_mamba);
* ``attn.base.q``, ``mlp.base.fc_up``, and then ``mlp.fc_gate`` is the gate of a branch (00x_steps);
* ``attn.qkv_prep.q``, ``mamba.norm_in``, ``mamba.mamba.A_log`` (00x_celp18, 008_mamba88d);

each with ``_orig_mod``, torch.compile's, anywhere or nowhere. ``rot.freqs`` follows from the config: it is written, and not read.

``BAKALLM`` writes the first two, for the model in ``interop.torch``: beside the author's keys config.json has, under our names,
every switch that he has no key for. ``CELP18`` writes what that branch loads, and nothing but its network.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import transformers
from ssm_jax.interop.layouts.baka_names import (
    EMBEDDING,
    FIRST,
    HEAD,
    MEMORY,
    PAUSE,
    SHARED_STEP,
    TENSORS,
    buffers,
    rename,
    spelling_of_celp18,
    uncompiled,
    variants,
)
from ssm_jax.interop.layouts.fields import boolean, expect, integer, number, text
from ssm_jax.interop.layouts.layout import Json, Layout
from ssm_jax.interop.tensor import Tensor
from ssm_jax.models import BakaConfig

_AUTHORS = {
    "n_vocab": "vocab_size",
    "dim_model": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_ctx": "n_ctx",
    "n_pauses": "n_pauses",
    "n_rmt_tokens": "n_rmt_tokens",
    "mamba_each_nth_layer": "mamba_every",
}
"""His key -> ours."""
_WIDTHS = {"dim_ff": "d_mlp", "dim_attn": "d_attn"}
"""The same; 0 stands for a default there."""
_OURS: dict[str, Callable[[Json, str], Any]] = {
    **dict.fromkeys(
        ("rmt_read", "xl_layer", "chunk_boundary", "norm", "gate", "gate_input", "step", "step_reach"), text
    ),
    **dict.fromkeys(("norm_eps", "elephant_width", "elephant_power", "rope_base", "dropout"), number),
    **dict.fromkeys(("step_shared", "mamba_carry", "residual_in_fp32"), boolean),
    **dict.fromkeys(("d_state", "d_conv", "expand"), integer),
    "dt_rank": lambda config, key: "auto" if config[key] == "auto" else integer(config, key),
}
"""Keys that are ours in config.json too, and how each is read."""
_ACTIVATIONS = {"elephant": "elephant", "elephant18_fast": "elephant", "silu": "silu"}
"""His name -> ours. The first of several is the one to write."""
_CELP18 = {
    "rmt_read": "head",
    "mamba_every": 1,
    "xl_layer": "same",
    "norm": "layer",
    "norm_eps": 1e-5,
    "gate": "none",
    "step": "none",
    "mamba_carry": False,
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "rope_base": 10_000.0,
    "tie_embeddings": False,
}
"""What the branch has no key for, or is what it is."""


def _detect(config: Json, names: Collection[str]) -> bool:
    return _is_baka(config, names) and not _is_celp18(names)


def _detect_celp18(config: Json, names: Collection[str]) -> bool:
    return _is_baka(config, names) and _is_celp18(names)


def _is_celp18(names: Collection[str]) -> bool:
    return any(".mamba.norm_in." in uncompiled(name) for name in names)


def _is_baka(config: Json, names: Collection[str]) -> bool:
    kind = config.get("model_type")
    if kind is None:
        return "dim_model" in config and {EMBEDDING, FIRST + "norm_in.weight"} <= {uncompiled(name) for name in names}
    return str(kind).split("_")[0] == "baka"


def _read(config: Json) -> dict[str, Any]:
    """What the config says; ``_infer`` finds the rest."""
    expect(config, "is_pause_pos_random", False)
    expect(config, "use_flash_attn", True)  # his other branch masks differently
    expect(config, "rmt_solidifier", "none", None)
    fields: dict[str, Any] = {ours: integer(config, key) for key, ours in _AUTHORS.items() if key in config}
    fields |= {ours: integer(config, key) or None for key, ours in _WIDTHS.items() if config.get(key) is not None}
    fields |= {key: read(config, key) for key, read in _OURS.items() if key in config}
    activation = text(config, "act_fn", "elephant")
    if activation not in _ACTIVATIONS:
        raise LayoutError(f"'act_fn' is {activation!r}; ssm_jax has {', '.join(_ACTIVATIONS)}.")
    return {
        **fields,
        "act": _ACTIVATIONS[activation],
        "tie_embeddings": boolean(config, "tie_word_embeddings", False),
    }


def _read_celp18(config: Json) -> dict[str, Any]:
    return {"rmt_read": "head", **_read(config)}


def _infer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the config does not say, as far as the weights do; what it says stands."""
    found = {key: value for key, value in _of_weights(tensors).items() if key not in fields}
    for key, ours in _AUTHORS.items():
        if ours in ("vocab_size", "d_model", "n_layers", "n_heads") and ours not in fields and ours not in found:
            raise LayoutError(f"{key!r} is missing in config.json; it has the fields of the author's BakaConfig.")
    return found


def _of_weights(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def size(name: str, axis: int) -> int | None:
        shape = tensors[name].shape if name in tensors else ()
        return shape[axis] if -len(shape) <= axis < len(shape) else None

    numbers = sorted({int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))})
    with_mamba = [i for i in numbers if f"model.layers.{i}.mamba.A_log" in tensors]
    gated = FIRST + "attn.fc_gate.weight" in tensors
    base, kind = ("base." if gated else ""), ("layer" if "norm_out.bias" in tensors else "rms")
    shared, stepped = SHARED_STEP in tensors, f"{FIRST}step_forward.{base}step.weight" in tensors
    found: dict[str, Any] = {
        "vocab_size": size(EMBEDDING, 0) or size(HEAD, 0),
        "d_model": size("norm_out.weight", 0),
        "n_layers": len(numbers) or None,
        "d_mlp": size(f"{FIRST}mlp.{base}fc_up.weight", 0),
        "d_attn": size(f"{FIRST}attn.{base}q.weight", 0),
        "n_pauses": None if PAUSE in tensors else 0,
        "n_rmt_tokens": size(MEMORY, 0) or 0,
        "xl_layer": "below" if gated or stepped else "same",
        "norm": kind,
        "norm_eps": {"layer": 1e-5, "rms": 1e-6}[kind],
        "gate": "relu" if gated else "none",
        "step": "nstep4" if shared or stepped else "none",
        "step_shared": shared,
        "mamba_every": (with_mamba[1] if len(with_mamba) > 1 else len(numbers)) if with_mamba else 0,
    }
    if with_mamba:
        D, E, rank = (
            size(f"{FIRST}mamba.{name}.weight", axis)
            for name, axis in (("in_proj", 1), ("out_proj", 1), ("dt_proj", 1))
        )
        found |= {
            "d_state": size(FIRST + "mamba.A_log", 1),
            "d_conv": size(FIRST + "mamba.conv1d.weight", 2),
            "expand": E // D if D and E else None,
            "dt_rank": "auto" if D and rank == -(-D // 16) else rank,
        }
    return {key: value for key, value in found.items() if value is not None}


def _authors(config: BakaConfig) -> dict[str, Any]:
    return {
        **{key: getattr(config, ours) for key, ours in _AUTHORS.items()},
        "n_vocab": config.padded_vocab_size,
        "dim_ff": config.d_mlp_resolved,
        "dim_attn": config.d_attn_resolved,
        "act_fn": next(name for name, ours in _ACTIVATIONS.items() if ours == config.act),
    }


def _write(config: BakaConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    cached = config.chunk_boundary == "stream"  # else a generated token would be a chunk of its own
    content = {
        "architectures": ["BakaForCausalLM"],
        "model_type": "baka",
        **_authors(config),
        **{key: getattr(config, key) for key in _OURS},
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": cached,
        "dtype": dtype,
        **special,
    }
    return {"config.json": content, "generation_config.json": {**special, "use_cache": cached}}


def _write_celp18(config: BakaConfig, dtype: str, special: Json) -> dict[str, dict[str, Any]]:
    wanted = {**_CELP18, "dt_rank": "auto" if config.dt_rank == "auto" else -(-config.d_model // 16)}
    if config.act == "elephant":
        wanted |= {"elephant_width": 1.0, "elephant_power": 8.0}
    reasons = [
        f"{key} is {getattr(config, key)!r} and not {value!r}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    reasons += [f"{key} is 0" for key in ("n_pauses", "n_rmt_tokens") if not getattr(config, key)]
    if reasons:
        raise LayoutError(f"The branch 00x_celp18 has no such network: {'; '.join(reasons)}. Use the layout 'bakallm'.")
    content = {key: value for key, value in _authors(config).items() if key != "mamba_each_nth_layer"}
    content |= {"model_type": "baka_mamba"} | ({"act_fn": "elephant18_fast"} if config.act == "elephant" else {})
    return {"config.json": content}


_LOAD_CELP18 = """import dataclasses, json, pathlib
from baka3 import BakaConfig, BakaNetCausalLM  # github.com/Maykeye/BakaLLM, branch 00x_celp18
from safetensors.torch import load_file
config = json.loads(pathlib.Path("{path}/config.json").read_text())
known = {{field.name for field in dataclasses.fields(BakaConfig)}}
model = BakaNetCausalLM(BakaConfig(**{{key: config[key] for key in known & set(config)}}))
model.load_state_dict(load_file("{path}/model.safetensors"))"""

BAKALLM = Layout(
    name="bakallm",
    family="baka",
    detect=_detect,
    read_config=_read,
    write_files=_write,
    tensors=TENSORS,
    variants=variants,
    buffers=buffers,
    aliases={},
    embedding=EMBEDDING,
    head=HEAD,
    differing_head="refuse",
    stores_tied_head=False,
    weights="safetensors",
    load_in_torch="import ssm_jax.interop\n" + transformers.LOAD,
    torch_logits=transformers.torch_logits,
    rename=rename,
    infer=_infer,
)
CELP18 = replace(
    BAKALLM,
    name="bakallm_celp18",
    detect=_detect_celp18,
    read_config=_read_celp18,
    write_files=_write_celp18,
    load_in_torch=_LOAD_CELP18,
    torch_logits=None,
    unchecked="the author's program needs a GPU; the layout 'bakallm' holds the same tensors and is compared",
    spelling=spelling_of_celp18,
)
