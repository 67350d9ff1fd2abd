"""RetNet in PyTorch: what every model promises, and what torchscale and syncdoth/RetNet computed."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_jax.interop.folder import open_weights
from ssm_jax.interop.layouts.transformers import quiet
from ssm_jax.interop.safetensors_file import write_safetensors
from tests.conformance.compare import assert_close
from tests.conformance.torch_golden import assert_gradients, published_state, read_golden
from tests.conformance.torch_model import TorchModelConformance, run
from tests.interop.folders import as_tensors

pytestmark = pytest.mark.torch

TORCHSCALE = ("case_a", "case_b_tied_embnorm_gelu", "case_c_small_scale", "case_d_pypi_0_3_0")
SYNCDOTH = ("case_a_published_style", "case_b_leftpad_lmdecay_zloss", "case_c_ffn_postnorm_deepnorm")
FOLDERS = (*(f"retnet_torchscale/{case}" for case in TORCHSCALE), *(f"retnet_syncdoth/{case}" for case in SYNCDOTH))
LOGITS, LOSS, STATES = 2e-4, 1e-5, 5e-5
SMALL: dict[str, Any] = {
    "vocab_size": 43,
    "decoder_embed_dim": 24,
    "decoder_value_embed_dim": 32,
    "decoder_ffn_embed_dim": 28,
    "decoder_layers": 2,
    "decoder_retention_heads": 2,
}


class TestRetNet(TorchModelConformance):
    model_class = "RetNetForCausalLM"
    centres = {"norm.weight": 1.0, "layernorm_embedding.weight": 1.0}
    configs = {
        "published_style": {
            **SMALL,
            "activation_fn": "swish",
            "layernorm_embedding": True,
            "no_scale_embedding": False,
        },
        "deepnorm_plain": {**SMALL, "use_glu": False, "deepnorm": True, "use_lm_decay": True},
        "subln": {**SMALL, "use_glu": False, "activation_fn": "relu"},
        "subln_rms": {**SMALL, "use_glu": False, "use_ffn_rms_norm": True},
    }


@functools.cache
def load(folder: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A golden's model under the exact form, what was recorded, and its description."""
    from ssm_jax.interop.torch import RetNetConfig, RetNetForCausalLM

    tensors, io, described = read_golden(folder)
    keys = dict(described["config_kwargs"])
    if folder.startswith("retnet_torchscale"):
        keys |= {"tie_word_embeddings": keys.pop("share_decoder_input_output_embed", False), "pad_token_id": None}
        tensors, io = ({syncdoths(key): value for key, value in named.items()} for named in (tensors, io))
    model = RetNetForCausalLM(RetNetConfig(**keys)).eval()
    model.load_state_dict(tensors)
    return model, io, described


def syncdoths(name: str) -> str:
    """The name in syncdoth's state dict (or of its gradient) of one in torchscale's; recorded outputs keep theirs."""
    gradient = "grad." if name.startswith("grad.") else ""
    name = name.removeprefix("grad.")
    if name == "output_projection.weight":
        return gradient + "lm_head.weight"
    inner = gradient or name.split(".")[0] in (
        "embed_tokens",
        "layernorm_embedding",
        "layers",
        "layer_norm",
        "retnet_rel_pos",
    )
    return f"{gradient}model.{name}" if inner else name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_parallel_form(folder: str) -> None:
    """With the normaliser of the version that made the golden: logits, residual streams, loss, gradients."""
    model, io, described = load(folder)
    mask = io.get("attention_mask")
    model.config.score_normaliser = (
        "abs_sum" if described["reference"]["score_normaliser"].startswith("abs") else "sum_abs"
    )
    try:
        output = model(io["input_ids"], attention_mask=mask, labels=io["input_ids"], output_hidden_states=True)
        model.zero_grad()
        output.loss.backward()
    finally:
        model.config.score_normaliser = None
    assert output.past_key_values is None
    assert_close(output.logits.detach(), io["logits_parallel"], LOGITS)
    for i, stream in enumerate(output.hidden_states):
        last = i == model.config.num_hidden_layers
        if not (last and folder.startswith("retnet_torchscale")):  # recorded there before the final norm
            assert_close(stream.detach(), io[f"hidden.{i}"], LOGITS)
    assert_close(output.loss.item(), io["loss"], LOSS)
    assert_gradients(model, io)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_exact_form_is_the_recurrent_one(folder: str) -> None:
    """Logits of every token, and R / sqrt(S) after the last, in one call, in calls, and in steps."""
    model, io, _ = load(folder)
    tokens, mask = io["input_ids"], io.get("attention_mask")
    real = np.ones(tokens.shape, bool) if mask is None else mask.numpy() == 1
    length, positions = tokens.shape[1], model.model.retnet_rel_pos
    for sizes in ((length,), (9, length - 9), (1,) * length):
        got = run(model, tokens, sizes, mask)
        assert_close(got.logits[real], io["logits_recurrent"].numpy()[real], LOGITS)
        for i, state in enumerate(got.states):
            for row, count in enumerate(real.sum(1)):
                cache = f"cache.{i}" if f"cache.{i}.scale" in io else f"cache_recurrent.{i}"
                published, size = published_state(positions, state[row], int(count), length - int(count))
                assert_close(published, io[f"{cache}.prev_key_value"][row], STATES)
                scales = io[f"{cache}.scale"].reshape(-1, len(size))  # torchscale keeps one for all rows
                assert_close(size, scales[min(row, len(scales) - 1)], 1e-4)


