"""GPT-2 against PyTorch, live against ``transformers`` on random models."""

import pytest

from ssm_jax.models import GPT2Config
from tests.conformance.transformers import TransformersParity


@pytest.mark.torch
class TestGPT2InTransformers(TransformersParity):
    logits = 2e-5
    configs = {
        "tied": GPT2Config(vocab_size=61, d_model=24, n_layers=2, n_heads=4, n_positions=32),
        "untied_exact_gelu": GPT2Config(
            vocab_size=50,
            d_model=20,
            n_layers=3,
            n_heads=2,
            n_positions=21,
            d_mlp=36,
            activation="gelu",
            tie_embeddings=False,
            norm_eps=1e-3,
            pad_vocab_size_multiple=8,
        ),
        "relu": GPT2Config(vocab_size=40, d_model=16, n_layers=2, n_heads=1, n_positions=64, activation="relu"),
    }
