"""Gated state spaces in PyTorch: what every model promises, the package's outputs, and JAX in both directions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.interop.folder import open_weights, read_json
from ssm_jax.interop.layouts import writable
from ssm_jax.interop.layouts.transformers import quiet
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import GSSConfig
from ssm_jax.typing import Params
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS, apply, load_golden
from tests.conformance.torch_model import TorchModelConformance, generate, run
from tests.interop.folders import assert_same

pytestmark = pytest.mark.torch

FOLDERS = ("gss/s1_even16", "gss/s2_odd37_patched", "gss/s3_len1_patched_noexp")
LOGITS, GRADIENTS = 2e-5, 1e-4
SMALL: dict[str, Any] = {"num_tokens": 43, "dim": 16, "depth": 2, "dss_kernel_N": 12, "dss_kernel_H": 8}
JAX_CONFIGS = {
    "plain": GSSConfig(vocab_size=61, d_model=16, n_layers=2, dss_kernel_N=12, dss_kernel_H=8),
    "patched": GSSConfig(
        vocab_size=40, d_model=32, n_layers=3, dim_expansion_factor=1.7, dss_kernel_N=9, dss_kernel_H=10, final_norm=True
    ),
    "tied_slow": GSSConfig(
        vocab_size=40, d_model=16, n_layers=2, dss_kernel_N=12, dss_kernel_H=8, final_norm=True, tie_embeddings=True,
        dss_kernel_lambda_imag_exp=False, init="slow", accurate=True,
    ),
}  # fmt: skip


class TestGatedStateSpaces(TorchModelConformance):
    model_class = "GatedStateSpacesForCausalLM"
    centres = {"norm.weight": 1.0, "to_logits.0.weight": 1.0, "Lambda_real": -1.5}
    configs = {
        "as_the_package": SMALL,
        "patched_noexp_accurate": {
            **SMALL, "final_norm": True, "dss_kernel_lambda_imag_exp": False, "accurate": True, "dim_expansion_factor": 1.7
        },
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    with jax.default_matmul_precision("highest"):
        yield


def jax_model(config: GSSConfig) -> tuple[Any, Params]:
    """As initialised, with read-outs of a size such that logits are of size 1 to 10."""
    model = ssm_jax.build(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer = params["layers"]["mixer"]
    mixer |= {name: mixer[name] / config.dss_kernel_N**0.5 for name in ("C_real", "C_imag")}
    return model, params


def auto(folder: Path) -> Any:
    """By the Auto classes, with nothing missing, left over or made up."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_logits_loss_gradients_and_greedy_tokens(folder: str) -> None:
    import torch

    from ssm_jax.interop.torch import GatedStateSpacesConfig, GatedStateSpacesForCausalLM

    config, (_, _, io) = read_json(GOLDENS / folder / "config.json"), load_golden(folder)
    weights = {
        name.removeprefix("net."): torch.from_numpy(np.array(x.load()))
        for name, x in open_weights(GOLDENS / folder).items()
    }
    model = GatedStateSpacesForCausalLM(GatedStateSpacesConfig(**config, final_norm="to_logits.0.weight" in weights))
    model.load_state_dict(weights)
    tokens, labels = (torch.from_numpy(io[name]).long() for name in ("input_ids", "labels"))
    logits = model.eval()(tokens).logits
    assert_close(logits.detach(), io["logits"], LOGITS)
    assert_close(run(model, tokens, (1,) * tokens.shape[1]).logits, io["logits"], LOGITS)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_close(loss.item(), io["loss"], 1e-5)
    loss.backward()
    expected = {
        name.removeprefix("grad.").removeprefix("net."): x for name, x in io.items() if name.startswith("grad.")
    }
    assert set(expected) == set(weights)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], GRADIENTS * float(np.abs(expected[name]).max()))
    prompt, greedy = (torch.from_numpy(io[name]).long() for name in ("greedy_prompt", "greedy_tokens"))
    got = generate(model, prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=greedy.shape[1])
    np.testing.assert_array_equal(got[:, prompt.shape[1] :], greedy)


