"""Linear recurrence, real and complex, against the oracle, and backwards against forwards."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.linear_recurrence import linear_recurrence
from tests.conformance.compare import assert_trees_close
from tests.conformance.jaxpr import array_sizes
from tests.conformance.op import Arrays, ChunkedOpConformance, assert_run_close


class TestReal(ChunkedOpConformance):
    op = staticmethod(linear_recurrence)
    sequences = ("a", "b")
    output = "b"

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        a = rng.uniform(0.3, 1.0, (batch, length, 3, 2)).astype(np.float32)
        return {"a": a, "b": rng.normal(size=a.shape).astype(np.float32)}

    def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return rng.normal(size=(batch, 3, 2)).astype(np.float32)


class TestOnTPU(TestReal):
    """The kernel of TPUs, interpreted; more channels than one block of registers holds, and no multiple of 128."""

    implementations = ("pallas",)

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        a = rng.uniform(0.3, 1.0, (batch, length, 515, 2)).astype(np.float32)
        return {"a": a, "b": rng.normal(size=a.shape).astype(np.float32)}

    def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return rng.normal(size=(batch, 515, 2)).astype(np.float32)

    def test_oracle_gradients_are_derivatives(self) -> None:
        """Those of the oracle do not depend on how many channels there are."""
        TestReal().test_oracle_gradients_are_derivatives()

    def test_more_tokens_than_one_step_of_a_program(self) -> None:
        actual = self.run(self.call(implementation="pallas"), self.case(600))
        assert_run_close(actual, self.oracle(600), self.tolerance)


class TestComplex(ChunkedOpConformance):
    op = staticmethod(linear_recurrence)
    sequences = ("a", "b")
    output = "b"

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        radius, angle = rng.uniform(0.3, 1.0, (batch, length, 3)), rng.uniform(-3, 3, (batch, length, 3))
        b = rng.normal(size=radius.shape) + 1j * rng.normal(size=radius.shape)
        return {"a": (radius * np.exp(1j * angle)).astype(np.complex64), "b": b.astype(np.complex64)}

    def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return (rng.normal(size=(batch, 3)) + 1j * rng.normal(size=(batch, 3))).astype(np.complex64)


@pytest.mark.parametrize(
    "options",
    [{"implementation": "reference"}, {"implementation": "pallas"}, {}, {"chunk_size": 7}, {"chunk_size": 64}],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 37])
def test_reverse_is_forward_on_the_flipped_sequence(length: int, options: dict[str, Any]) -> None:
    """In values, last state and gradients."""
    case = TestReal().case(length, "documents")
    a, b, state, reset = jax.tree.map(
        jnp.asarray, (case.inputs["a"], case.inputs["b"], case.state, case.masks["reset"])
    )

    def reverse(a: Any, b: Any, state: Any) -> Any:
        return linear_recurrence(a, b, state, reset, reverse=True, **options)

    def flipped(a: Any, b: Any, state: Any) -> Any:
        h, last = linear_recurrence(
            jnp.flip(a, 1), jnp.flip(b, 1), state, jnp.flip(reset, 1), implementation="reference"
        )
        return jnp.flip(h, 1), last

    (actual, actual_pullback), (expected, expected_pullback) = (jax.vjp(f, a, b, state) for f in (reverse, flipped))
    assert_trees_close(actual, expected, 1e-5)
    assert_trees_close(actual_pullback(case.cotangents), expected_pullback(case.cotangents), 1e-5, relative=True)


def test_real_decay_of_a_complex_state() -> None:
    """Types are promoted: h is complex when either is; the gradient of a real decay is real."""
    a, b = jnp.full((1, 9, 2), 0.5), jnp.ones((1, 9, 2), jnp.complex64) * 1j
    h, _ = linear_recurrence(a, b)
    np.testing.assert_allclose(h[0, :, 0], 2j * (1 - 0.5 ** np.arange(1, 10)), rtol=1e-6)
    gradient = jax.grad(lambda a: linear_recurrence(a, b)[0].imag.sum())(a)
    assert gradient.dtype == jnp.float32


def test_decays_that_underflow() -> None:
    """Products of tiny decays are zero, and nothing divides by them."""
    a, b = jnp.full((1, 64, 2), 1e-30), jnp.ones((1, 64, 2))
    h, pullback = jax.vjp(lambda a, b: linear_recurrence(a, b)[0], a, b)
    np.testing.assert_array_equal(h, 1)
    assert all(jnp.isfinite(x).all() for x in pullback(jnp.ones_like(h)))


def test_backward_keeps_h_and_a() -> None:
    a, b = jnp.full((2, 64, 32), 0.9), jnp.ones((2, 64, 32))
    _, pullback = jax.vjp(lambda a, b: linear_recurrence(a, b)[0], a, b)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) < 2.1 * a.size


def test_default_is_sequential_on_a_cpu_and_associative_on_a_gpu() -> None:
    a = jnp.ones((1, 1024, 8))
    traced = jax.jit(lambda a: linear_recurrence(a, a)[0]).trace(a)
    for platform, steps in (("cpu", 1024), ("cuda", 4)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.while") == 1
        assert f"dense<{steps}> : tensor<i32>" in program, "the bound of the loop"


@pytest.mark.parametrize("narrow", [(1, 9, 4, 3), (2, 9, 1, 3), (1, 9, 4, 1)])
def test_shared_decays_on_a_tpu(narrow: tuple[int, ...]) -> None:
    """Over lanes by the kernel, over channels by what it falls back to: with the gradient of the shared decay."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.uniform(size=shape), jnp.float32) for shape in (narrow, (2, 9, 4, 3)))

    def run(name: str) -> Any:
        h, pull_back = jax.vjp(lambda a, b: linear_recurrence(a, b, implementation=name)[0], a, b)
        return h, pull_back(b)

    assert_trees_close(jax.jit(run, static_argnums=0)("pallas"), jax.jit(run, static_argnums=0)("reference"), 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_lowers_for_a_tpu(reverse: bool) -> None:
    """Forward and backward are a kernel each, for the program of a TPU only, and complex numbers none."""
    a, state = jnp.ones((2, 37, 1030)), jnp.ones((2, 1030))

    def both(a: jax.Array, state: jax.Array) -> Any:
        return jax.vjp(lambda a, s: linear_recurrence(a, a, s, reverse=reverse)[0], a, state)[1](a.real)

    def kernels(a: jax.Array, platform: str) -> int:
        lowered = jax.jit(both).trace(a, state.astype(a.dtype)).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("@tpu_custom_call")

    assert kernels(a, "tpu") == 2
    assert kernels(a, "cpu") == 0


def test_one_token_is_one_multiply_add() -> None:
    a, b, state = jnp.ones((2, 1, 32)), jnp.ones((2, 1, 32)), jnp.ones((2, 32))
    primitives = {primitive for _, _, primitive in array_sizes(linear_recurrence, a, b, state)}
    assert "scan" not in primitives