@pytest.mark.parametrize("folder", FOLDERS[4:6])
def test_greedy_tokens(folder: str) -> None:
    model, io, described = load(folder)
    prompt, new = described["generation"]["prompt_len"], described["generation"]["new_tokens"]
    mask = None if "attention_mask" not in io else io["attention_mask"][:, :prompt]
    got = model.generate(
        io["input_ids"][:, :prompt], attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    np.testing.assert_array_equal(got.numpy(), io["generated_greedy"].numpy())


def test_the_parallel_normaliser_takes_no_cache() -> None:
    model, io, _ = load(FOLDERS[0])
    tokens = io["input_ids"]
    cache = model(tokens, use_cache=True).past_key_values
    model.config.score_normaliser = "sum_abs"
    try:
        for how in ({"use_cache": True}, {"past_key_values": cache}):
            with pytest.raises(ValueError, match="'sum_abs' needs the whole sequence; pass use_cache=False"):
                model(tokens, **how)
        model.generate(tokens, max_new_tokens=2, use_cache=False, do_sample=False, pad_token_id=0)
    finally:
        model.config.score_normaliser = None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"multiway": True}, "multiway is True; this RetNet has none"),
        ({"moe_freq": 2}, "moe_freq is 2; this RetNet has none"),
        ({"activation_fn": "gelu_tanh"}, "activation_fn is 'gelu_tanh'; it must be one of 'relu', 'gelu', 'swish'"),
        ({"score_normaliser": "max"}, "score_normaliser is 'max'; it must be one of None, 'abs_sum', 'sum_abs'"),
        ({"decoder_retention_heads": 8}, "8 heads cannot share 24 keys"),
        ({"decoder_value_embed_dim": 33}, "2 heads cannot share 24 keys .* and 33 values"),
    ],
)
def test_what_it_does_not_compute_is_refused(keys: dict[str, Any], message: str) -> None:
    from ssm_jax.interop.torch import RetNetConfig, RetNetForCausalLM

    with pytest.raises(ValueError, match=message):
        RetNetForCausalLM(RetNetConfig(**{**SMALL, **keys}))


def test_the_embedding_of_padding_is_trained_where_texts_end_with_it() -> None:
    from ssm_jax.interop.torch import RetNetConfig, RetNetForCausalLM

    for ends, frozen in ({"eos_token_id": 2}, 0), ({"eos_token_id": [2, 0]}, None), ({"bos_token_id": 0}, None):
        model = RetNetForCausalLM(RetNetConfig(**SMALL, pad_token_id=0, **ends))
        assert model.get_input_embeddings().padding_idx == frozen


def test_a_folder_need_not_repeat_angles_and_decays(tmp_path: Path) -> None:
    """They follow from the config; what is saved has them all the same, as the originals want them."""
    from transformers import AutoModelForCausalLM

    model = TestRetNet().model("deepnorm_plain")
    with quiet():
        model.save_pretrained(tmp_path)
        tensors = {name: np.array(tensor.load()) for name, tensor in open_weights(tmp_path).items()}
        buffers = {name: tensors.pop(name) for name in tuple(tensors) if "retnet_rel_pos" in name}
        write_safetensors(tmp_path / "model.safetensors", as_tensors(tensors))
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert len(buffers) == 2
    for name, value in buffers.items():
        np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), value)


def test_a_folder_of_flash_linear_attention_is_named() -> None:
    """It has the same model type, and other config keys."""
    from ssm_jax.interop.torch.configs import RetNetConfig
    from ssm_jax.interop.torch.retnet import RetNetForCausalLM

    with pytest.raises(
        ValueError, match=r"layout of flash-linear-attention\. Import fla before it is loaded, or convert it"
    ):
        RetNetForCausalLM(RetNetConfig(expand_k=1.0, hidden_size=64))
