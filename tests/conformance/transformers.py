"""Live parity with ``transformers``: a family that it has, or that we register there, subclasses ``TransformersParity``."""

import functools
from collections.abc import Iterator
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
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import LanguageModel
from ssm_jax.models.registry import family_name
from ssm_jax.typing import Params
from tests.conformance.compare import assert_close
from tests.conformance.golden import apply

LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-4


class TransformersParity:
    """Subclass with ``configs``: id -> config, marked ``torch``. Random models, exported by us and loaded there, and back.

    layout: the one that ``AutoModelForCausalLM`` loads. logits: how far they may be apart, of the largest where that is above 1.
    reference: type that logits, loss and gradients are computed in there; float64, where it can, leaves only our own rounding.
    stored: names of modules there -> those in files, where they differ.
    cached: whether ``generate`` there goes by steps; else it computes every prefix anew.
    """

    configs: dict[str, Any]
    layout = "transformers"
    logits = LOGITS
    reference = "float32"
    stored: dict[str, str] = {}
    cached = True

    @pytest.fixture(autouse=True)
    def _exact_products_on_one_thread(self) -> Iterator[None]:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tensors this small only wait for each other's threads
        with jax.default_matmul_precision("highest"):
            yield
        torch.set_num_threads(threads)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "config" in metafunc.fixturenames:
            configs = self.configs
            if "greedy" in metafunc.function.__name__:  # RetNet's published parallel forms take no state
                configs = {name: x for name, x in configs.items() if getattr(x, "score_normaliser", None) is None}
            metafunc.parametrize("config", configs.values(), ids=list(configs))

    def test_export_loads_completely_and_computes_the_same(self, config: Any, tmp_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model, params = random_model(config)
        folder = tmp_path / "exported"
        ssm_jax.save_pretrained(model, params, folder, layout=self.layout, check=False)
        with quiet():
            theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
            tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 21))
            result = theirs.to(getattr(torch, self.reference))(
                torch.from_numpy(tokens), labels=torch.from_numpy(tokens)
            )
            result.loss.backward()
        logits, loss, gradients = _ours(model, params, jnp.asarray(tokens, jnp.int32))
        self.assert_logits(logits, result.logits.detach().numpy())
        assert_close(loss, result.loss.item(), LOSS)
        row = writable(family_name(config), self.layout)
        named = to_tensors(row.tensors_of(config), gradients)
        published = {row.spelling(config, name): tensor.load() for name, tensor in named.items()}
        parameters = {self.stored.get(name, name): parameter for name, parameter in theirs.named_parameters()}
        assert set(published) == set(parameters)
        for name, parameter in parameters.items():
            # None where nothing below the first layer is read.
            expected = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
            try:
                assert_close(published[name], expected, GRADIENTS * float(np.abs(expected).max()))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None

    def test_greedy_tokens_are_the_same(self, config: Any, tmp_path: Path) -> None:
        """Prompts of unequal length, padded to the left."""
        import torch
        from transformers import AutoModelForCausalLM

        model, params = random_model(config)
        ssm_jax.save_pretrained(model, params, tmp_path / "exported", layout=self.layout, check=False)
        drawn = np.random.default_rng(1).integers(0, config.vocab_size, (3, 11))
        prompts = [list(map(int, row[:length])) for row, length in zip(drawn, (11, 4, 7), strict=True)]
        rows = torch.tensor([[0] * (11 - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (11 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        padding = list(range(config.vocab_size, config.padded_vocab_size))  # rows that we never choose
        with quiet():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
            greedy = theirs.generate(
                rows,
                attention_mask=mask,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                use_cache=self.cached,
                pad_token_id=0,
                suppress_tokens=padding or None,
            )
        ours = ssm_jax.generate(model, params, prompts, max_new_tokens=8)
        np.testing.assert_array_equal(ours, greedy.numpy()[:, 11:])

    def test_import_of_what_transformers_saved(self, config: Any, tmp_path: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        files = writable(family_name(config), self.layout).write_files
        assert files is not None
        torch.manual_seed(0)
        with quiet():
            theirs = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**files(config, "float32", {})["config.json"])
            ).eval()
            theirs.save_pretrained(tmp_path, max_shard_size="20KB")
            tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 19))
            with torch.no_grad():
                expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        assert (tmp_path / "model.safetensors.index.json").is_file()
        model, params = ssm_jax.from_pretrained(tmp_path)
        assert model.config.padded_vocab_size == config.padded_vocab_size
        self.assert_logits(apply(model, params, jnp.asarray(tokens, jnp.int32))[0], expected)
        ssm_jax.save_pretrained(model, params, tmp_path / "again", layout=self.layout, check=False)
        stored, written = open_weights(tmp_path), open_weights(tmp_path / "again")
        assert set(written) == set(stored)
        for name, tensor in stored.items():
            np.testing.assert_array_equal(written[name].load(), tensor.load(), err_msg=name, strict=True)

    def test_the_report_says_how_far_pytorch_is(self, config: Any, tmp_path: Path) -> None:
        model, params = random_model(config)
        ssm_jax.save_pretrained(model, params, tmp_path / "exported", self.layout, check=True)
        logits = read_json(tmp_path / "exported" / "parity.json")["logits"]
        assert logits["compared"]
        assert logits["largest_logit"] > 1
        assert 0 < logits["largest_difference"] < self.logits * logits["largest_logit"]

    def assert_logits(self, got: Any, expected: np.ndarray) -> None:
        assert_close(got, expected, self.logits * max(1.0, float(np.abs(expected).max())))


@functools.cache
def random_model(config: Any) -> tuple[LanguageModel, Params]:
    """Seeded numbers in every leaf, none at a trivial value, with logits of size 1 to 10."""
    centres = {"scale": 1.0, "D": 1.0, "A_log": 1.0, "dt_bias": -2.0}
    model, rng = ssm_jax.build(config), np.random.default_rng(0)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(centres.get(path[-1].key, 0.0) + 0.3 * rng.normal(size=shape.shape), shape.dtype)

    return model, jax.tree.map_with_path(leaf, abstract_params(model))


@functools.partial(jax.jit, static_argnames="model")
def _ours(model: Any, params: Params, tokens: jax.Array) -> Any:
    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, tokens)[0]
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, value, gradients
