"""DenseMamba in PyTorch: what every model promises, JAX in both directions, and transformers' Mamba where nothing is fused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts.transformers import quiet
from ssm_jax.models import DenseMambaConfig
from tests.conformance.compare import assert_close
from tests.conformance.torch_model import TorchModelConformance, run
from tests.conformance.transformers import TransformersParity
from tests.interop.folders import change_tensors

pytestmark = pytest.mark.torch

SMALL: dict[str, Any] = {
    "vocab_size": 43,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "state_size": 4,
    "intermediate_h_select_scale": 4,
}
BIASES: dict[str, Any] = {"use_bias": True, "use_conv_bias": False, "residual_in_fp32": False, "time_step_rank": 3}


class TestDenseMamba(TorchModelConformance):
    model_class = "DenseMambaForCausalLM"
    centres = {"norm.weight": 1.0, "norm_f.weight": 1.0, "A_log": 1.0, "mixer.D": 1.0, "dt_proj.bias": -2.0}
    configs = {
        "channel_gate": SMALL,
        "state_gate_linear_biases": {
            **SMALL, **BIASES, "dense_block_layers": 1, "h_select": "state", "source_projection": "linear", "conv_kernel": 1
        },
        "no_gate_more_sources_than_layers": {
            **SMALL, "dense_block_layers": 5, "h_select": "none", "tie_word_embeddings": False
        },
    }  # fmt: skip


class TestDenseMambaInJax(TransformersParity):
    layout = "dense_mamba"
    logits = 2e-5
    reference = "float64"
    configs = {
        "channel_gate": DenseMambaConfig(vocab_size=61, d_model=16, n_layers=3, d_state=4, gate_ratio=4),
        "state_gate_linear_biases": DenseMambaConfig(
            vocab_size=40, d_model=16, n_layers=3, d_state=5, d_conv=2, expand=3, dt_rank=3, bias=True, conv_bias=False,
            dense_layers=1, gate="state", gate_ratio=8, projection="linear", residual_in_fp32=False, norm_eps=1e-3,
            tie_embeddings=False, pad_vocab_size_multiple=1,
        ),
        "no_gate_more_sources_than_layers": DenseMambaConfig(
            vocab_size=40, d_model=16, n_layers=3, d_state=4, dense_layers=5, gate=None, projection="linear"
        ),
        "nothing_fused": DenseMambaConfig(vocab_size=40, d_model=16, n_layers=2, d_state=4, dense_layers=0),
    }  # fmt: skip


@pytest.mark.parametrize("keys", [{}, BIASES], ids=["default", "biases"])
def test_without_sources_it_is_mamba_of_transformers(keys: dict[str, Any]) -> None:
    """The same names and logits."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    from ssm_jax.interop.torch import DenseMambaForCausalLM

    ours = TestDenseMamba().model("channel_gate", dense_block_layers=0, **keys)
    assert isinstance(ours, DenseMambaForCausalLM)
    shared = {key: value for key, value in SMALL.items() if key != "intermediate_h_select_scale"}
    with quiet():
        theirs = MambaForCausalLM(MambaConfig(**shared, **keys)).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = TestDenseMamba().tokens(ours)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    assert_close(run(ours, tokens).logits, expected, 1e-5 * max(1.0, float(expected.abs().max())))


def test_padding_anywhere_changes_nothing() -> None:
    """Between two tokens too, in one call or over several."""
    import torch

    model = TestDenseMamba().model("state_gate_linear_biases", conv_kernel=4)
    tokens = TestDenseMamba().tokens(model, rows=1)
    mask = torch.from_numpy(np.random.default_rng(3).integers(0, 2, tokens.shape))
    there = mask[0].bool()
    alone = run(model, tokens[:, there])
    for sizes in (None, (5, 1, 9, 8)):
        padded = run(model, torch.where(there, tokens, 0), sizes, mask)
        assert_close(padded.logits[:, there], alone.logits, 1e-5 * float(np.abs(alone.logits).max()))
        for got, expected in zip(padded.states, alone.states, strict=True):
            assert_close(got, expected, 1e-5 * max(1.0, float(np.abs(expected).max())))


def test_the_first_steps_are_those_of_the_config() -> None:
    """softplus of the bias lies between time_step_min and time_step_max."""
    import torch

    from ssm_jax.interop.torch import DenseMambaConfig, DenseMambaForCausalLM

    torch.manual_seed(0)
    model = DenseMambaForCausalLM(DenseMambaConfig(**SMALL, time_step_min=0.01, time_step_max=0.02))
    mixer = model.backbone.layers[1].mixer
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.0099 < dt.min() < dt.max() < 0.0201
    np.testing.assert_allclose(mixer.A_log.exp().detach(), np.tile([1, 2, 3, 4], (32, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be one of 'silu', 'swish'"),
        ({"h_select": "head"}, "h_select is 'head'; it must be one of 'channel', 'state', 'none'"),
        ({"source_projection": "dense"}, "source_projection is 'dense'; it must be one of 'identity', 'linear'"),
        ({"intermediate_size": 40}, "intermediate_size is 40; it must be one of 32"),
    ],
)
def test_what_it_does_not_compute_is_refused(keys: dict[str, Any], message: str) -> None:
    from ssm_jax.interop.torch import DenseMambaConfig

    with pytest.raises(ValueError, match=message):
        DenseMambaConfig(**{**SMALL, **keys})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("backbone.layers.2.mixer.h_select.fc1.weight"), r"missing: .*layers\.2.*fc1"),
        (lambda tensors: tensors.update(spare=np.ones(3, np.float32)), r"left over: spare"),
    ],
    ids=["missing", "left_over"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    with quiet():
        TestDenseMamba().model("channel_gate").save_pretrained(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(LayoutError, match=message):
        ssm_jax.from_pretrained(tmp_path)
