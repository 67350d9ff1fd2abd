"""RetNet and DenseRetNet to and from PyTorch: live parity, round trips in every layout, refusals."""

from pathlib import Path
from typing import Any

import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.models import DenseRetNetConfig, RetNetConfig
from tests.conformance.transformers import TransformersParity
from tests.interop.folders import assert_same, change_tensors, random_params

RETNET: dict[str, Any] = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "n_heads": 2, "d_value": 32, "d_mlp": 28}
DENSE: dict[str, Any] = {"vocab_size": 61, "d_model": 24, "n_layers": 3, "n_heads": 2, "dropout": 0.1}
GATED: dict[str, Any] = {**DENSE, "key_gate_ratio": 4, "value_gate_ratio": 4}
GLU = RetNetConfig(**RETNET, embedding_scale=True, embedding_norm=True, pad_vocab_size_multiple=8)
PLAIN = RetNetConfig(
    **{**RETNET, "n_heads": 3, "d_value": 30}, mlp="plain", mlp_norm="layer", activation="gelu", decay="log_spaced",
    tie_embeddings=True, norm_eps=1e-3,
)  # fmt: skip
DEEPNORM = RetNetConfig(**RETNET, post_norm=True, deepnorm=True, activation="relu", dropout=0.25)
ONE_BELOW = DenseRetNetConfig(**DENSE, dense_layers=1, key_gate_ratio=8, value_gate_ratio=4, pad_vocab_size_multiple=8)
TWO_BELOW = DenseRetNetConfig(
    **DENSE, d_key=16, d_value=36, dense_layers=2, key_gate_ratio=6, value_gate_ratio=12, norm_eps=1e-3, tie_embeddings=True
)  # fmt: skip
AS_IN_GITHUB = DenseRetNetConfig(**{**DENSE, "d_model": 32}, dense_layers=1, tie_embeddings=True)


@pytest.mark.torch
class TestRetNetInTorch(TransformersParity):
    layout = "syncdoth"
    logits = 2e-5
    reference = "float64"
    configs = {
        "glu": GLU,
        "plain_sub_norm_log_spaced_tied": PLAIN,
        "plain_rms": RetNetConfig(**RETNET, mlp="plain", mlp_norm="rms", activation="relu"),
        # As wide as the others, its seeded parameters are such that the last bit of one moves gradients by 1e-3 of the largest.
        "plain_post_norm": RetNetConfig(**{**RETNET, "d_value": 36}, mlp="plain", post_norm=True, embedding_norm=True),
        "deepnorm": DEEPNORM,
        "sum_abs": RetNetConfig(**RETNET, score_normaliser="sum_abs"),
        "abs_sum": RetNetConfig(**RETNET, score_normaliser="abs_sum"),
    }


@pytest.mark.torch
class TestDenseRetNetInTorch(TransformersParity):
    layout = "dense_ssm_hub"
    logits = 2e-5
    reference = "float64"
    configs = {
        "one_below": ONE_BELOW,
        "two_below_other_widths": TWO_BELOW,
        "as_in_github": AS_IN_GITHUB,
        "sum_abs": DenseRetNetConfig(**GATED, score_normaliser="sum_abs"),
        "abs_sum": DenseRetNetConfig(**GATED, score_normaliser="abs_sum"),
    }


HELD = {
    "syncdoth": (GLU, PLAIN, DEEPNORM),
    "torchscale": (GLU, DEEPNORM, RetNetConfig(**RETNET, post_norm=True, tie_embeddings=True)),
    "dense_ssm_hub": (ONE_BELOW, TWO_BELOW, AS_IN_GITHUB),
    "dense_ssm": (AS_IN_GITHUB, DenseRetNetConfig(**{**DENSE, "d_model": 64}, pad_vocab_size_multiple=8)),
    "ssm_jax": (GLU, PLAIN, DEEPNORM, ONE_BELOW, TWO_BELOW),
}


@pytest.mark.parametrize(
    ("layout", "config"),
    [pytest.param(layout, config, id=f"{layout}-{i}") for layout in HELD for i, config in enumerate(HELD[layout])],
)
def test_export_then_import_is_bit_identical(tmp_path: Path, layout: str, config: Any) -> None:
    """The config too, widths of padded vocabularies and all."""
    model = ssm_jax.build(config)
    params = random_params(model)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", layout, check=False)
    again, read = ssm_jax.from_pretrained(tmp_path / "m")
    assert again.config == config
    assert_same(read, params)


REFUSED: list[tuple[str, Any, str]] = [
    ("syncdoth", RetNetConfig(**RETNET, rotary="halves"), "norm_scale and score_scale=False are not torchscale's"),
    ("torchscale", RetNetConfig(**RETNET, norm_scale=True), "norm_scale and score_scale=False are not torchscale's"),
    ("syncdoth", RetNetConfig(**RETNET, activation="gelu_tanh"), "activation is 'gelu_tanh', and torchscale has swish"),
    ("torchscale", PLAIN, "torchscale has no plain feed-forward network; use the layout 'syncdoth'"),
    ("torchscale", RetNetConfig(**RETNET, decay="log_spaced"), "decay is 'log_spaced', and torchscale has only 'powers'"),
    ("syncdoth", RetNetConfig(**RETNET, deepnorm=True), "deepnorm without post_norm"),
    ("syncdoth", RetNetConfig(**RETNET, mlp="plain", mlp_norm="rms", post_norm=True), "mlp_norm with post_norm"),
    ("dense_ssm_hub", DenseRetNetConfig(**GATED, dense_layers=0), "at least one dense layer"),
    ("dense_ssm_hub", DenseRetNetConfig(**GATED, gate=False), "DenseSSM always has gates"),
    ("dense_ssm_hub", DenseRetNetConfig(**GATED, projection="linear"), "no matrices per source"),
    ("dense_ssm", ONE_BELOW, "key_gate_ratio is 8, and DenseSSM's repository fixes it at 32; use 'dense_ssm_hub'"),
    ("dense_ssm", TWO_BELOW, "d_key is 16, and DenseSSM's repository fixes it at 12"),
    ("dense_mamba", GLU, "'dense_mamba' cannot hold a retnet model"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "config", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED])
def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path, layout: str, config: Any, reason: str) -> None:
    model = ssm_jax.build(config)
    with pytest.raises(LayoutError, match=reason):
        ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", layout, check=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("layout", "config", "tensor"),
    [
        ("syncdoth", GLU, "layers.1.ffn.gate.weight"),
        ("syncdoth", PLAIN, "layers.1.ffn.ffn_layernorm.bias"),
        ("torchscale", DEEPNORM, "layers.0.retention.g_proj.weight"),
        ("dense_ssm_hub", TWO_BELOW, "layers.2.self_attn.k_norm.weight"),
        ("dense_ssm", AS_IN_GITHUB, "layers.0.self_attn.v_select.fc2.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, layout: str, config: Any, tensor: str) -> None:
    """One that is gone, and one more."""

    def rename(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith(tensor))
        tensors[f"{name}.spare"] = tensors.pop(name)

    model = ssm_jax.build(config)
    ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", layout, check=False)
    change_tensors(tmp_path / "m", rename)
    with pytest.raises(LayoutError, match=rf"missing: {tensor}; left over: {tensor}\.spare"):
        ssm_jax.from_pretrained(tmp_path / "m")
