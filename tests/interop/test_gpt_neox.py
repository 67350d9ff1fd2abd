"""GPT-NeoX folders as they were published: Pythia's config, buffers, both names of the head, both spellings of the angles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import open_weights, read_json
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import write_safetensors
from ssm_jax.models import GPTNeoXConfig
from tests.interop.folders import as_tensors, assert_same, random_params

CONFIG = GPTNeoXConfig(23, 24, 2, n_heads=3, d_mlp=20, n_positions=10, rope_base=500.0)
# What Pythia's folders say.
SAID = {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu"}
SAID |= {"hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 20, "layer_norm_eps": 1e-5}
SAID |= {"max_position_embeddings": 10, "model_type": "gpt_neox", "num_attention_heads": 3, "num_hidden_layers": 2}
SAID |= {"rotary_emb_base": 500, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16"}
SAID |= {"transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 23}

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Arrays, dict[str, Any]]:
    """Parameters, the tensors of their export, and its config."""
    model = ssm_jax.build(CONFIG)
    params, path = random_params(model), tmp_path_factory.mktemp("gpt_neox") / "m"
    ssm_jax.save_pretrained(model, params, path, check=False)
    arrays = {name: np.array(tensor.load()) for name, tensor in open_weights(path).items()}
    return params, arrays, read_json(path / "config.json")


def folder(path: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", as_tensors(arrays))
    return path


def test_exported_tensors_are_the_published_ones(exported: tuple[Any, Arrays, Any]) -> None:
    params, arrays, config = exported
    mixer = params["layers"]["mixer"]
    weight = arrays["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(3, 3, 8, 24)
    bias = arrays["gpt_neox.layers.1.attention.query_key_value.bias"].reshape(3, 3, 8)
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for head in range(3):
            np.testing.assert_array_equal(weight[head, part], np.asarray(mixer[name]["kernel"])[1, :, head].T)
            np.testing.assert_array_equal(bias[head, part], mixer[name]["bias"][1, head])
    out = np.asarray(mixer["out_proj"]["kernel"][0])
    np.testing.assert_array_equal(arrays["gpt_neox.layers.0.attention.dense.weight"], out.reshape(24, 24).T)
    assert arrays["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"].shape == (20, 24)
    assert arrays["gpt_neox.embed_in.weight"].shape == arrays["embed_out.weight"].shape == (23, 24)
    assert len(arrays) == 4 + 2 * 12
    # Releases before the fifth look for the angles outside the table.
    angles = config["rope_parameters"]
    assert config["rotary_emb_base"] == angles["rope_theta"] == 500.0
    assert config["rotary_pct"] == angles["partial_rotary_factor"] == 0.25


def _with_buffers(arrays: Arrays) -> Arrays:
    found = dict(arrays)
    for i in range(2):
        attention = f"gpt_neox.layers.{i}.attention."
        found[attention + "bias"] = np.tri(10, dtype=bool)[None, None]
        found[attention + "masked_bias"] = np.array(-1e9, np.float32)
        found[attention + "rotary_emb.inv_freq"] = np.ones(1, np.float32)
    return found


SAME_WEIGHTS: dict[str, Callable[[Arrays], Arrays]] = {
    "buffers": _with_buffers,
    "no_prefix": lambda w: {name.removeprefix("gpt_neox."): x for name, x in _with_buffers(w).items()},
    "name_of_the_module": lambda w: {name.replace("embed_out", "lm_head"): x for name, x in w.items()},
}


@pytest.mark.parametrize("change", SAME_WEIGHTS.values(), ids=SAME_WEIGHTS)
def test_other_ways_to_store_the_same(
    tmp_path: Path, exported: tuple[Any, Arrays, Any], change: Callable[[Arrays], Arrays]
) -> None:
    params, arrays, _ = exported
    model, read = ssm_jax.from_pretrained(folder(tmp_path / "m", SAID, change(arrays)))
    assert model.config == CONFIG
    assert_same(read, params)


_TABLE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
SAME_MODEL: dict[str, dict[str, Any]] = {
    "no_model_type": {"model_type": None},
    "without_a_head_class": {"architectures": ["GPTNeoXModel"]},
    "angles_of_the_fifth_release": {"rotary_emb_base": None, "rotary_pct": None, "rope_parameters": _TABLE},
    "angles_of_the_last_fourth": {"rope_theta": 500, "partial_rotary_factor": 0.25, "rope_scaling": None},
    "no_defaults": {"rotary_pct": None, "layer_norm_eps": None, "hidden_act": None, "use_parallel_residual": None},
}


@pytest.mark.parametrize("change", SAME_MODEL.values(), ids=SAME_MODEL)
def test_other_ways_to_say_the_same(tmp_path: Path, exported: tuple[Any, Arrays, Any], change: dict[str, Any]) -> None:
    config = {key: value for key, value in {**SAID, **change}.items() if value is not None}
    assert open_folder(folder(tmp_path / "m", config, exported[1])).model.config == CONFIG


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' is of the kind 'linear'; ssm_jax has only"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "'rope_parameters' is of the kind 'yarn'"),
    ({"rope_parameters": _TABLE | {"partial_rotary_factor": 0.5}}, r"'rotary_pct' is 0\.25, and .* would take 0\.5"),
    ({"partial_rotary_factor": 0.5}, r"'partial_rotary_factor' is 0\.5, and transformers would take 0\.25; keep one"),
    ({"rope_theta": 10000.0}, r"'rope_theta' is 10000\.0, and transformers would take 500"),
    ({"rotary_pct": "some"}, "'rotary_pct' is 'some'; it must be a number"),
    ({"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'; ssm_jax has gelu_new, "),
    ({"model_type": "gpt_neox_japanese"}, r"no known model \(.*gpt_neox_japanese"),
    ({"architectures": ["GPTNeoXForTokenClassification"]}, r"no known model \(.*GPTNeoXForTokenClassification"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_we_would_compute_differently_is_refused(
    tmp_path: Path, exported: tuple[Any, Arrays, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=rf"m/config\.json.*{message}"):
        ssm_jax.from_pretrained(folder(tmp_path / "m", SAID | change, exported[1]))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, exported: tuple[Any, Arrays, Any]) -> None:
    fused = "gpt_neox.layers.1.attention.query_key_value.weight"
    arrays = {name: x for name, x in exported[1].items() if name != fused}
    with pytest.raises(LayoutError, match=rf"read as gpt_neox .*missing: {fused}"):
        ssm_jax.from_pretrained(folder(tmp_path / "m", SAID, arrays))
    with pytest.raises(LayoutError, match=rf"of another shape: {fused} \[48, 24\] \(expected \[72, 24\]\)"):
        ssm_jax.from_pretrained(folder(tmp_path / "n", SAID, arrays | {fused: exported[1][fused][:48]}))
