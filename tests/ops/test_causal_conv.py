"""Causal convolution against its oracle, and against the textbook's definition in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.causal_conv import causal_conv
from tests.conformance.jaxpr import array_sizes
from tests.conformance.op import Arrays, RaggedOpConformance


class TestSilu(RaggedOpConformance):
    op = staticmethod(functools.partial(causal_conv, activation="silu"))
    sequences = ("x_BLD",)
    output = "x_BLD"
    taps = 4

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        return {
            "x_BLD": rng.normal(size=(batch, length, 5)).astype(np.float32),
            "kernel_KD": rng.normal(size=(self.taps, 5)).astype(np.float32),
            "bias_D": rng.normal(size=5).astype(np.float32),
        }

    def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return rng.normal(size=(batch, self.taps - 1, 5)).astype(np.float32)


def _definition(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Cross-correlation as PyTorch's Conv1d(groups=D, padding=K-1), cut to the length, computes it."""
    taps, (batch, length, width) = len(kernel), x.shape
    y = np.empty(x.shape, np.float64)
    for b, t, d in np.ndindex(batch, length, width):
        y[b, t, d] = bias[d] + sum(kernel[taps - 1 - lag, d] * x[b, t - lag, d] for lag in range(min(taps, t + 1)))
    return y


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_definition(taps: int, implementation: str) -> None:
    """With fewer and more taps than tokens too; the window is the end of the inputs, zeros before their start."""
    rng = np.random.default_rng(taps)
    x, kernel, bias = rng.normal(size=(2, 5, 3)), rng.normal(size=(taps, 3)), rng.normal(size=3)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, kernel, bias)]
    y, window = causal_conv(*arrays, implementation=implementation)
    np.testing.assert_allclose(y, _definition(x, kernel, bias), atol=1e-5)
    padded = np.concatenate([np.zeros((2, taps - 1, 3)), x], axis=1)
    np.testing.assert_array_equal(window, padded[:, 5:].astype(np.float32))
    without_bias, _ = causal_conv(*arrays[:2], implementation=implementation)
    np.testing.assert_allclose(without_bias, _definition(x, kernel, np.zeros(3)), atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_returned_window_forgets_earlier_documents(implementation: str) -> None:
    """Row 0 starts a document at its last token, row 1 at its last present one, row 2 after it, which is no start at all."""
    x = jnp.arange(1.0, 13.0).reshape(3, 4, 1)
    reset = jnp.array([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], bool)
    lengths = jnp.array([4, 2, 2], jnp.int32)
    kernel, before = jnp.ones((4, 1)), jnp.full((3, 3, 1), 100.0)
    _, window = causal_conv(x, kernel, None, before, reset, lengths=lengths, implementation=implementation)
    np.testing.assert_array_equal(window[..., 0], [[0, 0, 4], [0, 0, 6], [100, 9, 10]])


def test_backward_keeps_the_inputs_alone() -> None:
    """Not the K shifted copies, nor what came before the activation: they would be the largest residuals of a layer."""
    x, kernel = jnp.ones((2, 64, 32)), jnp.ones((4, 32))
    _, pullback = jax.vjp(lambda x, kernel: causal_conv(x, kernel, activation="silu")[0], x, kernel)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept < 1.2 * x.size


def test_one_token_touches_the_window_and_nothing_longer() -> None:
    window, kernel = jnp.ones((2, 3, 32)), jnp.ones((4, 32))
    sizes = array_sizes(lambda x, window: causal_conv(x, kernel, None, window), jnp.ones((2, 1, 32)), window)
    assert sizes[0][0] == 2 * 4 * 32
