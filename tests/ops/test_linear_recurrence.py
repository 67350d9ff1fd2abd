"""Linear recurrence, real and complex, against the oracle, and backwards against forwards."""

from typing import Any

import numpy as np

from ssm_jax.ops.linear_recurrence import linear_recurrence
from tests.conformance.op import ChunkedOpConformance


class TestReal(ChunkedOpConformance):
    op = staticmethod(linear_recurrence)
    sequences = ("a", "b")
    output = "b"

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        a = rng.uniform(0.3, 1.0, (batch, length, 3, 2)).astype(np.float32)
        return {"a": a, "b": rng.normal(size=a.shape).astype(np.float32)}

    def initial_state(self, rng: np.random.Generator, batch: int) -> Any:
        return rng.normal(size=(batch, 3, 2)).astype(np.float32)
