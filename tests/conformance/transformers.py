"""Live parity with ``transformers``: a family that it has subclasses ``TransformersParity`` and gives its configs."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.interop.folder import read_json
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
    """Subclass with ``configs``: id -> config, marked ``torch``. Random models, exported by us and loaded there."""

    configs: dict[str, Any]
    logits = LOGITS

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
            metafunc.parametrize("config", self.configs.values(), ids=list(self.configs))

    def test_export_loads_completely_and_computes_the_same(self, config: Any, tmp_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model, params = random_model(config)
        folder = tmp_path / "exported"
        ssm_jax.save_pretrained(model, params, folder, layout="transformers", check=False)
        with quiet():
            theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
            tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 21))
            result = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
            result.loss.backward()
            padding = list(range(config.vocab_size, config.padded_vocab_size))  # rows that we never choose
            greedy = theirs.generate(
                torch.from_numpy(tokens[:, :6]),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                suppress_tokens=padding or None,
            )
        logits, loss, gradients = _ours(model, params, jnp.asarray(tokens, jnp.int32))
        assert_close(logits, result.logits.detach().numpy(), self.logits)
        assert_close(loss, result.loss.item(), LOSS)
        published = to_tensors(writable(family_name(config), "transformers").tensors, gradients)
        expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
        assert set(published) == set(expected)
        for name, value in expected.items():
            assert_close(published[name].load(), value, GRADIENTS * float(np.abs(value).max()))
        ours = ssm_jax.generate(model, params, jnp.asarray(tokens[:, :6], jnp.int32), max_new_tokens=8)
        np.testing.assert_array_equal(ours, greedy.numpy()[:, 6:])

    def test_import_of_what_transformers_saved(self, config: Any, tmp_path: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        files = writable(family_name(config), "transformers").write_files
        assert files is not None
        torch.manual_seed(0)
        with quiet():
            theirs = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**files(config, "float32", {})["config.json"])
            )
            theirs.save_pretrained(tmp_path, max_shard_size="20KB")
            tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 19))
            with torch.no_grad():
                expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        assert (tmp_path / "model.safetensors.index.json").is_file()
        model, params = ssm_jax.from_pretrained(tmp_path)
        assert model.config.padded_vocab_size == config.padded_vocab_size
        assert_close(apply(model, params, jnp.asarray(tokens, jnp.int32))[0], expected, self.logits)

    def test_the_report_says_how_far_pytorch_is(self, config: Any, tmp_path: Path) -> None:
        model, params = random_model(config)
        ssm_jax.save_pretrained(model, params, tmp_path / "exported", check=True)
        logits = read_json(tmp_path / "exported" / "parity.json")["logits"]
        assert logits["compared"]
        assert 0 < logits["largest_difference"] < self.logits
        assert logits["largest_logit"] > 1


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
