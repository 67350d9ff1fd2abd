"""RetNet and DenseRetNet against tensors that the originals made: torchscale, syncdoth/RetNet, DenseSSM.

Their parallel form is ours with their normaliser; what they decode token by token is our exact form, in one call too.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax import ops
from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import rel_pos
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import read_safetensors, write_safetensors
from ssm_jax.interop.tensor import Tensor
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.nn.mixers.retention import log_decays
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS, apply

CASES = {
    "retnet_torchscale/case_a": "sum_abs",
    "retnet_torchscale/case_b_tied_embnorm_gelu": "sum_abs",
    "retnet_torchscale/case_c_small_scale": "sum_abs",
    "retnet_torchscale/case_d_pypi_0_3_0": "abs_sum",
    "retnet_syncdoth/case_a_published_style": "sum_abs",
    "retnet_syncdoth/case_b_leftpad_lmdecay_zloss": "sum_abs",
    "retnet_syncdoth/case_c_ffn_postnorm_deepnorm": "sum_abs",
    "dense_retnet/case_a_dense1": "sum_abs",
    "dense_retnet/case_b_dense2": "sum_abs",
    "dense_retnet/case_c_checkpoint_style_ratios": "sum_abs",
}
PADDED = "retnet_syncdoth/case_b_leftpad_lmdecay_zloss"
LOGITS = 5e-5
CACHES = 5e-5


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def golden(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    content = json.loads((GOLDENS / case / "config.json").read_text())
    io = {name: np.asarray(t.load()) for name, t in read_safetensors(GOLDENS / case / "io.safetensors").items()}
    return content, {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in io.items()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(case: str, tmp_path: Path) -> Path:
    """The golden as the original's folder: its constructor's arguments beside the weights."""
    (tmp_path / "config.json").write_text(json.dumps(golden(case)[0]["config_kwargs"]))
    (tmp_path / "model.safetensors").write_bytes((GOLDENS / case / "weights.safetensors").read_bytes())
    return tmp_path


def positions_of(case: str) -> np.ndarray | None:
    mask = golden(case)[1].get("attention_mask")
    return None if mask is None else np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def real(case: str) -> np.ndarray:
    io = golden(case)[1]
    return np.asarray(io.get("attention_mask", np.ones_like(io["input_ids"]))) == 1


def test_parallel_logits(case: str, folder: Path) -> None:
    io = golden(case)[1]
    model, params = ssm_jax.from_pretrained(folder, score_normaliser=CASES[case])
    logits, _ = apply(model, params, io["input_ids"], None, positions_of(case))
    assert_close(np.asarray(logits)[real(case)], io["logits_parallel"][real(case)], LOGITS)


def test_recurrent_logits_and_caches(case: str, folder: Path) -> None:
    """One call of the exact form, and another in two pieces, against what the original computed token by token."""
    io = golden(case)[1]
    model, params = ssm_jax.from_pretrained(folder)
    assert model.config.trained_normaliser == (None if case.startswith("retnet_torchscale") else "sum_abs")
    positions, point = positions_of(case), 9
    logits, state = apply(model, params, io["input_ids"], None, positions)
    first, middle = apply(
        model, params, io["input_ids"][:, :point], None, None if positions is None else positions[:, :point]
    )
    rest, end = apply(
        model, params, io["input_ids"][:, point:], middle, None if positions is None else positions[:, point:]
    )
    published = [name for name in ("cache_recurrent", "cache_pos0", "cache") if f"{name}.0.scale" in io]
    decays = log_decays("log_spaced" if case == PADDED else "powers", state.layers.kv.shape[2])
    for got, last in ((logits, state), (jnp.concatenate([first, rest], axis=1), end)):
        assert_close(np.asarray(got)[real(case)], io["logits_recurrent"][real(case)], LOGITS)
        if case == "dense_retnet/case_a_dense1":
            continue  # its cache is rotated by one position, and the case has no other
        sums = np.expm1(np.asarray(last.position)[:, None] * decays) / np.expm1(decays)
        for layer in range(len(last.layers.kv)):
            kv = np.swapaxes(np.asarray(last.layers.kv[layer]), 2, 3) / np.sqrt(sums)[:, :, None, None]
            lanes = real(case).all(axis=1)  # the originals turn keys by places that count the pads
            assert_close(kv[lanes], io[f"{published[0]}.{layer}.prev_key_value"][lanes], CACHES)
            scale = np.broadcast_to(io[f"{published[0]}.{layer}.scale"].reshape(-1, sums.shape[1]), sums.shape)
            assert_close(sums / scale, np.ones_like(sums), 1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != PADDED])  # its loss counts logits of pads
def test_loss_and_gradients(case: str, folder: Path) -> None:
    io = golden(case)[1]
    source = open_folder(folder, score_normaliser=CASES[case])
    model, params = ssm_jax.from_pretrained(folder, score_normaliser=CASES[case])
    tokens = jnp.asarray(io["input_ids"])

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params}, tokens)
        total, weight = ops.cross_entropy(logits[:, :-1], tokens[:, 1:], jnp.ones(tokens[:, 1:].shape))
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, io["loss"], 1e-5)
    layout, config = source.layout, source.model.config
    ours = {
        layout.spelling(config, name): tensor.load()
        for name, tensor in to_tensors(layout.tensors_of(config), gradients).items()
    }
    expected = {name.removeprefix("grad."): x for name, x in io.items() if name.startswith("grad.")}
    assert len(expected) >= 10
    for name, gradient in expected.items():
        got = ours[name]
        if name.endswith("embed_tokens.weight") and "torchscale" not in case:
            got, gradient = got[1:], gradient[1:]  # the originals do not train the vector of the pad
        assert_close(got, gradient, 1e-4 * float(np.abs(gradient).max()))


@pytest.mark.parametrize("case", [case for case in CASES if "generated_greedy" in golden(case)[1]])
def test_greedy_tokens(case: str, folder: Path) -> None:
    content, io = golden(case)
    model, params = ssm_jax.from_pretrained(folder)
    length, mask = content["generation"]["prompt_len"], io.get("attention_mask")
    prompts = [
        row[:length] if mask is None else row[:length][mask[i, :length] == 1] for i, row in enumerate(io["input_ids"])
    ]
    generated = ssm_jax.generate(model, params, prompts, max_new_tokens=content["generation"]["new_tokens"])
    np.testing.assert_array_equal(generated, io["generated_greedy"][:, -generated.shape[1] :])


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_change_nothing(case: str, folder: Path, chunk_size: int) -> None:
    io = golden(case)[1]
    whole, _ = apply(*ssm_jax.from_pretrained(folder, chunk_size=64), io["input_ids"])
    model, params = ssm_jax.from_pretrained(folder, chunk_size=chunk_size)
    assert_close(apply(model, params, io["input_ids"])[0], whole, LOGITS)


@pytest.mark.parametrize("case", ["retnet_torchscale/case_a", "retnet_syncdoth/case_c_ffn_postnorm_deepnorm"])
def test_decays_of_no_rule_are_refused(case: str, folder: Path) -> None:
    rewrite(folder, lambda name, x: x * 0.5 if name.endswith("rel_pos.decay") else x)
    with pytest.raises(LayoutError, match=r"the stored decays \(0.98.*follow neither"):
        ssm_jax.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_decays_as_the_originals_compute_them_are_known(dtype: str) -> None:
    """Of many heads, where 1 - 2^(-5-h) is 1 in their float32; in half precision as checkpoints of such store them."""
    computed = np.log(1 - np.exp2(-5 - np.arange(32, dtype=np.float32), dtype=np.float32), dtype=np.float32)
    assert computed[-1] == 0
    stored = computed.astype(jnp.dtype(dtype))
    tensors = {rel_pos.DECAY: Tensor(stored.shape, stored.dtype, lambda: stored)}
    assert rel_pos.decay_rule(tensors, "log_spaced") == "powers"
    for factor in (1.01, 0.99):
        other = (computed * factor).astype(jnp.dtype(dtype))
        with pytest.raises(LayoutError, match="follow neither"):
            rel_pos.decay_rule({rel_pos.DECAY: Tensor(other.shape, other.dtype, lambda other=other: other)}, "powers")


@pytest.mark.parametrize("case", ["dense_retnet/case_c_checkpoint_style_ratios"])
def test_widths_come_from_the_weights(case: str, folder: Path) -> None:
    wrong = {**golden(case)[0]["config_kwargs"], "hidden_size": 50, "intermediate_k_select_scale": 4, "vocab_size": 48}
    (folder / "config.json").write_text(json.dumps(wrong))
    config = ssm_jax.from_pretrained(folder)[0].config
    assert (config.d_model, config.vocab_size, config.key_gate_ratio, config.value_gate_ratio) == (48, 49, 8, 16)
    rewrite(folder, lambda name, x: np.vstack([x, x[:1]]) if "k_select.fc1" in name else x)
    with pytest.raises(LayoutError, match="the k_select gates have 7 features, which is no whole part of 48"):
        ssm_jax.from_pretrained(folder)


def rewrite(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    tensors = {name: np.array(t.load()) for name, t in read_safetensors(folder / "model.safetensors").items()}
    changed = {name: np.ascontiguousarray(change(name, x)) for name, x in tensors.items()}
    write_safetensors(
        folder / "model.safetensors",
        {name: Tensor(x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in changed.items()},
    )
