"""Baka in PyTorch: what every model promises, the author's outputs, and JAX in both directions."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.interop.layouts import baka, writable
from ssm_jax.interop.layouts.transformers import quiet
from ssm_jax.interop.safetensors_file import read_safetensors
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import BakaConfig
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS
from tests.conformance.torch_model import TorchModelConformance, generate
from tests.conformance.transformers import random_model
from tests.interop.folders import assert_same

pytestmark = pytest.mark.torch

SMALL: dict[str, Any] = {
    "n_vocab": 43, "dim_model": 16, "dim_ff": 24, "n_layers": 2, "n_heads": 2, "n_ctx": 8, "n_pauses": 2, "n_rmt_tokens": 2,
    "d_state": 4,
}  # fmt: skip
STEPS: dict[str, Any] = {
    "norm": "rms", "gate": "relu", "step": "nstep4", "xl_layer": "below", "mamba_each_nth_layer": 0, "n_rmt_tokens": 0
}  # fmt: skip
REACHING: dict[str, Any] = {
    "n_layers": 3, "mamba_each_nth_layer": 2, "mamba_carry": True, "rmt_read": "head", "gate": "sigmoid", "gate_input": "y-x",
    "step": "step4", "step_shared": True, "step_reach": "xl", "dim_attn": 24, "elephant_width": 0.7, "elephant_power": 4.0,
    "residual_in_fp32": False,
}  # fmt: skip


class TestBaka(TorchModelConformance):
    model_class = "BakaForCausalLM"
    far = 700  # places are counted within chunks
    centres = {
        "norm_in.weight": 1.0,
        "norm_mamba.weight": 1.0,
        "norm_out.weight": 1.0,
        "A_log": 1.0,
        "mamba.D": 1.0,
        "dt_proj.bias": -2.0,
    }
    configs = {"mamba_and_memory": SMALL, "steps": {**SMALL, **STEPS}, "what_crosses_chunks": {**SMALL, **REACHING}}


JAX_CONFIGS = {
    "mamba_in_every_second": BakaConfig(
        vocab_size=41, d_model=16, n_layers=3, n_heads=2, d_mlp=24, n_ctx=8, n_pauses=2, n_rmt_tokens=2, mamba_every=2,
        d_state=4, pad_vocab_size_multiple=4,
    ),
    "what_crosses_chunks": BakaConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_mlp=24, d_attn=24, n_ctx=8, n_pauses=3, n_rmt_tokens=3,
        rmt_read="head", xl_layer="below", norm="rms", norm_eps=1e-4, gate="sigmoid", gate_input="y-x", step="step4",
        step_shared=True, step_reach="xl", mamba_every=1, mamba_carry=True, d_state=3, d_conv=3, expand=1, dt_rank=2,
        rope_base=100.0, elephant_width=0.8, elephant_power=3.0, tie_embeddings=True, residual_in_fp32=False,
    ),
    "calls_close_chunks": BakaConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_mlp=24, n_ctx=8, n_pauses=4, n_rmt_tokens=2, act="silu",
        gate="leaky_relu", gate_input="y", step="step4", mamba_every=0, chunk_boundary="call", xl_layer="below",
    ),
}  # fmt: skip
SLOW_CONFIGS = {
    "no_cache": BakaConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_mlp=24, n_ctx=8, n_pauses=8, n_rmt_tokens=1, xl_layer="none",
        step="nstep4", step_reach="xl", mamba_every=3, d_state=4,
    ),
    "nothing_between_chunks": BakaConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=4, d_mlp=24, n_ctx=8, n_pauses=0, n_rmt_tokens=0, xl_layer="none",
        mamba_every=0, chunk_boundary="call",
    ),
    "head_by_calls": BakaConfig(
        vocab_size=40, d_model=16, n_layers=4, n_heads=2, d_mlp=24, n_ctx=8, n_pauses=2, n_rmt_tokens=3, rmt_read="head",
        mamba_every=3, mamba_carry=True, d_state=4, chunk_boundary="call", gate="relu", step="nstep4", step_shared=True,
    ),
}  # fmt: skip
CONFIGS = [
    *(pytest.param(config, id=name) for name, config in JAX_CONFIGS.items()),
    *(pytest.param(config, id=name, marks=pytest.mark.slow) for name, config in SLOW_CONFIGS.items()),
]
LOGITS, LOSS, GRADIENTS = 2e-5, 1e-5, 1e-4
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 21)).astype(np.int32)


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    with jax.default_matmul_precision("highest"):
        yield


def auto(folder: Path) -> Any:
    """By the Auto classes, with nothing missing, left over or made up."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@functools.partial(jax.jit, static_argnames="model")
def ours(model: Any, params: Any, tokens: jax.Array) -> Any:
    """Logits, loss and gradients."""

    def loss(params: Any) -> Any:
        logits = model.apply({"params": params}, tokens)[0]
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, value, gradients


