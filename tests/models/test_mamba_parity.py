"""Mamba-1 against PyTorch: the goldens, and live against ``transformers`` on random models."""

from typing import Any

import numpy as np
import pytest

from ssm_jax.models import MambaConfig
from tests.conformance.golden import GoldenParity
from tests.conformance.transformers import TransformersParity


class TestMambaGoldens(GoldenParity):
    folders = ("mamba/tied_defaults", "mamba/untied_biases_k3", "mamba/long257_eps")
    same_in_other_layouts = ("mamba_original/tied_padded_vocab", "mamba_original/untied_ssm_cfg")

    @staticmethod
    def published_states(layers: Any) -> dict[str, np.ndarray]:
        return {"conv": np.swapaxes(layers.conv, -1, -2), "ssm": np.swapaxes(layers.ssm, -1, -2)}


@pytest.mark.torch
class TestMambaInTransformers(TransformersParity):
    configs = {
        "tied": MambaConfig(vocab_size=61, d_model=24, n_layers=2, d_state=5),
        "untied_biases": MambaConfig(
            vocab_size=50,
            d_model=20,
            n_layers=3,
            d_state=7,
            d_conv=2,
            expand=3,
            dt_rank=4,
            bias=True,
            conv_bias=False,
            tie_embeddings=False,
            norm_eps=1e-3,
            pad_vocab_size_multiple=1,
        ),
    }
