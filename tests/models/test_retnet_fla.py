"""RetNet against numbers that flash-linear-attention made, and its folders."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.safetensors_file import read_safetensors
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS, apply

GOLDEN = GOLDENS / "retnet_fla"
DESCRIPTION = json.loads((GOLDEN / "config.json").read_text())


def tensors(file: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.load()) for name, tensor in read_safetensors(GOLDEN / file).items()}


def folder(path: Path, **changed: Any) -> Path:
    (path / "config.json").write_text(json.dumps(DESCRIPTION["config_kwargs"] | changed))
    (path / "model.safetensors").write_bytes((GOLDEN / "weights.safetensors").read_bytes())
    return path


def test_logits_of_one_call_and_of_single_tokens(tmp_path: Path) -> None:
    model, params = ssm_jax.from_pretrained(folder(tmp_path))
    io, first = tensors("io.safetensors"), DESCRIPTION["decoded_from"]
    tokens = jnp.asarray(io["input_ids"], jnp.int32)
    with jax.default_matmul_precision("highest"):
        logits, _ = apply(model, params, tokens)
        assert_close(logits, io["logits"], 2e-5)
        _, state = apply(model, params, tokens[:, :first])
        for t in range(first, tokens.shape[1]):
            logits, state = apply(model, params, tokens[:, t : t + 1], state)
            assert_close(logits[:, 0], io["logits_decoded"][:, t - first], 2e-5)


@pytest.mark.parametrize(
    "wrong", [{"rotary": "interleaved"}, {"score_scale": True}, {"norm_eps": 1e-6}], ids=lambda wrong: next(iter(wrong))
)
def test_each_convention_shows(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """The golden would notice the published convention in the place of this one."""
    model, params = ssm_jax.from_pretrained(folder(tmp_path))
    other = ssm_jax.build(dataclasses.replace(model.config, **wrong))
    io = tensors("io.safetensors")
    logits, _ = apply(other, params, jnp.asarray(io["input_ids"], jnp.int32))
    assert np.abs(logits - io["logits"]).max() > 1e-3


def test_export_writes_the_same_folder(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    model, params = ssm_jax.from_pretrained(folder(tmp_path / "in"))
    ssm_jax.save_pretrained(model, params, tmp_path / "out", layout="fla", overwrite=True)
    written = {
        name: np.asarray(tensor.load()) for name, tensor in read_safetensors(tmp_path / "out/model.safetensors").items()
    }
    jax.tree.map(np.testing.assert_array_equal, written, tensors("weights.safetensors"))
    content = json.loads((tmp_path / "out/config.json").read_text())
    same = (
        "hidden_size",
        "num_heads",
        "expand_k",
        "expand_v",
        "intermediate_size",
        "norm_eps",
        "model_type",
        "vocab_size",
    )
    assert {key: content[key] for key in same} == {key: DESCRIPTION["config_kwargs"][key] for key in same}


def test_the_width_of_the_perceptron_comes_from_the_weights(tmp_path: Path) -> None:
    model, _ = ssm_jax.from_pretrained(folder(tmp_path, intermediate_size=None))
    assert model.config.d_mlp == 80


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_kv_heads": 1}, "'num_kv_heads' is 1"),
        ({"feature_map": "relu"}, "'feature_map' is 'relu'"),
        ({"attn": {"layers": [1]}}, "'attn' is"),
        ({"expand_k": 0.5}, "'expand_k' is 0.5"),
    ],
)
def test_other_options_of_the_package_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        ssm_jax.from_pretrained(folder(tmp_path, **changed))


@pytest.mark.parametrize("layout", ["syncdoth", "torchscale"])
def test_the_published_layouts_cannot_hold_it(tmp_path: Path, layout: str) -> None:
    model, params = ssm_jax.from_pretrained(folder(tmp_path))
    with pytest.raises(LayoutError, match="use the layout 'fla'"):
        ssm_jax.save_pretrained(model, params, tmp_path / "out", layout=layout)


def test_it_cannot_hold_the_published_one(tmp_path: Path) -> None:
    model = ssm_jax.build("retnet", vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_value=8, d_mlp=8)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with pytest.raises(LayoutError, match="rotary is 'interleaved', and flash-linear-attention has only 'halves'"):
        ssm_jax.save_pretrained(model, params, tmp_path / "out", layout="fla")
