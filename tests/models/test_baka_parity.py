"""Baka against tensors that the author's code made, of three branches: every call, its loss and its gradients.

In the third call of ``celp18_lanes`` a lane has left and one joins. There the author lets the new lane attend to the padding that
makes it as long as the other; so its logits after the first chunk, and the loss, are others than ours.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import read_safetensors
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS

CASES = {"celp18_lanes": 3, "mamba_every2_rmt_tail": 2, "steps_gated": 2}
"""Golden -> its calls."""
CALLS = [(case, number) for case, count in CASES.items() for number in range(count)]
MIXED = ("celp18_lanes", 2)
GRADIENTS_OF = {
    ("celp18_lanes", 0): 12,
    ("celp18_lanes", 1): 4,
    ("mamba_every2_rmt_tail", 0): 9,
    ("steps_gated", 0): 10,
}
"""How many were recorded."""
LOGITS, LOSS, GRADIENTS = 2e-5, 1e-5, 1e-4


class Call(NamedTuple):
    """What one of our calls gives, and what was recorded of the author's, names without ``passN.``."""

    logits: np.ndarray
    hidden: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    recorded: dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def calls(case: str) -> list[Call]:
    """All calls of a golden, each from the state of the one before, with lanes dropped and joined as recorded."""
    folder = GOLDENS / "baka" / case
    model, params = ssm_jax.from_pretrained(folder, chunk_boundary="call")
    io = {name: np.asarray(tensor.load()) for name, tensor in read_safetensors(folder / "io.safetensors").items()}
    state, made = None, []
    for number, described in enumerate(json.loads((folder / "passes.json").read_text())["passes"], start=1):
        recorded = {
            name.removeprefix(f"pass{number}."): x for name, x in io.items() if name.startswith(f"pass{number}.")
        }
        tokens, continued = jnp.asarray(recorded["tokens"]), described["continued_lanes"]
        joined, positions = len(tokens) - continued, None
        if state is not None and (joined or described["removed_before"]):
            stay = [i for i in range(len(state.position)) if i not in described["removed_before"]]
            state = ssm_jax.take_lanes(state, stay + [0] * joined)  # what a joining lane holds has no influence
            start = jnp.where(jnp.arange(len(tokens)) < continued, state.position, 0)
            positions = start[:, None] + jnp.arange(tokens.shape[1])
        wanted = any(name.startswith("grad.") for name in recorded)
        loss, gradients, logits, hidden, state = _call(
            model, wanted, params, tokens, jnp.asarray(recorded["labels"]), state, positions
        )
        made.append(Call(logits, hidden, float(loss), _published(case, model, gradients), recorded))
    return made


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(
    model: LanguageModel,
    differentiated: bool,
    params: Params,
    tokens: jax.Array,
    labels: jax.Array,
    state: Any,
    positions: Any,
) -> Any:
    def loss(params: Params) -> Any:
        (logits, after), seen = model.apply(
            {"params": params},
            tokens,
            state=state,
            positions=positions,
            capture_intermediates=lambda module, _: module.name == "layers",
            mutable=["intermediates"],
        )
        hidden = seen["intermediates"]["layers"]["__call__"][0][0]
        targets = labels[:, 1:]
        scores = jax.nn.log_softmax(logits[:, :-1])
        taken = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        mean = -jnp.sum(jnp.where(targets >= 0, taken, 0)) / jnp.sum(targets >= 0)
        return mean, (logits, hidden, after)

    if not differentiated:
        value, others = loss(params)
        return value, None, *others
    (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradients, *others


def _published(case: str, model: LanguageModel, gradients: Any) -> dict[str, np.ndarray]:
    if gradients is None:
        return {}
    layout = open_folder(GOLDENS / "baka" / case).layout
    tensors = to_tensors(layout.tensors_of(model.config), gradients)
    return {layout.spelling(model.config, name): np.asarray(tensor.load()) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("case", "number"), CALLS)
def test_logits(case: str, number: int) -> None:
    call = calls(case)[number]
    expected = call.recorded["logits"]
    alone = len(expected) - ((case, number) == MIXED)
    assert_close(call.logits[:alone], expected[:alone], LOGITS)
    assert_close(call.logits[alone:, :16], expected[alone:, :16], LOGITS)


@pytest.mark.parametrize(("case", "number"), [call for call in CALLS if call != MIXED])
def test_loss(case: str, number: int) -> None:
    call = calls(case)[number]
    assert_close(call.loss, call.recorded["loss"][0], LOSS)


@pytest.mark.parametrize(("case", "number"), GRADIENTS_OF)
def test_gradients(case: str, number: int) -> None:
    """All that were recorded: of this call's loss, what came before it constant."""
    call = calls(case)[number]
    recorded = {name.removeprefix("grad."): x for name, x in call.recorded.items() if name.startswith("grad.")}
    assert len(recorded) == GRADIENTS_OF[case, number]
    for name, expected in recorded.items():
        assert_close(call.gradients[name], expected, GRADIENTS * float(np.abs(expected).max()))


@pytest.mark.parametrize("case", CASES)
def test_residual_stream(case: str) -> None:
    """After the last layer, pauses and memory taken out."""
    first = calls(case)[0]
    assert_close(first.hidden, first.recorded["hidden"], LOGITS)
