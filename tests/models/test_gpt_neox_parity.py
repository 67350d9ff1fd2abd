"""GPT-NeoX against PyTorch, live against ``transformers`` on random models."""

import pytest

from ssm_jax.models import GPTNeoXConfig
from tests.conformance.transformers import TransformersParity


@pytest.mark.torch
class TestGPTNeoXInTransformers(TransformersParity):
    logits = 2e-5
    stored = {"lm_head.weight": "embed_out.weight"}
    configs = {
        "parallel_turned_in_part": GPTNeoXConfig(
            vocab_size=61, d_model=48, n_layers=2, n_heads=3, n_positions=32, pad_vocab_size_multiple=8
        ),
        "one_after_the_other_turned_whole": GPTNeoXConfig(
            vocab_size=50,
            d_model=24,
            n_layers=3,
            n_heads=4,
            d_mlp=36,
            n_positions=21,
            rotary_fraction=1.0,
            rope_base=500.0,
            parallel_residual=False,
            activation="gelu_tanh",
            attention_bias=False,
            tie_embeddings=True,
            norm_eps=1e-3,
        ),
    }
