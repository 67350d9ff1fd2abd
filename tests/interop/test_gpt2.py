"""GPT-2 folders as they were published: without a prefix, with buffers, and OpenAI's own tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import open_weights
from ssm_jax.interop.layouts import LAYOUTS
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import write_safetensors
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import GPT2Config
from tests.interop.folders import as_tensors, assert_same, random_params

CONFIG = GPT2Config(vocab_size=23, d_model=12, n_layers=2, n_heads=3, n_positions=10)
HPARAMS = {"n_vocab": 23, "n_ctx": 10, "n_embd": 12, "n_head": 3, "n_layer": 2}
# What the hub's first file says; later ones say more.
FIRST = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 23, "n_positions": 10, "n_ctx": 10}
FIRST |= {"n_embd": 12, "n_head": 3, "n_layer": 2, "activation_function": "gelu_new", "resid_pdrop": 0.0}
OPENAI = next(row for row in LAYOUTS if row.name == "openai")

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Arrays]:
    """Parameters, and the tensors of their export."""
    model = ssm_jax.build(CONFIG)
    params, folder = random_params(model), tmp_path_factory.mktemp("gpt2") / "m"
    ssm_jax.save_pretrained(model, params, folder, check=False)
    return params, {name: np.array(tensor.load()) for name, tensor in open_weights(folder).items()}


def folder(path: Path, config: dict[str, Any], arrays: Arrays, name: str = "config.json") -> Path:
    path.mkdir()
    (path / name).write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", as_tensors(arrays))
    return path


def test_exported_tensors_are_the_published_ones(exported: tuple[Any, Arrays]) -> None:
    params, arrays = exported
    mixer = {name: np.asarray(leaf["kernel"]) for name, leaf in params["layers"]["mixer"].items()}
    fused = np.concatenate([mixer[name][1].reshape(12, 12) for name in ("q_proj", "k_proj", "v_proj")], axis=1)
    np.testing.assert_array_equal(arrays["transformer.h.1.attn.c_attn.weight"], fused)
    np.testing.assert_array_equal(arrays["transformer.h.0.attn.c_proj.weight"], mixer["out_proj"][0].reshape(12, 12))
    assert arrays["transformer.h.0.attn.c_attn.bias"].shape == (36,)
    assert arrays["transformer.h.0.mlp.c_fc.weight"].shape == (12, 48)
    assert "lm_head.weight" not in arrays


def _with_buffers(arrays: Arrays) -> Arrays:
    masks = {f"transformer.h.{i}.attn.bias": np.tri(10, dtype=bool)[None, None] for i in range(2)}
    return {**arrays, **masks, "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}


SAME_WEIGHTS: dict[str, Callable[[Arrays], Arrays]] = {
    "no_prefix": lambda w: {name.removeprefix("transformer."): x for name, x in w.items()},
    "buffers": _with_buffers,
    "both": lambda w: {name.removeprefix("transformer."): x for name, x in _with_buffers(w).items()},
    "head_too": lambda w: {**w, "lm_head.weight": w["transformer.wte.weight"]},
}


@pytest.mark.parametrize("change", SAME_WEIGHTS.values(), ids=SAME_WEIGHTS)
def test_other_ways_to_store_the_same(
    tmp_path: Path, exported: tuple[Any, Arrays], change: Callable[[Arrays], Arrays]
) -> None:
    params, arrays = exported
    model, read = ssm_jax.from_pretrained(folder(tmp_path / "m", FIRST, change(arrays)))
    assert model.config == CONFIG
    assert_same(read, params)


SAME_MODEL: dict[str, dict[str, Any]] = {
    "n_ctx_alone": {"n_positions": None},
    "n_positions_alone": {"n_ctx": None},
    "no_model_type": {"model_type": None},
    "tensors_alone": {"model_type": None, "architectures": None},
    "no_inner_width": {"n_inner": ...},
    "numerics": {"reorder_and_upcast_attn": True},
    "other_spelling": {"activation_function": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("change", SAME_MODEL.values(), ids=SAME_MODEL)
def test_other_ways_to_say_the_same(tmp_path: Path, exported: tuple[Any, Arrays], change: dict[str, Any]) -> None:
    config = {key: value for key, value in {**FIRST, **change}.items() if value is not None}
    config = {key: None if value is ... else value for key, value in config.items()}
    assert open_folder(folder(tmp_path / "m", config, exported[1])).model.config == CONFIG


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"scale_attn_weights": False}, "'scale_attn_weights' is False; ssm_jax has only True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
    ({"add_cross_attention": True}, "'add_cross_attention' is True"),
    ({"activation_function": "mish"}, "'activation_function' is 'mish'; ssm_jax has gelu_new, "),
    ({"n_ctx": 5}, "'n_ctx' is 5 and 'n_positions' 10"),
    ({"n_inner": "wide"}, "'n_inner' is 'wide'; it must be an integer"),
    ({"model_type": "gptj"}, r"no known model \(.*gptj"),
    ({"architectures": ["GPT2ForSequenceClassification"]}, r"no known model \(.*GPT2ForSequenceClassification"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_we_would_compute_differently_is_refused(
    tmp_path: Path, exported: tuple[Any, Arrays], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=rf"m/config\.json.*{message}"):
        ssm_jax.from_pretrained(folder(tmp_path / "m", FIRST | change, exported[1]))


def test_the_original_tensors(tmp_path: Path, exported: tuple[Any, Arrays]) -> None:
    params, _ = exported
    arrays = {name: np.array(tensor.load()) for name, tensor in to_tensors(OPENAI.tensors, params).items()}
    assert arrays["model/h0/attn/c_attn/w"].shape == (1, 12, 36)
    assert arrays["model/h1/mlp/c_proj/w"].shape == (1, 48, 12)
    assert arrays["model/h1/ln_2/g"].shape == arrays["model/ln_f/b"].shape == (12,)
    path = folder(tmp_path / "safetensors", HPARAMS, arrays, "hparams.json")
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "hparams.json").write_text(json.dumps(HPARAMS))
    np.savez(tmp_path / "npz" / "model.npz", **arrays)
    for path in (tmp_path / "safetensors", tmp_path / "npz"):
        model, read = ssm_jax.from_pretrained(path)
        assert open_folder(path).layout.name == "openai"
        assert model.config == CONFIG
        assert_same(read, params)


def test_original_tensors_that_cannot_be_read(tmp_path: Path, exported: tuple[Any, Arrays]) -> None:
    with pytest.raises(LayoutError, match=r"Layout 'openai' cannot hold a gpt2 model; .*transformers"):
        ssm_jax.save_pretrained(ssm_jax.build(CONFIG), exported[0], tmp_path / "out", "openai", check=False)
    (tmp_path / "hparams.json").write_text(json.dumps(HPARAMS))
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    (tmp_path / "model.ckpt.index").touch()
    with pytest.raises(LayoutError, match=r"holds a TensorFlow checkpoint.*numpy\.savez\('model\.npz'"):
        ssm_jax.from_pretrained(tmp_path)
    weights = tmp_path / "model.npz"
    np.savez(weights, **{"model/wte": np.array([{}])})
    with pytest.raises(LayoutError, match=r"model\.npz holds 'model/wte' as Python objects"):
        ssm_jax.from_pretrained(tmp_path)
    np.savez(weights, **{"model/wte": np.zeros((23, 12), np.float32)})
    with pytest.raises(LayoutError, match=r"'openai'.*missing: model/wpe, .* and 23 more"):
        ssm_jax.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-30])
    with pytest.raises(LayoutError, match=r"model\.npz is not a complete \.npz file"):
        ssm_jax.from_pretrained(tmp_path)
