"""Baka in PyTorch: what every model promises, the author's outputs, and JAX in both directions."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.interop.folder import open_weights
from ssm_jax.interop.layouts import writable
from ssm_jax.interop.layouts.transformers import quiet
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import BakaConfig
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS, load_golden
from tests.conformance.torch_golden import assert_gradients
from tests.conformance.torch_model import TorchModelConformance, run
from tests.conformance.transformers import random_model

pytestmark = pytest.mark.torch

SMALL: dict[str, Any] = {
    "n_vocab": 43, "dim_model": 16, "dim_ff": 24, "n_layers": 2, "n_heads": 2, "n_ctx": 8, "n_pauses": 2, "n_rmt_tokens": 2,
    "d_state": 4,
}  # fmt: skip
STEPS: dict[str, Any] = {
    "norm": "rms", "gate": "relu", "step": "nstep4", "xl_layer": "below", "mamba_each_nth_layer": 0, "n_rmt_tokens": 0
}  # fmt: skip
REACHING: dict[str, Any] = {
    "n_layers": 3, "mamba_each_nth_layer": 2, "mamba_carry": True, "rmt_read": "head", "gate": "sigmoid", "gate_input": "y-x",
    "step": "step4", "step_shared": True, "step_reach": "xl", "dim_attn": 24, "elephant_width": 0.7, "elephant_power": 4.0,
    "residual_in_fp32": False,
}  # fmt: skip


class TestBaka(TorchModelConformance):
    model_class = "BakaForCausalLM"
    centres = {"norm_in.weight": 1.0, "norm_mamba.weight": 1.0, "norm_out.weight": 1.0, "A_log": 1.0, "mamba.D": 1.0, "dt_proj.bias": -2.0}
    configs = {"mamba_and_memory": SMALL, "steps": {**SMALL, **STEPS}, "what_crosses_chunks": {**SMALL, **REACHING}}
