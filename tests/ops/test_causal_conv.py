"""Causal convolution against its oracle, and the oracle against the definition written in numpy."""

from typing import Any

import numpy as np

from ssm_jax.ops.causal_conv import causal_conv
from tests.conformance.op import Call, RaggedOpConformance


class TestCausalConv(RaggedOpConformance):
    op = staticmethod(causal_conv)
    sequences = ("x_BLD",)
    output = "x_BLD"
    taps = 4
    activation: str | None = None

    def call(self, **static: Any) -> Call:
        return super().call(activation=self.activation, **static)

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        return {
            "x_BLD": rng.normal(size=(batch, length, 5)).astype(np.float32),
            "kernel_KD": rng.normal(size=(self.taps, 5)).astype(np.float32),
            "bias_D": rng.normal(size=5).astype(np.float32),
        }

    def initial_state(self, rng: np.random.Generator, batch: int) -> Any:
        return rng.normal(size=(batch, self.taps - 1, 5)).astype(np.float32)
