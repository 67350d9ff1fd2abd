"""What every PyTorch model of ``ssm_jax.interop.torch`` promises: a family's test subclasses ``TorchModelConformance``."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_jax.interop.layouts.transformers import quiet
from tests.conformance.compare import assert_close

EXACT = {"float32": 1e-5, "float64": 1e-10}
"""By type: how far the forms may be apart, relative to the largest logit where that is above 1."""
LENGTH = 23
PADS = (0, 5, 9)
"""Of the rows of a padded batch, which are as long as the first without its padding."""


class TorchModelConformance:
    """Subclass, marked ``torch``, with ``model_class``, a name in ``ssm_jax.interop.torch``, and ``configs``: id -> its keys.

    ``centres``: end of a parameter's name -> what its random numbers lie around, where it is not 0.
    ``far``: tokens that are read in half precision.
    """

    model_class: str
    configs: dict[str, dict[str, Any]]
    centres: dict[str, float] = {}
    far = 2100

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tensors this small only wait for each other's threads
        yield
        torch.set_num_threads(threads)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.configs)

    def model(self, name: str, **changes: Any) -> Any:
        """Random numbers in every parameter, none at a trivial value, with logits of size 1 to 10."""
        import torch

        from ssm_jax.interop import torch as modules

        cls = getattr(modules, self.model_class)
        model = cls(cls.config_class(**(self.configs[name] | changes))).eval()
        rng = np.random.default_rng(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                centre = next((value for end, value in self.centres.items() if key.endswith(end)), None)
                scale = 0.3 if centre is not None or parameter.ndim < 2 else parameter.shape[-1] ** -0.5
                drawn = (centre or 0.0) + scale * rng.normal(size=tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
        return model

    def tokens(self, model: Any, rows: int = len(PADS), length: int = LENGTH) -> Any:
        import torch

        return torch.from_numpy(np.random.default_rng(1).integers(3, model.config.vocab_size, (rows, length)))

    def padded(self, tokens: Any) -> tuple[Any, Any]:
        """Rows with their first tokens replaced by padding, and the mask."""
        import torch

        mask = (torch.arange(tokens.shape[1]) >= torch.tensor(PADS)[:, None]).long()
        return torch.where(mask.bool(), tokens, 0), mask

    @pytest.mark.parametrize("dtype", EXACT)
    def test_whole_chunks_calls_and_steps_agree(self, name: str, dtype: str) -> None:
        import torch

        model = self.model(name).to(getattr(torch, dtype))
        tokens = self.tokens(model)
        whole = run(model, tokens)
        tolerance = EXACT[dtype] * max(1.0, float(np.abs(whole.logits).max()))
        chunked = self.model(name, recurrent_chunk_size=5).to(getattr(torch, dtype))
        for other in (run(chunked, tokens), run(model, tokens, (8, 1, 11, 3)), run(model, tokens, (1,) * LENGTH)):
            assert_close(other.logits, whole.logits, tolerance)
            for ours, expected in zip(other.states, whole.states, strict=True):
                assert_close(ours, expected, tolerance * max(1.0, float(np.abs(expected).max())))

    def test_padding_changes_nothing(self, name: str) -> None:
        """Left of the tokens and right of them, in one call or several; the state is that of the tokens alone."""
        import torch

        model = self.model(name)
        tokens, mask = self.padded(self.tokens(model))
        right = [torch.stack([row.roll(-pads) for row, pads in zip(x, PADS, strict=True)]) for x in (tokens, mask)]
        for sizes in (None, (2, 7, 1, 13)):
            left_run, right_run = run(model, tokens, sizes, mask), run(model, right[0], sizes, right[1])
            for row, pads in enumerate(PADS):
                alone = run(model, tokens[row : row + 1, pads:])
                tolerance = 1e-5 * max(1.0, float(np.abs(alone.logits).max()))
                assert_close(left_run.logits[row, pads:], alone.logits[0], tolerance)
                assert_close(right_run.logits[row, : LENGTH - pads], alone.logits[0], tolerance)
                for i, expected in enumerate(alone.states):
                    scale = max(1.0, float(np.abs(expected).max()))
                    assert_close(left_run.states[i][row], expected[0], tolerance * scale)
                    assert_close(right_run.states[i][row], expected[0], tolerance * scale)

    def test_a_call_leaves_the_cache_as_it_was(self, name: str) -> None:
        import torch

        model = self.model(name)
        tokens = self.tokens(model)
        with torch.no_grad():
            cache = model(tokens[:, :9], use_cache=True).past_key_values
            first, second = (model(tokens[:, 9:], past_key_values=cache).logits.numpy() for _ in range(2))
        np.testing.assert_array_equal(first, second)

    def test_greedy_generation_is_the_argmax_of_every_step(self, name: str) -> None:
        model = self.model(name)
        tokens = self.tokens(model)
        expected = tokens
        for _ in range(6):
            logits = run(model, expected).logits
            expected = append(expected, logits[:, -1].argmax(-1))
        for use_cache in (True, False):
            np.testing.assert_array_equal(generate(model, tokens, use_cache=use_cache, max_new_tokens=6), expected)

    def test_prompts_of_unequal_length_are_continued_as_alone(self, name: str) -> None:
        model = self.model(name)
        tokens, mask = self.padded(self.tokens(model))
        together = generate(model, tokens, attention_mask=mask, max_new_tokens=7)
        for row, pads in enumerate(PADS):
            alone = generate(model, tokens[row : row + 1, pads:], max_new_tokens=7)
            np.testing.assert_array_equal(together[row, pads:], alone[0])

    def test_generation_stops_at_the_end_of_text(self, name: str) -> None:
        model = self.model(name)
        tokens = self.tokens(model, rows=2)
        free = generate(model, tokens, max_new_tokens=8)
        end = int(free[0, LENGTH + 2])
        stopped = generate(model, tokens, max_new_tokens=8, eos_token_id=end, pad_token_id=1)
        for got, unstopped in zip(stopped[:, LENGTH:], free[:, LENGTH:], strict=True):
            ends = np.flatnonzero(unstopped == end)
            kept = ends[0] + 1 if len(ends) else len(unstopped)
            np.testing.assert_array_equal(got[:kept], unstopped[: len(got)][:kept])
            assert (got[kept:] == 1).all()

    def test_generation_goes_on_from_a_cache(self, name: str) -> None:
        """As chats do: all tokens so far, and the cache of the first of them."""
        import torch

        model = self.model(name)
        tokens = self.tokens(model)
        with torch.no_grad():
            cache = model(tokens[:, :15], use_cache=True).past_key_values
        expected = generate(model, tokens, max_new_tokens=5)
        np.testing.assert_array_equal(generate(model, tokens, max_new_tokens=5, past_key_values=cache), expected)

    def test_samples_follow_the_seed_and_beams_the_cache(self, name: str) -> None:
        import torch

        model = self.model(name)
        tokens, mask = self.padded(self.tokens(model))
        how = {"attention_mask": mask, "max_new_tokens": 6}
        samples = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            samples.append(generate(model, tokens, do_sample=True, top_k=20, temperature=1.3, **how))
        np.testing.assert_array_equal(samples[0], samples[1])
        assert (samples[0] != samples[2]).any()
        with_cache, without = (generate(model, tokens, num_beams=3, use_cache=use, **how) for use in (True, False))
        np.testing.assert_array_equal(with_cache, without)

    @pytest.mark.parametrize("tied", [False, True])
    def test_saved_and_loaded_by_the_auto_classes(self, name: str, tied: bool, tmp_path: Path) -> None:
        """Every tensor found, none made up, and the same logits."""
        from transformers import AutoConfig, AutoModelForCausalLM

        model = self.model(name, tie_word_embeddings=tied)
        tokens = self.tokens(model)
        with quiet():
            model.save_pretrained(tmp_path)
            loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert type(loaded) is type(model)
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
        np.testing.assert_array_equal(run(loaded, tokens).logits, run(model, tokens).logits)
        expected = {key: value.numpy() for key, value in model.state_dict().items()}
        assert set(loaded.state_dict()) == set(expected)
        for key, value in loaded.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), expected[key], err_msg=key)
        head, table = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
        assert (head is table) == tied

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_keeps_wide_states(self, name: str, dtype: str, tmp_path: Path) -> None:
        """Loaded in it and cast to it alike; positions far beyond what it can count."""
        import torch
        from transformers import AutoModelForCausalLM

        model = self.model(name)
        tokens = self.tokens(model, rows=1, length=self.far)
        expected = run(model, tokens)
        with quiet():
            model.save_pretrained(tmp_path)
            narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
        for other in (narrow, model.to(getattr(torch, dtype))):
            got = run(other, tokens)
            size = float(np.abs(expected.logits).max())
            difference = np.abs(got.logits - expected.logits)[:, -64:]
            assert difference.mean() < 0.02 * size, difference.mean() / size
            assert all(state.dtype == np.float32 for state in got.states)

    def test_the_loss_is_of_the_labels_that_count(self, name: str) -> None:
        import torch
        from torch.nn import functional as F

        model = self.model(name)
        tokens = self.tokens(model)
        labels = torch.where(tokens % 3 == 0, -100, tokens)
        output = model(tokens, labels=labels)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert_close(output.loss.item(), expected.item(), 1e-5)
        assert not any(parameter.grad is not None for parameter in model.parameters())
        output.loss.backward()
        assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters() if p.grad is not None)

    def test_a_fresh_model_begins_near_the_uniform_distribution(self, name: str) -> None:
        """Its initial weights are finite, and its loss no more than a few nats above."""
        import torch

        from ssm_jax.interop import torch as modules

        torch.manual_seed(0)
        cls = getattr(modules, self.model_class)
        model = cls(cls.config_class(**self.configs[name]))
        tokens = self.tokens(model)
        loss = model.eval()(tokens, labels=tokens).loss.item()
        assert loss < np.log(model.config.vocab_size) + 3, loss

    def test_everything_is_made_on_the_device_of_the_model(self, name: str) -> None:
        """Shown on the one that is always there, and has no values: whatever stays on the CPU does not go with it."""
        import torch

        model, tokens = self.model(name).to("meta"), torch.ones(2, 7, dtype=torch.long, device="meta")
        cache = model(tokens, use_cache=True).past_key_values
        output = model(tokens[:, :1], attention_mask=tokens[:, :1], past_key_values=cache, use_cache=True)
        output.past_key_values.reorder_cache(torch.ones(2, dtype=torch.long, device="meta"))
        made = [output.logits, output.past_key_values.tokens, *output.past_key_values.layers]
        assert {x.device.type for x in made} == {"meta"}

    def test_what_does_not_fit_is_refused(self, name: str) -> None:
        import torch

        model = self.model(name)
        tokens = self.tokens(model)
        cache = model(tokens[:2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="The cache has 2 rows, input_ids 3"):
            model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 4\]; input_ids have \[3, 23\]"):
            model(tokens, attention_mask=torch.ones(3, 4))


@dataclasses.dataclass
class Run:
    """Logits of every column, and the last states, complex ones as pairs."""

    logits: np.ndarray
    states: list[np.ndarray]


def run(model: Any, tokens: Any, sizes: tuple[int, ...] | None = None, mask: Any = None) -> Run:
    """One call, or calls of so many columns one after the other, each with the mask up to its end."""
    import torch

    logits, cache, start = [], None, 0
    for size in sizes or (tokens.shape[1],):
        end = start + size
        seen = None if mask is None else mask[:, :end]
        with torch.no_grad():
            output = model(tokens[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        logits.append(output.logits.double().numpy())
        cache, start = output.past_key_values, end
    assert cache is not None
    assert start == tokens.shape[1] == cache.get_seq_length()
    states = [torch.view_as_real(state) if state.is_complex() else state for state in cache.layers]
    return Run(np.concatenate(logits, axis=1), [state.numpy() for state in states])


def generate(model: Any, tokens: Any, **how: Any) -> np.ndarray:
    """Prompt and continuation. Greedy, and without an end of text, unless told."""
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    tokens_out: np.ndarray = model.generate(tokens, **settings).numpy()
    return tokens_out


def append(tokens: Any, new: np.ndarray) -> Any:
    import torch

    return torch.cat([tokens, torch.from_numpy(new)[:, None]], dim=1)
