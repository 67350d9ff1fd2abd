"""Mamba-2 against PyTorch: the goldens, and live against ``transformers`` on random models."""

from typing import Any

import numpy as np
import pytest

from ssm_jax.models import Mamba2Config
from tests.conformance.golden import GoldenParity
from tests.conformance.transformers import TransformersParity


class TestMamba2Goldens(GoldenParity):
    folders = ("mamba2/one_group", "mamba2/two_groups_biases_tied", "mamba2/long257_four_groups_dtlimit")
    same_in_other_layouts = ("mamba2_original/one_group",)

    @staticmethod
    def published_states(layers: Any) -> dict[str, np.ndarray]:
        window = np.concatenate([layers.conv_x, layers.conv_B, layers.conv_C], axis=-1)
        return {"conv": np.swapaxes(window, -1, -2), "ssm": np.swapaxes(layers.ssm, -1, -2)}


@pytest.mark.torch
class TestMamba2InTransformers(TransformersParity):
    cached = False  # its steps on the CPU do not clamp step sizes to time_step_limit
    configs = {
        "one_group": Mamba2Config(vocab_size=61, d_model=24, n_layers=2, d_state=12, headdim=16, chunk_size=16),
        "three_groups": Mamba2Config(
            vocab_size=50,
            d_model=24,
            n_layers=2,
            d_state=8,
            d_conv=3,
            headdim=8,
            ngroups=3,
            bias=True,
            tie_embeddings=False,
            norm_eps=1e-3,
            dt_limit=(0.01, 0.4),
        ),
    }
