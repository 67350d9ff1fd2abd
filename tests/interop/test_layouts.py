"""What config files say, in all their spellings, and what is refused."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import LAYOUTS, writable
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import write_safetensors
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import Mamba2Config, MambaConfig
from tests.conformance.golden import GOLDENS
from tests.interop.folders import assert_same, copy_golden, random_params

TRANSFORMERS, TRANSFORMERS2 = "mamba/tied_defaults", "mamba2/one_group"
ORIGINAL, ORIGINAL2 = "mamba_original/untied_ssm_cfg", "mamba2_original/one_group"


def read(folder: Path) -> Any:
    return open_folder(folder).model.config


@pytest.mark.parametrize(
    ("folder", "layout", "config"),
    [
        (
            "mamba/untied_biases_k3",
            "transformers",
            MambaConfig(
                vocab_size=61,
                pad_vocab_size_multiple=1,
                d_model=24,
                n_layers=3,
                d_state=5,
                d_conv=3,
                expand=3,
                dt_rank=7,
                bias=True,
                conv_bias=False,
                tie_embeddings=False,
            ),
        ),
        (
            "mamba_original/tied_padded_vocab",
            "mamba_ssm",
            MambaConfig(vocab_size=91, pad_vocab_size_multiple=8, d_model=32, n_layers=2, d_state=8),
        ),
        (
            "mamba2/long257_four_groups_dtlimit",
            "transformers",
            Mamba2Config(
                vocab_size=50,
                pad_vocab_size_multiple=1,
                d_model=32,
                n_layers=2,
                d_state=12,
                headdim=8,
                ngroups=4,
                norm_eps=1e-3,
                dt_limit=(0.02, 0.3),
                tie_embeddings=False,
            ),
        ),
        (
            "mamba2_original/one_group",
            "mamba_ssm",
            Mamba2Config(vocab_size=90, d_model=32, n_layers=2, d_state=16, headdim=16, tie_embeddings=False),
        ),
    ],
)
def test_goldens_are_recognised_and_described(folder: str, layout: str, config: Any) -> None:
    source = open_folder(GOLDENS / folder)
    assert source.layout.name == layout
    assert source.model.config == config


@pytest.mark.parametrize("upper", ['{"__float__": "Infinity"}', "Infinity", "1e999", '"Infinity"', '"inf"', "null"])
def test_every_spelling_of_infinity(tmp_path: Path, upper: str) -> None:
    folder = copy_golden(TRANSFORMERS2, tmp_path / "m", lambda c: c.update(time_step_limit=[0.0, "HERE"]))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"HERE"', upper))
    assert read(folder).dt_limit == (0.0, math.inf)


def test_no_step_size_limit_is_none(tmp_path: Path) -> None:
    folder = copy_golden(TRANSFORMERS2, tmp_path / "m", lambda c: c.pop("time_step_limit"))
    assert read(folder).dt_limit == (0.0, math.inf)


MINIMAL = ("model_type", "vocab_size", "hidden_size", "state_size", "num_hidden_layers")
SAME_MODEL: dict[str, Callable[[dict[str, Any]], object]] = {
    "minimal": lambda c: [c.pop(key) for key in list(c) if key not in MINIMAL],
    "auto_rank": lambda c: c.update(time_step_rank="auto"),
    "float_expand": lambda c: c.update(expand=2.0),
    "old_dtype_key": lambda c: c.update(torch_dtype=c.pop("dtype")),
    "no_dtype": lambda c: c.pop("dtype"),
    "unknown_keys": lambda c: c.update(d_inner=64, ssm_cfg={}, n_layer=2, rms_norm=True),
    "architecture_instead_of_model_type": lambda c: c.pop("model_type"),
    "neither": lambda c: [c.pop("model_type"), c.pop("architectures")],
    "swish": lambda c: c.update(hidden_act="swish"),
}


@pytest.mark.parametrize("change", SAME_MODEL.values(), ids=SAME_MODEL)
def test_other_ways_to_say_the_same(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    changed = read(copy_golden(TRANSFORMERS, tmp_path / "m", change))
    expected = read(GOLDENS / TRANSFORMERS)
    assert dataclasses.replace(changed, dt_rank=changed.dt_rank_resolved) == expected


def test_mamba2_is_recognised_by_its_tensors_alone(tmp_path: Path) -> None:
    folder = copy_golden(TRANSFORMERS2, tmp_path / "m", SAME_MODEL["neither"])
    assert read(folder) == read(GOLDENS / TRANSFORMERS2)


@pytest.mark.torch
@pytest.mark.parametrize("family", ["mamba", "mamba2", "gpt2", "gpt_neox"])
def test_defaults_are_those_of_the_class(family: str) -> None:
    from transformers import AutoConfig

    row = writable(family, "transformers")
    theirs = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    resolved = {"dt_rank": "auto"} if family == "mamba" else {}  # the class resolves "auto" at once
    assert row.read_config({}) == row.read_config(theirs) | resolved


def test_original_defaults_differ_by_kind(tmp_path: Path) -> None:
    base = {"d_model": 64, "n_layer": 1, "vocab_size": 50277, "ssm_cfg": {}}
    one, two = writable("mamba", "mamba_ssm"), writable("mamba2", "mamba_ssm")
    assert one.read_config(base)["d_state"] == 16
    fields = two.read_config(base | {"ssm_cfg": {"layer": "Mamba2"}})
    assert (fields["d_state"], fields["headdim"], fields["ngroups"]) == (128, 64, 1)
    assert fields["tie_embeddings"]
    assert fields["pad_vocab_size_multiple"] == 8


REFUSED: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (TRANSFORMERS, lambda c: c.update(hidden_act="gelu"), r"'hidden_act' is 'gelu'"),
    (TRANSFORMERS, lambda c: c.update(rms_norm=False), r"'rms_norm' is False"),
    (TRANSFORMERS, lambda c: c.update(expand=1.5), r"'expand' is 1\.5; it must be an integer"),
    (TRANSFORMERS, lambda c: c.update(intermediate_size=99), r"'intermediate_size' is 99; expand \* hidden_size is 64"),
    (TRANSFORMERS, lambda c: c.update(use_bias="no"), r"'use_bias' is 'no'"),
    (TRANSFORMERS, lambda c: c.update(layer_norm_epsilon="small"), r"'layer_norm_epsilon' is 'small'"),
    (TRANSFORMERS, lambda c: c.update(model_type="falcon_mamba"), r"no known model \(.*falcon_mamba"),
    (TRANSFORMERS2, lambda c: c.update(num_heads=3), r"'num_heads' x 'head_dim' is 3 x 16"),
    (TRANSFORMERS2, lambda c: c.update(time_step_limit=None), r"'time_step_limit' is None"),
    (TRANSFORMERS2, lambda c: c.update(time_step_limit=[0.0, "much"]), r"'time_step_limit' is 'much'"),
    (ORIGINAL, lambda c: c.update(rms_norm=False), r"'rms_norm' is False"),
    (ORIGINAL, lambda c: c.update(d_intermediate=64), r"'d_intermediate' or 'attn_layer_idx'"),
    (ORIGINAL, lambda c: c.update(attn_layer_idx=[1]), r"'d_intermediate' or 'attn_layer_idx'"),
    (ORIGINAL, lambda c: c["ssm_cfg"].update(d_stat=4), r"'ssm_cfg\.d_stat' is not a field"),
    (ORIGINAL, lambda c: c.update(lm_head_bias=True), r"'lm_head_bias' is not a field"),
    (ORIGINAL, lambda c: c["ssm_cfg"].update(layer="Mamba3"), r"no known model \(.*Mamba3"),
    (ORIGINAL, lambda c: c.pop("d_model"), r"no known model"),
    (ORIGINAL2, lambda c: c["ssm_cfg"].update(rmsnorm=False), r"'rmsnorm' is False"),
    (ORIGINAL2, lambda c: c["ssm_cfg"].update(norm_before_gate=True), r"'norm_before_gate' is True"),
    (ORIGINAL2, lambda c: c["ssm_cfg"].update(D_has_hdim=True), r"'D_has_hdim' is True"),
    (ORIGINAL2, lambda c: c["ssm_cfg"].update(d_ssm=32), r"'d_ssm' is 32"),
]


@pytest.mark.parametrize(("folder", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_we_would_compute_differently_is_refused(
    tmp_path: Path, folder: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = copy_golden(folder, tmp_path / "m", change)
    with pytest.raises(LayoutError, match=rf"m/config\.json.*{message}"):
        ssm_jax.from_pretrained(path)


def test_the_original_files_of_codestral(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=40, pad_vocab_size_multiple=1, d_model=64, n_layers=1, ngroups=2, tie_embeddings=False
    )
    model = ssm_jax.build(config)
    params = random_params(model)
    named = to_tensors(writable("mamba2", "mamba_ssm").tensors, params)
    write_safetensors(tmp_path / "consolidated.safetensors", {f"model.{name}": t for name, t in named.items()})
    described = {"dim": 64, "n_layers": 1, "vocab_size": 40, "n_groups": 2, "rms_norm": True, "residual_in_fp32": True}
    described |= {"fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"}
    (tmp_path / "params.json").write_text(json.dumps(described))
    again, read_params = ssm_jax.from_pretrained(tmp_path)
    assert again.config == config
    assert_same(read_params, params)


_MAMBAS: dict[str, Any] = {
    **{"vocab_size": 100, "d_model": 48, "n_layers": 5, "d_state": 24, "d_conv": 3, "expand": 3, "bias": True},
    **{"conv_bias": False, "residual_in_fp32": False, "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3},
}
WRITTEN: dict[str, dict[str, Any]] = {
    "mamba": _MAMBAS | {"dt_rank": 5, "dt_init": "constant", "dt_scale": 2.0},
    "mamba2": _MAMBAS | {"headdim": 8, "ngroups": 3, "dt_limit": (0.01, math.inf), "A_init_range": (2.0, 4.0)},
    "gpt2": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 3},
        **{"n_positions": 77, "d_mlp": 40, "activation": "relu", "norm_eps": 1e-3, "dropout": 0.25},
    },
    "dense_mamba": _MAMBAS
    | {"dt_rank": 5, "dense_layers": 3, "gate": None, "gate_ratio": 8, "projection": "linear", "tie_embeddings": False},
    "retnet": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 3, "d_value": 66},
        **{"d_mlp": 40, "activation": "relu", "post_norm": True, "deepnorm": True, "embedding_scale": True},
        **{"embedding_norm": True, "norm_eps": 1e-3, "dropout": 0.25},
        **{"score_normaliser": "abs_sum", "trained_normaliser": "abs_sum"},
    },
    "dense_retnet": {
        **{
            "vocab_size": 100,
            "pad_vocab_size_multiple": 16,
            "d_model": 64,
            "n_layers": 5,
            "n_heads": 4,
            "dense_layers": 3,
        },
        **{"norm_eps": 1e-3, "dropout": 0.25, "score_normaliser": "abs_sum", "trained_normaliser": "abs_sum"},
    },
    "gpt_neox": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 3, "d_mlp": 40},
        **{"n_positions": 77, "rotary_fraction": 0.5, "rope_base": 500.0, "parallel_residual": False},
        **{"activation": "relu", "attention_bias": False, "tie_embeddings": True, "norm_eps": 1e-3, "dropout": 0.25},
    },
    "llama": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 6},
        **{"n_kv_heads": 3, "head_dim": 12, "d_mlp": 40, "n_positions": 77, "rope_base": 500.0},
        **{"attention_bias": True, "mlp_bias": True, "tie_embeddings": True, "norm_eps": 1e-3},
    },
    "gss": {
        **{
            "vocab_size": 100,
            "d_model": 48,
            "n_layers": 5,
            "dim_expansion_factor": 2.5,
            "dss_kernel_N": 12,
            "dss_kernel_H": 24,
        },
        **{"dss_kernel_lambda_imag_exp": False, "final_norm": True, "init": "slow", "memory": 99, "accurate": True},
    },
    "baka": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 3, "d_mlp": 40},
        **{"d_attn": 60, "n_ctx": 32, "n_pauses": 4, "n_rmt_tokens": 3, "rmt_read": "head", "xl_layer": "below"},
        **{"chunk_boundary": "call", "norm": "rms", "norm_eps": 1e-3, "act": "silu", "elephant_width": 0.5},
        **{"elephant_power": 4.0, "gate": "sigmoid", "gate_input": "y", "step": "step4", "step_shared": True},
        **{"step_reach": "xl", "mamba_every": 3, "mamba_carry": True, "d_state": 24, "d_conv": 3, "expand": 3},
        **{"dt_rank": 5, "rope_base": 500.0, "tie_embeddings": True, "residual_in_fp32": False, "dropout": 0.25},
    },
}
"""Family -> fields of a config, none at its default."""
_FLA: dict[str, Any] = {"rotary": "halves", "score_scale": False}
WRITTEN_AS = {
    "fla": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 3, "d_value": 66},
        **{"d_mlp": 40, "norm_scale": True, "norm_eps": 1e-3, "trained_normaliser": "abs_sum", **_FLA},
    },
    "bakallm_celp18": {
        **{"vocab_size": 100, "pad_vocab_size_multiple": 16, "d_model": 48, "n_layers": 5, "n_heads": 3, "d_mlp": 40},
        **{"d_attn": 60, "n_ctx": 32, "n_pauses": 4, "n_rmt_tokens": 3, "rmt_read": "head", "act": "silu"},
        **{"chunk_boundary": "call", "dropout": 0.25},
    },
}
"""Layout -> such fields, where it has other models of the family than the rest."""
_NOT_OF_THE_PACKAGE = {"final_norm", "tie_embeddings", "init", "memory", "accurate"}
_RETENTION = {"pad_vocab_size_multiple", "trained_normaliser"}
KEPT_BY_US = {
    "transformers": {"A_init_range", "pad_vocab_size_multiple"},
    "dense_mamba": {"pad_vocab_size_multiple"},
    "syncdoth": _RETENTION,
    "fla": _RETENTION,
    "torchscale": _RETENTION | {"score_normaliser"},
    "dense_ssm_hub": _RETENTION,
    "dense_ssm": _RETENTION | {"score_normaliser"},
    "mamba_ssm": set(),
    "gated_state_spaces": _NOT_OF_THE_PACKAGE,
    "naxalpha": _NOT_OF_THE_PACKAGE,
    "bakallm": {"pad_vocab_size_multiple"},
    "bakallm_celp18": {"pad_vocab_size_multiple", "chunk_boundary", "dropout", "tie_embeddings"},
}
"""Layout -> fields that its config has no place for: the weights say them, or they change no logit and ssm_jax.json keeps them."""


@pytest.mark.parametrize("row", [row for row in LAYOUTS if row.write_files], ids=lambda row: f"{row.name}-{row.family}")
def test_a_written_config_reads_back_as_the_model(row: Any) -> None:
    fields = WRITTEN_AS.get(row.name, WRITTEN[row.family])
    config = ssm_jax.build(row.family, **fields).config
    content = json.loads(json.dumps(row.write_files(config, "float32", {})[row.config_file]))
    read = row.read_config(content)
    for key, value in fields.items():
        if key == "vocab_size":
            multiple = read.get("pad_vocab_size_multiple", 1)
            assert -(-read["vocab_size"] // multiple) * multiple == config.padded_vocab_size
        elif key not in KEPT_BY_US[row.name]:
            assert read[key] == value, key
    for tied in (True, False) if "tie_embeddings" not in KEPT_BY_US[row.name] else ():
        content = row.write_files(dataclasses.replace(config, tie_embeddings=tied), "float32", {})[row.config_file]
        assert row.read_config(content)["tie_embeddings"] == tied


EXTREMES: dict[str, list[dict[str, Any]]] = {
    "mamba": [{"bias": True, "tie_embeddings": False}, {"bias": False, "tie_embeddings": True}],
    "mamba2": [{"bias": True, "tie_embeddings": False}, {"bias": False, "tie_embeddings": True}],
    "dense_mamba": [{"bias": True, "tie_embeddings": False, "projection": "linear"}, {"gate": "state"}],
    "retnet": [
        {"n_heads": 2, "d_value": 128, "d_mlp": 96, "embedding_norm": True},
        {"n_heads": 2, "d_value": 128, "d_mlp": 96, "mlp": "plain", "mlp_norm": "layer", "tie_embeddings": True},
    ],
    "dense_retnet": [{"n_heads": 4}, {"n_heads": 2, "tie_embeddings": True}],
    "gss": [{"final_norm": True}, {"tie_embeddings": True}],
    "gpt2": [{"n_heads": 4, "d_mlp": 24, "tie_embeddings": False}, {"n_heads": 2}],
    "gpt_neox": [{"n_heads": 4}, {"n_heads": 2, "attention_bias": False, "tie_embeddings": True}],
    "llama": [{"n_heads": 4, "attention_bias": True, "mlp_bias": True}, {"n_heads": 4, "tie_embeddings": True}],
    "baka": [
        {"n_heads": 4, "gate": "relu", "step": "nstep4"},
        {"n_heads": 4, "norm": "rms", "step": "step4", "step_shared": True, "mamba_every": 2, "n_layers": 5},
    ],
}
"""Family -> fields of configs that together have every leaf the family knows."""
EXTREMES_AS: dict[str, list[dict[str, Any]]] = {
    "fla": [{"n_heads": 2, "d_value": 128, "d_mlp": 96, "norm_scale": scaled, **_FLA} for scaled in (True, False)]
}


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: f"{row.name}-{row.family}")
def test_every_leaf_of_every_family_has_a_place_in_every_layout(row: Any) -> None:
    for fields in EXTREMES_AS.get(row.name, EXTREMES[row.family]):
        if row.head not in row.tensors and not fields.get("tie_embeddings", True):
            continue  # the format is always tied
        model = ssm_jax.build(row.family, **{"vocab_size": 16, "d_model": 64, "n_layers": 2, **fields})
        params = random_params(model)
        published = to_tensors(row.tensors_of(model.config), params)
        assert sum(int(np.prod(t.shape)) for t in published.values()) == ssm_jax.count_parameters(model.config)
        for name, tensor in published.items():
            assert tensor.load().shape == tensor.shape, name
