from typing import Any

import numpy as np

from ssm_jax.ops.ssd import ssd
from tests.conformance.op import ChunkedOpConformance, RaggedOpConformance


class TestSSD(RaggedOpConformance, ChunkedOpConformance):
    op = staticmethod(ssd)
    sequences = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")
    output = "x_BLHP"
    heads, groups, keys, values = 4, 2, 3, 5

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        return {
            "x_BLHP": rng.normal(size=(batch, length, self.heads, self.values)).astype(np.float32),
            "dt_BLH": rng.normal(size=(batch, length, self.heads)).astype(np.float32),
            "A_H": -rng.uniform(0.05, 2.0, self.heads).astype(np.float32),
            "B_BLGN": rng.normal(size=(batch, length, self.groups, self.keys)).astype(np.float32),
            "C_BLGN": rng.normal(size=(batch, length, self.groups, self.keys)).astype(np.float32),
            "D_H": rng.normal(size=self.heads).astype(np.float32),
            "dt_bias_H": rng.normal(size=self.heads).astype(np.float32),
        }

    def initial_state(self, rng: np.random.Generator, batch: int) -> Any:
        return rng.normal(size=(batch, self.heads, self.keys, self.values)).astype(np.float32)