@pytest.mark.parametrize("name", JAX_CONFIGS)
def test_an_export_is_loaded_and_computes_the_same(tmp_path: Path, name: str) -> None:
    """Logits, the gradient of every parameter, and greedy tokens of prompts of unequal length."""
    import torch

    config = JAX_CONFIGS[name]
    model, params = jax_model(config)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)
    theirs = auto(tmp_path / "m")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 37)).astype(np.int32)
    output = theirs(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long())
    assert_close(apply(model, params, tokens)[0], output.logits.detach(), LOGITS)
    output.loss.backward()

    @jax.jit
    def loss(params: Params) -> jax.Array:
        scores = jax.nn.log_softmax(model.apply({"params": params}, jnp.asarray(tokens))[0][:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    row = writable("gss", "gated_state_spaces")
    ours = {row.spelling(config, key): x.load() for key, x in to_tensors(row.tensors, jax.grad(loss)(params)).items()}
    expected = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    assert set(ours) == set(expected)
    for key, value in expected.items():
        assert_close(ours[key], value, GRADIENTS * float(np.abs(value).max()))

    prompts = [list(map(int, tokens[i, :length])) for i, length in enumerate((11, 4, 7))]
    greedy = ssm_jax.generate(model, params, prompts, max_new_tokens=9)
    rows = torch.tensor([[0] * (11 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (11 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    got = generate(theirs, rows, attention_mask=mask, max_new_tokens=9)
    np.testing.assert_array_equal(got[:, 11:], greedy)


@pytest.mark.parametrize("name", TestGatedStateSpaces.configs)
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_pytorch_is_read_bit_for_bit(tmp_path: Path, name: str, tied: bool) -> None:
    """And written again, it is the same."""
    import torch

    theirs = TestGatedStateSpaces().model(name, tie_word_embeddings=tied)
    with quiet():
        theirs.save_pretrained(tmp_path / "torch")
    model, params = ssm_jax.from_pretrained(tmp_path / "torch")
    config = theirs.config
    assert model.config == GSSConfig(
        vocab_size=config.num_tokens, d_model=config.dim, n_layers=config.depth, dss_kernel_N=config.dss_kernel_N,
        dss_kernel_H=config.dss_kernel_H, final_norm=config.final_norm,
        dss_kernel_lambda_imag_exp=config.dss_kernel_lambda_imag_exp, accurate=config.accurate, tie_embeddings=tied,
        dim_expansion_factor=float(config.dim_expansion_factor),
    )  # fmt: skip
    row, state = writable("gss", None), theirs.state_dict()
    for key, tensor in to_tensors(row.tensors, params).items():
        np.testing.assert_array_equal(tensor.load(), state[row.spelling(model.config, key)].numpy(), err_msg=key)
    tokens = np.random.default_rng(2).integers(0, config.num_tokens, (2, 29)).astype(np.int32)
    assert_close(apply(model, params, tokens)[0], run(theirs, torch.from_numpy(tokens).long()).logits, LOGITS)
    ssm_jax.save_pretrained(model, params, tmp_path / "again", check=False)
    assert_same(ssm_jax.from_pretrained(tmp_path / "again")[1], params)
    for key, tensor in auto(tmp_path / "again").state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[key].numpy(), err_msg=key)


def test_accurate_phases_last(tmp_path: Path) -> None:
    """Modes that remember thousands of tokens, over more of them than one piece: as in JAX, and as in float64."""
    import torch

    config = GSSConfig(
        vocab_size=40, d_model=16, n_layers=2, dss_kernel_N=12, dss_kernel_H=8, init="slow", accurate=True
    )
    model, params = jax_model(config)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)
    theirs = auto(tmp_path / "m")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 3000)).astype(np.int32)
    got = run(theirs, torch.from_numpy(tokens).long()).logits
    assert_close(got, apply(model, params, tokens)[0], 1e-4)
    assert_close(got, run(theirs.double(), torch.from_numpy(tokens).long()).logits, 1e-4)


def test_padding_between_tokens_is_refused() -> None:
    import torch

    model = TestGatedStateSpaces().model("as_the_package")
    with pytest.raises(ValueError, match="attention_mask has zeros between ones"):
        model(torch.ones(2, 4).long(), attention_mask=torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]))


def test_the_tokenizer_and_the_end_of_text_travel(tmp_path: Path) -> None:
    """What training ends documents with ends generation."""
    from transformers import AutoTokenizer

    from ssm_jax.data.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    model, params = jax_model(GSSConfig(vocab_size=257, d_model=16, n_layers=1, dss_kernel_N=12, dss_kernel_H=8))
    ssm_jax.save_pretrained(model, params, tmp_path / "m", tokenizer=tokenizer, check=False)
    theirs = auto(tmp_path / "m")
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("für").input_ids == list("für".encode())
