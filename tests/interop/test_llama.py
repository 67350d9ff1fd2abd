"""LLaMA folders as they were published: with and without a prefix, buffers, both spellings of the angles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import open_weights, read_json
from ssm_jax.interop.layouts import detect
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import write_safetensors
from ssm_jax.models import LlamaConfig
from tests.interop.folders import as_tensors, assert_same, random_params

CONFIG = LlamaConfig(23, 12, 2, n_heads=3, n_kv_heads=1, head_dim=8, d_mlp=20, n_positions=10, rope_base=500.0)
# What releases of the fourth generation say.
SAID = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 23, "hidden_size": 12}
SAID |= {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 500.0}
SAID |= {"intermediate_size": 20, "max_position_embeddings": 10, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
SAID |= {"rope_scaling": None, "pretraining_tp": 1, "attention_bias": False, "tie_word_embeddings": False}
SAID |= {"attention_dropout": 0.0, "initializer_range": 0.02}

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Arrays]:
    """Parameters, and the tensors of their export."""
    model = ssm_jax.build(CONFIG)
    params, path = random_params(model), tmp_path_factory.mktemp("llama") / "m"
    ssm_jax.save_pretrained(model, params, path, check=False)
    return params, {name: np.array(tensor.load()) for name, tensor in open_weights(path).items()}


def folder(path: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", as_tensors(arrays))
    return path


def test_exported_tensors_are_the_published_ones(exported: tuple[Any, Arrays]) -> None:
    params, arrays = exported
    layers = params["layers"]
    out = np.asarray(layers["mixer"]["out_proj"]["kernel"][1])
    np.testing.assert_array_equal(arrays["model.layers.1.self_attn.o_proj.weight"], out.reshape(24, 12).T)
    keys = np.asarray(layers["mixer"]["k_proj"]["kernel"][0])
    np.testing.assert_array_equal(arrays["model.layers.0.self_attn.k_proj.weight"], keys.reshape(12, 8).T)
    np.testing.assert_array_equal(
        arrays["model.layers.1.mlp.gate_proj.weight"], layers["mlp"]["gate_proj"]["kernel"][1].T
    )
    assert arrays["model.layers.0.mlp.down_proj.weight"].shape == (12, 20)
    assert arrays["lm_head.weight"].shape == (23, 12)
    assert len(arrays) == 3 + 2 * 9


def _with_buffers(arrays: Arrays) -> Arrays:
    frequencies = (500.0 ** (-np.arange(4) / 4)).astype(np.float32)
    return {**arrays, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies for i in range(2)}}


SAME_WEIGHTS: dict[str, Callable[[Arrays], Arrays]] = {
    "no_prefix": lambda w: {name.removeprefix("model."): x for name, x in w.items()},
    "buffers": _with_buffers,
    "both": lambda w: {name.removeprefix("model."): x for name, x in _with_buffers(w).items()},
}


@pytest.mark.parametrize("change", SAME_WEIGHTS.values(), ids=SAME_WEIGHTS)
def test_other_ways_to_store_the_same(
    tmp_path: Path, exported: tuple[Any, Arrays], change: Callable[[Arrays], Arrays]
) -> None:
    params, arrays = exported
    model, read = ssm_jax.from_pretrained(folder(tmp_path / "m", SAID, change(arrays)))
    assert model.config == CONFIG
    assert_same(read, params)


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_may_be_stored_or_not(tmp_path: Path, exported: tuple[Any, Arrays], stored: bool) -> None:
    params, arrays = exported
    tied = {name: x for name, x in arrays.items() if name != "lm_head.weight"}
    if stored:
        tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    model, read = ssm_jax.from_pretrained(folder(tmp_path / "m", SAID | {"tie_word_embeddings": True}, tied))
    assert model.config.tie_embeddings
    assert_same(read, {name: leaf for name, leaf in params.items() if name != "head"})


_NEW_ANGLES = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SAME_MODEL: dict[str, dict[str, Any]] = {
    "no_model_type": {"model_type": None},
    "no_architectures": {"architectures": None},
    "first_spelling": {"architectures": ["LLaMAForCausalLM"]},
    "without_a_head_class": {"architectures": ["LlamaModel"]},
    "new_angles": {"rope_theta": None, **_NEW_ANGLES},
    "both_angles": _NEW_ANGLES,
    "old_default": {"rope_scaling": {"type": "default"}},
    "positions_of_relora": {"max_position_embeddings": None, "max_sequence_length": 10},
    "no_defaults": {"pretraining_tp": None, "attention_bias": None, "hidden_act": None, "rms_norm_eps": None},
}


@pytest.mark.parametrize("change", SAME_MODEL.values(), ids=SAME_MODEL)
def test_other_ways_to_say_the_same(tmp_path: Path, exported: tuple[Any, Arrays], change: dict[str, Any]) -> None:
    config = {key: value for key, value in {**SAID, **change}.items() if value is not None}
    assert open_folder(folder(tmp_path / "m", config, exported[1])).model.config == CONFIG


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' is of the kind 'linear'; ssm_jax has only"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'rope_parameters' is of the kind 'llama3'"),
    ({"rope_scaling": "linear"}, "'rope_scaling' is 'linear'; it must be a table"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; ssm_jax has only 'silu' or 'swish'"),
    ({"pretraining_tp": 2}, "'pretraining_tp' is 2; ssm_jax has only 1"),
    ({"num_key_value_heads": "one"}, "'num_key_value_heads' is 'one'; it must be an integer"),
    ({"model_type": "mistral"}, r"no known model \(.*mistral"),
    ({"architectures": ["LlamaForSequenceClassification"]}, r"no known model \(.*LlamaForSequenceClassification"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_we_would_compute_differently_is_refused(
    tmp_path: Path, exported: tuple[Any, Arrays], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=rf"m/config\.json.*{message}"):
        ssm_jax.from_pretrained(folder(tmp_path / "m", SAID | change, exported[1]))


def test_folders_of_other_models_that_say_the_same_are_told_apart(exported: tuple[Any, Arrays], tmp_path: Path) -> None:
    """DenseRetNet's classes are named after LLaMA's."""
    attention = "model.layers.{}.self_attn."
    dense = {name: x for name, x in exported[1].items() if "self_attn.v_proj" not in name and "o_proj" not in name}
    for i in range(2):
        dense[attention.format(i) + "to_hidden.0.weight"] = np.zeros((48, 12), np.float32)
        dense[attention.format(i) + "to_out.0.weight"] = np.zeros((12, 24), np.float32)
    assert detect(folder(tmp_path / "m", SAID, dense), set(dense))[0].name == "dense_ssm"
    without = {name: x for name, x in dense.items() if "to_hidden" not in name}
    with pytest.raises(LayoutError, match=r"describes no known model \(.*LlamaForCausalLM"):
        ssm_jax.from_pretrained(folder(tmp_path / "n", SAID, without))


def test_a_missing_tensor_is_named(tmp_path: Path, exported: tuple[Any, Arrays]) -> None:
    arrays = {name: x for name, x in exported[1].items() if name != "model.layers.1.mlp.gate_proj.weight"}
    with pytest.raises(LayoutError, match=r"read as llama .*missing: model\.layers\.1\.mlp\.gate_proj\.weight"):
        ssm_jax.from_pretrained(folder(tmp_path / "m", SAID, arrays))


def test_what_transformers_has_no_class_for_is_not_written(tmp_path: Path) -> None:
    model = ssm_jax.build(CONFIG, d_model=10)
    with pytest.raises(LayoutError, match="n_heads 3 does not divide d_model = 10, .* layout 'ssm_jax'"):
        ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", "transformers")


def test_releases_before_the_fifth_read_the_base_where_they_look_for_it(tmp_path: Path) -> None:
    model = ssm_jax.build(CONFIG)
    ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", check=False)
    written = read_json(tmp_path / "m" / "config.json")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500.0
    assert written["eos_token_id"] is None
