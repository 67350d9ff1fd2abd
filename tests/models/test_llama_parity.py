"""LLaMA against PyTorch, live against ``transformers`` on random models."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.interop.layouts.transformers import quiet
from ssm_jax.models import LlamaConfig
from tests.conformance.compare import assert_close
from tests.conformance.golden import apply
from tests.conformance.transformers import TransformersParity, random_model

LOGITS = 2e-5


@pytest.mark.torch
class TestLlamaInTransformers(TransformersParity):
    logits = LOGITS
    configs = {
        "plain": LlamaConfig(vocab_size=61, d_model=24, n_layers=2, n_heads=4, d_mlp=40, n_positions=32),
        "grouped_wide_heads": LlamaConfig(
            vocab_size=50,
            d_model=24,
            n_layers=3,
            n_heads=6,
            n_kv_heads=2,
            head_dim=8,
            d_mlp=36,
            n_positions=21,
            rope_base=500.0,
            norm_eps=1e-3,
            pad_vocab_size_multiple=8,
        ),
        "tied_biases_one_key_head": LlamaConfig(
            vocab_size=40,
            d_model=16,
            n_layers=3,
            n_heads=4,
            n_kv_heads=1,
            d_mlp=24,
            n_positions=64,
            attention_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
        ),
    }

    def test_left_padding(self, config: LlamaConfig, tmp_path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model, params = random_model(config)
        ssm_jax.save_pretrained(model, params, tmp_path / "exported", layout="transformers", check=False)
        rng, lengths, width = np.random.default_rng(3), (12, 5, 1), 12
        prompts = [rng.integers(0, config.vocab_size, n) for n in lengths]
        padding = [width - n for n in lengths]
        tokens = np.stack([np.r_[np.zeros(n, int), prompt] for n, prompt in zip(padding, prompts, strict=True)])
        present = np.arange(width) >= np.asarray(padding)[:, None]
        with quiet(), torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
            given = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(present).long()}
            expected = theirs(**given).logits.numpy()
            unused = list(range(config.vocab_size, config.padded_vocab_size)) or None
            greedy = theirs.generate(
                **given, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, suppress_tokens=unused
            )
        positions = np.maximum(np.cumsum(present, axis=1) - 1, 0)
        ours = np.asarray(apply(model, params, jnp.asarray(tokens), None, jnp.asarray(positions))[0])
        assert_close(ours[present], expected[present], self.logits)
        new = ssm_jax.generate(model, params, [prompt.tolist() for prompt in prompts], max_new_tokens=8)
        np.testing.assert_array_equal(new, greedy.numpy()[:, width:])
