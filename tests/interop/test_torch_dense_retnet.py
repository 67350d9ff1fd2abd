"""DenseRetNet in PyTorch: what every model promises, and what the original computed."""

import functools
from typing import Any

import numpy as np
import pytest

from tests.conformance.compare import assert_close
from tests.conformance.torch_golden import assert_gradients, published_state, read_golden
from tests.conformance.torch_model import TorchModelConformance, run

pytestmark = pytest.mark.torch

FOLDERS = tuple(f"dense_retnet/{case}" for case in ("case_a_dense1", "case_b_dense2", "case_c_checkpoint_style_ratios"))
LOGITS, LOSS, STATES = 2e-4, 1e-5, 5e-5
SMALL: dict[str, Any] = {
    "vocab_size": 43,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "query_key_dim": 12,
    "intermediate_k_select_scale": 8,
    "intermediate_v_select_scale": 4,
}


class TestDenseRetNet(TorchModelConformance):
    model_class = "DenseGauRetNetForCausalLM"
    centres = {"norm.weight": 1.0}
    configs = {
        "two_below": {**SMALL, "dense_block_layers": 2},
        "none_below": {**SMALL, "dense_block_layers": 0, "v_factor": 1.5},
    }


@functools.cache
def load(folder: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A golden's model under the exact form, what was recorded, and its description."""
    from ssm_jax.interop.torch import DenseGauRetNetConfig, DenseGauRetNetForCausalLM

    tensors, io, described = read_golden(folder)
    scales = {f"intermediate_{kind}_select_scale": r for kind, r in described["select_mid_reduction"].items()}
    model = DenseGauRetNetForCausalLM(DenseGauRetNetConfig(**described["config_kwargs"], **scales)).eval()
    model.load_state_dict(tensors)
    return model, io, described


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_parallel_form(folder: str) -> None:
    """Logits, residual streams, loss and gradients; the first layer has no use for its gates."""
    model, io, described = load(folder)
    model.config.score_normaliser = "sum_abs"
    try:
        output = model(io["input_ids"], labels=io["input_ids"], output_hidden_states=True)
        model.zero_grad()
        output.loss.backward()
    finally:
        model.config.score_normaliser = None
    assert_close(output.logits.detach(), io["logits_parallel"], LOGITS)
    for i, stream in enumerate(output.hidden_states):
        assert_close(stream.detach(), io[f"hidden.{i}"], LOGITS)
    assert_close(output.loss.item(), io["loss"], LOSS)
    assert_gradients(model, io)
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert sorted(unused) == sorted(described["parameters_without_gradient"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_exact_form_is_the_recurrent_one(folder: str) -> None:
    """Logits of every token, and R / sqrt(S) after the last. The original's first token is at position -1, or at 0."""
    model, io, _ = load(folder)
    tokens = io["input_ids"]
    length = tokens.shape[1]
    for sizes in ((length,), (9, length - 9), (1,) * length):
        got = run(model, tokens, sizes)
        for logits, cache, shift in (("logits_recurrent", "cache", -1), ("logits_recurrent_pos0", "cache_pos0", 0)):
            assert_close(got.logits, io[logits], LOGITS)
            for i, state in enumerate(got.states):
                if f"{cache}.{i}.scale" not in io:  # the second kind is not in every folder
                    continue
                for row, one in enumerate(state):
                    published, size = published_state(model.model.retnet_rel_pos, one, length, shift)
                    assert_close(published, io[f"{cache}.{i}.prev_key_value"][row], STATES)
                    assert_close(size, io[f"{cache}.{i}.scale"], 1e-4)


@pytest.mark.parametrize("folder", FOLDERS[:2])
def test_greedy_tokens(folder: str) -> None:
    model, io, described = load(folder)
    prompt, new = described["generation"]["prompt_len"], described["generation"]["new_tokens"]
    got = model.generate(
        io["input_ids"][:, :prompt], max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    np.testing.assert_array_equal(got[:, prompt:].numpy(), io["generated_greedy"].numpy())


def test_keys_that_nothing_reads_are_kept(tmp_path: Any) -> None:
    """Published folders have many; a widths' misfit is refused."""
    from ssm_jax.interop.torch import DenseGauRetNetConfig, DenseGauRetNetForCausalLM

    config = DenseGauRetNetConfig(**SMALL, retnorm=False, layernorm_eps=1e-5, hidden_act="silu")
    config.save_pretrained(tmp_path)
    assert DenseGauRetNetConfig.from_pretrained(tmp_path).retnorm is False
    with pytest.raises(ValueError, match=r"2 heads cannot share 14 keys \(an even number each\) and 48 values"):
        DenseGauRetNetForCausalLM(DenseGauRetNetConfig(**{**SMALL, "query_key_dim": 14}))
