"""Parity with outputs that PyTorch produced: a family's test subclasses ``GoldenParity`` and names its golden folders.

A golden folder is a weight folder in a public layout plus ``io.safetensors``: inputs, logits, loss, every gradient, cached
states, a greedy continuation. Float32 on CPU, matrix products in full precision.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax import ops
from ssm_jax.interop.pretrained import open_folder
from ssm_jax.interop.safetensors_file import read_safetensors
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params
from tests.conformance.compare import assert_close

GOLDENS = Path(__file__).parent.parent / "goldens"
LOGITS, STATES, LOSS, GRADIENTS = 1e-4, 5e-5, 1e-5, 1e-4


class GoldenParity:
    """Subclass with ``folders``, paths below tests/goldens, and ``published_states``.

    ``same_in_other_layouts``: folders that hold the models of ``folders`` in another layout; there logits, states, loss and
    gradients are compared, and the rest follows from them.
    """

    folders: tuple[str, ...]
    same_in_other_layouts: tuple[str, ...] = ()

    @staticmethod
    def published_states(layers: Any) -> dict[str, np.ndarray]:
        """Name after ``cache.<layer>.`` -> our stacked state [n, B, ...] with the published axes; of a convolution's K
        published inputs the last K-1."""
        raise AssertionError("a family says how its states are published")

    @pytest.fixture(autouse=True)
    def _exact_products(self) -> Iterator[None]:
        with jax.default_matmul_precision("highest"):
            yield

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "folder" in metafunc.fixturenames:
            metafunc.parametrize("folder", self.folders)
        if "any_folder" in metafunc.fixturenames:
            metafunc.parametrize("any_folder", self.folders + self.same_in_other_layouts)

    def test_logits_and_states(self, any_folder: str) -> None:
        model, params, io = load_golden(any_folder)
        logits, state = apply(model, params, io["input_ids"])
        assert_close(logits, io["logits"], LOGITS)
        self._assert_states(state, io)

    def test_loss_and_every_gradient(self, any_folder: str) -> None:
        model, params, io = load_golden(any_folder)
        (loss, gradients) = _loss_and_gradients(model, params, io["input_ids"], io["labels"])
        assert_close(loss, io["loss"], LOSS)
        source = open_folder(GOLDENS / any_folder)
        tensors = to_tensors(source.layout.tensors_of(source.model.config), gradients)
        published = {name: tensor.load() for name, tensor in tensors.items()}
        expected = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
        assert set(published) == set(expected)
        for name, value in expected.items():
            scale = float(np.abs(value).max())
            assert scale > 0, name
            difference = float(np.abs(published[name] - value).max())
            assert difference <= GRADIENTS * scale, f"{name}: {difference:.3g} of {scale:.3g}"

    def test_split_prompt(self, folder: str) -> None:
        model, params, io = load_golden(folder)
        point = int(io["split.point"])
        first, state = apply(model, params, io["input_ids"][:, :point])
        second, state = apply(model, params, io["input_ids"][:, point:], state)
        assert_close(first, io["split.logits_first"], LOGITS)
        assert_close(second, io["split.logits_second"], LOGITS)
        self._assert_states(state, io)

    def test_single_token(self, folder: str) -> None:
        model, params, io = load_golden(folder)
        assert_close(apply(model, params, io["len1.input_ids"])[0], io["len1.logits"], LOGITS)

    def test_greedy_tokens(self, folder: str) -> None:
        model, params, io = load_golden(folder)
        logits, state = apply(model, params, io["input_ids"])
        tokens = []
        for _ in range(io["generated"].shape[1]):
            tokens.append(np.argmax(logits[:, -1:], axis=-1))
            logits, state = apply(model, params, tokens[-1], state)
        np.testing.assert_array_equal(np.concatenate(tokens, axis=1), io["generated"])

    def test_left_padding(self, folder: str) -> None:
        model, params, io = load_golden(folder)
        if "pad.input_ids" not in io:  # not every folder has a padded batch; at least one has
            assert any("pad.input_ids" in load_golden(other)[2] for other in self.folders)
            return
        mask = io["pad.attention_mask"]
        positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
        logits, _ = apply(model, params, io["pad.input_ids"], None, positions)
        assert not mask.all()
        assert_close(np.asarray(logits)[mask == 1], io["pad.logits"][mask == 1], LOGITS)

    def _assert_states(self, state: Any, io: Mapping[str, np.ndarray]) -> None:
        for kind, ours in self.published_states(state.layers).items():
            for layer, value in enumerate(ours):
                expected = io[f"cache.{layer}.{kind}"]
                assert_close(value, expected[..., 1:] if kind == "conv" else expected, STATES)


@functools.cache
def load_golden(folder: str) -> tuple[LanguageModel, Params, dict[str, np.ndarray]]:
    """The model, its parameters and the recorded inputs and outputs, token ids as int32."""
    model, params = ssm_jax.from_pretrained(GOLDENS / folder)
    io = {name: np.asarray(t.load()) for name, t in read_safetensors(GOLDENS / folder / "io.safetensors").items()}
    return model, params, {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in io.items()}


@functools.partial(jax.jit, static_argnames="model")
def apply(model: LanguageModel, params: Params, tokens: Any, state: Any = None, positions: Any = None) -> Any:
    """``model.apply``, compiled once per shape."""
    return model.apply({"params": params}, tokens, state=state, positions=positions)


@functools.partial(jax.jit, static_argnames="model")
def _loss_and_gradients(model: LanguageModel, params: Params, tokens: jax.Array, labels: jax.Array) -> Any:
    """The training loss: labels are targets of the token before; -100 has no weight."""
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weights = (targets != -100).astype(jnp.float32)

    def loss(params: Params) -> jax.Array:
        features, _ = model.apply({"params": params}, tokens, method="features")
        total, weight = ops.linear_cross_entropy(features, model.readout(params), jnp.maximum(targets, 0), weights)
        return total / weight

    return jax.value_and_grad(loss)(params)