def assert_computes_the_same(model: Any, params: Any, theirs: Any) -> None:
    """Logits, loss and the gradient of every parameter, of more than two chunks; PyTorch in float64."""
    import torch

    theirs = theirs.double()
    tokens = torch.from_numpy(TOKENS).long()
    output = theirs(tokens, labels=tokens)
    output.loss.backward()
    expected_logits = output.logits.detach()
    logits, loss, gradients = ours(model, params, jnp.asarray(TOKENS))
    assert_close(logits, expected_logits, LOGITS * max(1.0, float(expected_logits.abs().max())))
    assert_close(loss, output.loss.item(), LOSS)
    named = to_tensors(writable("baka", None).tensors_of(model.config), gradients)
    published = {name: tensor.load() for name, tensor in named.items()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(published) == set(expected)
    for name, value in expected.items():
        try:
            assert_close(published[name], value, GRADIENTS * float(value.abs().max()))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("config", CONFIGS)
def test_both_directions(config: BakaConfig, tmp_path: Path) -> None:
    """Ours is loaded there and computes the same; what is saved there is read here bit for bit."""
    model, params = random_model(config)
    ssm_jax.save_pretrained(model, params, tmp_path / "ours", check=False)
    theirs = auto(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    read_model, read = ssm_jax.from_pretrained(
        tmp_path / "theirs", vocab_size=config.vocab_size, pad_vocab_size_multiple=config.pad_vocab_size_multiple
    )
    assert dataclasses.replace(read_model.config, d_mlp=config.d_mlp, d_attn=config.d_attn) == config
    assert_same(read, params)
    assert_computes_the_same(model, params, theirs)


def test_the_report_compares(tmp_path: Path) -> None:
    model, params = random_model(JAX_CONFIGS["calls_close_chunks"])
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=True)
    report = json.loads((tmp_path / "m" / "parity.json").read_text())
    assert report["layout"] == "bakallm"
    assert report["logits"]["compared"]
    assert 0 < report["logits"]["largest_difference"] < LOGITS * report["logits"]["largest_logit"]


def test_greedy_tokens_are_the_same(tmp_path: Path) -> None:
    """Prompts of unequal length, padded to the left; over the ends of chunks."""
    import torch

    config = JAX_CONFIGS["what_crosses_chunks"]
    model, params = random_model(config)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)
    prompts = [list(map(int, TOKENS[i % 2, :length])) for i, length in enumerate((11, 4, 7))]
    rows = torch.tensor([[0] * (11 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (11 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    got = generate(auto(tmp_path / "m"), rows, attention_mask=mask, max_new_tokens=9)
    np.testing.assert_array_equal(got[:, 11:], ssm_jax.generate(model, params, prompts, max_new_tokens=9))


def test_where_calls_close_chunks_every_token_is_of_the_whole_text(tmp_path: Path) -> None:
    import torch

    model, params = random_model(JAX_CONFIGS["calls_close_chunks"])
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)
    theirs, expected = auto(tmp_path / "m"), torch.from_numpy(TOKENS[:, :5]).long()
    got = generate(theirs, expected, max_new_tokens=6)
    for _ in range(6):
        with torch.no_grad():
            output = theirs(expected)
        assert output.past_key_values is None
        expected = torch.cat([expected, output.logits[:, -1:].argmax(-1)], dim=1)
    np.testing.assert_array_equal(got, expected)


CASES = ("celp18_lanes", "mamba_every2_rmt_tail", "steps_gated")


@pytest.mark.parametrize("case", CASES)
def test_the_authors_calls(case: str, tmp_path: Path) -> None:
    """Logits, losses and gradients of every call, from the state of the one before, lanes dropped and joined.

    In the third of ``celp18_lanes`` the author lets the new lane attend to its padding.
    """
    import torch

    from ssm_jax.interop.torch import RecurrentCache

    folder = GOLDENS / "baka" / case
    jax_model, params = ssm_jax.from_pretrained(folder, chunk_boundary="call")
    ssm_jax.save_pretrained(jax_model, params, tmp_path / "m", check=False)
    model = auto(tmp_path / "m")
    io = {name: torch.from_numpy(np.array(x.load())) for name, x in read_safetensors(folder / "io.safetensors").items()}
    cache = None
    for number, described in enumerate(json.loads((folder / "passes.json").read_text())["passes"], start=1):
        recorded = {
            name.removeprefix(f"pass{number}."): x for name, x in io.items() if name.startswith(f"pass{number}.")
        }
        rows, continued = len(recorded["tokens"]), described["continued_lanes"]
        if cache is not None:
            stay = torch.tensor([i for i in range(len(cache.tokens)) if i not in described["removed_before"]])
            grown = [
                torch.cat([x[stay], x.new_zeros(rows - continued, *x.shape[1:])]).detach()
                for x in (*cache.layers, cache.tokens)
            ]
            cache = RecurrentCache(grown[:-1], grown[-1], cache.columns)
        model.zero_grad()
        output = model(
            recorded["tokens"].long(), labels=recorded["labels"].long(), past_key_values=cache, use_cache=True
        )
        output.loss.backward()
        cache = output.past_key_values
        alone = continued if 0 < continued < rows else rows
        assert_close(output.logits[:alone].detach(), recorded["logits"][:alone], LOGITS)
        assert_close(output.logits[alone:, :16].detach(), recorded["logits"][alone:, :16], LOGITS)
        if alone == rows:
            assert_close(output.loss.item(), recorded["loss"].item(), LOSS)
        parameters = dict(model.named_parameters())
        for name in (name for name in recorded if name.startswith("grad.")):
            plain = baka.BAKALLM.rename(name.removeprefix("grad."))
            size = float(recorded[name].abs().max())
            assert_close(parameters[plain].grad, recorded[name], GRADIENTS * size)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; it must be one of 'elephant', 'elephant18_fast', 'silu'"),
        ({"rmt_read": "middle"}, "rmt_read is 'middle'; it must be one of 'tail', 'head'"),
        ({"gate_input": "z"}, "gate_input is 'z'; it must be one of 'x', 'y', 'y-x'"),
        ({"n_heads": 3}, "3 heads cannot share 16 keys .* and 16 values"),
        ({"dim_attn": 18}, "2 heads cannot share 18 keys .an even number each. and 16 values"),
    ],
)
def test_what_it_does_not_compute_is_refused(keys: dict[str, Any], message: str) -> None:
    from ssm_jax.interop.torch import BakaConfig as TorchConfig

    with pytest.raises(ValueError, match=message):
        TorchConfig(**{**SMALL, **keys})
