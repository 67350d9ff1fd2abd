"""The diagonal state space: its three forms against the oracle, kernels at long range, memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.dss import convolution_kernel, dss
from tests.conformance.jaxpr import array_sizes
from tests.conformance.op import Arrays, ChunkedOpConformance, RaggedOpConformance, assert_run_close

CHANNELS, MODES = 3, 5


def arrays(rng: np.random.Generator, batch: int, length: int, channels: int, modes: int, slow: float = 0.0) -> Arrays:
    """Default modes: log rate and log frequency from N(0, 1); ``slow`` is taken off the former. c of unit size over all modes."""
    made = {
        "s_BLH": rng.normal(size=(batch, length, channels)),
        "rate_N": np.exp(rng.normal(size=modes) - slow),
        "frequency_N": np.exp(rng.normal(size=modes)),
        "c_H2N": rng.normal(size=(channels, 2, modes)) / np.sqrt(modes),
        "D_H": rng.normal(size=channels),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


class TestDSS(RaggedOpConformance, ChunkedOpConformance):
    op = staticmethod(dss)
    sequences = ("s_BLH",)
    output = "s_BLH"

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        return arrays(rng, batch, length, CHANNELS, MODES, slow=1.5)

    def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return rng.normal(size=(batch, CHANNELS, 2, MODES)).astype(np.float32)

    @pytest.mark.parametrize("options", [{"log_frequency": True}, {"exact_phase": True}], ids=str)
    @pytest.mark.parametrize("length", [1, 37])
    def test_options_match_oracle(self, options: dict[str, Any], length: int) -> None:
        case = self.case(length, "ragged")
        if "log_frequency" in options:
            case.inputs["frequency_N"] = np.log(case.inputs["frequency_N"])
        actual = self.run(self.call(implementation="xla", chunk_size=16, **options), case)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, case)
            expected = self.run(self.call(implementation="reference", **options), wide)
        assert_run_close(actual, expected, self.tolerance)


FORMS = {"one convolution": 2**20, "chunks": 64, "steps": None}


def run_form(form: str, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
    if form != "steps":
        return jax.jit(lambda inputs: dss(**inputs, chunk_size=FORMS[form]))(inputs)

    def all_steps(inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        def step(state: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, state = dss(**{**inputs, "s_BLH": s[:, None]}, state=state)
            return state, y[:, 0]

        batch, _, channels = inputs["s_BLH"].shape
        zeros = jnp.zeros((batch, channels, 2, inputs["rate_N"].shape[0]), inputs["s_BLH"].dtype)
        state, y = jax.lax.scan(step, zeros, jnp.moveaxis(inputs["s_BLH"], 1, 0))
        return jnp.moveaxis(y, 0, 1), state

    return jax.jit(all_steps)(inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 37, 256, 4096])
def test_three_forms_are_one(form: str, length: int) -> None:
    """At default decays: within 2e-5 of the output's rms of the float64 oracle in float32, and 1e-10 in float64."""
    inputs = arrays(np.random.default_rng(length), 2, length, channels=4, modes=64)
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in inputs.items()}
        wide = jax.tree.map(jnp.asarray, wide)
        expected, expected_state = (np.asarray(x) for x in dss(**wide, implementation="reference"))
        exact, exact_state = (np.asarray(x) for x in run_form(form, wide))
    y, state = (np.asarray(x, np.float64) for x in run_form(form, jax.tree.map(jnp.asarray, inputs)))
    for got, same, want in ((y, exact, expected), (state, exact_state, expected_state)):
        rms = np.sqrt(np.mean(np.square(want)))
        assert same.dtype == np.float64
        assert np.abs(same - want).max() <= 1e-10 * rms
        assert np.abs(got - want).max() <= 2e-5 * rms


def oracle_kernel(inputs: Arrays, length: int) -> np.ndarray:
    """In float64 from the same float32 parameters, the frequency from its logarithm."""
    rate, frequency = inputs["rate_N"].astype(np.float64), np.exp(inputs["frequency_N"].astype(np.float64))
    c = inputs["c_H2N"][:, 0].astype(np.float64) + 1j * inputs["c_H2N"][:, 1]
    return np.einsum("hn,tn->th", c, np.exp((-rate + 1j * frequency) * np.arange(length)[:, None])).real


@pytest.mark.parametrize("slow", [6.0, 9.0])
def test_exact_phases_keep_the_kernel_at_long_range(slow: float) -> None:
    """Modes that last for thousands of tokens: float32 phases lose 1e-3 of the kernel and more, exact ones do not."""
    length = 16_384
    inputs = arrays(np.random.default_rng(1), 1, 1, channels=4, modes=64, slow=slow)
    inputs["frequency_N"] = np.log(inputs["frequency_N"])
    modes = {name: inputs[name] for name in ("rate_N", "frequency_N", "c_H2N")}
    expected = oracle_kernel(inputs, length)
    modes = jax.tree.map(jnp.asarray, modes)
    rms = np.sqrt(np.mean(np.square(expected)))
    errors = {}
    for exact in (False, True):
        kernel = convolution_kernel(**modes, length=length, log_frequency=True, exact_phase=exact)
        errors[exact] = np.abs(kernel - expected).max() / rms
    assert errors[True] <= 2e-5
    assert errors[False] >= 10 * errors[True]


def test_exact_phases_have_the_gradient_of_the_phase() -> None:
    inputs = jax.tree.map(jnp.asarray, arrays(np.random.default_rng(2), 1, 1, CHANNELS, MODES))
    weights = np.random.default_rng(3).normal(size=(200, CHANNELS)).astype(np.float32)

    def loss(frequency: jax.Array, log: bool, exact: bool) -> jax.Array:
        kernel = convolution_kernel(
            inputs["rate_N"], frequency, inputs["c_H2N"], 200, log_frequency=log, exact_phase=exact
        )
        return jnp.sum(weights * kernel)

    for log in (False, True):
        frequency = jnp.log(inputs["frequency_N"]) if log else jnp.asarray(inputs["frequency_N"])
        exact, plain = (jax.jit(jax.grad(loss), static_argnums=(1, 2))(frequency, log, e) for e in (True, False))
        np.testing.assert_allclose(exact, plain, atol=1e-4 * float(jnp.abs(plain).max()))


def test_a_known_kernel_is_used() -> None:
    inputs = jax.tree.map(jnp.asarray, arrays(np.random.default_rng(4), 2, 100, CHANNELS, MODES))
    modes = {name: inputs[name] for name in ("rate_N", "frequency_N", "c_H2N")}
    kernel = convolution_kernel(**modes, length=128)
    np.testing.assert_array_equal(dss(**inputs, kernel_TH=kernel)[0], dss(**inputs)[0])
    twice = dss(**{**inputs, "D_H": 0 * inputs["D_H"]}, kernel_TH=2 * kernel)[0]
    np.testing.assert_allclose(twice, 2 * dss(**{**inputs, "D_H": 0 * inputs["D_H"]})[0], rtol=1e-5, atol=1e-5)
    too_short = dss(**inputs, kernel_TH=kernel[:50])[0]
    np.testing.assert_array_equal(too_short, dss(**inputs)[0])


def test_an_underflowing_decay_is_no_decay_at_all() -> None:
    """exp(-rate t) is 0 for large t and exactly 1 at t = 0."""
    inputs = jax.tree.map(jnp.asarray, arrays(np.random.default_rng(5), 1, 300, CHANNELS, MODES))
    inputs["rate_N"] = jnp.full(MODES, 1e4)
    y, state = dss(**inputs, chunk_size=64)
    gain = inputs["c_H2N"][:, 0].sum(axis=-1) + inputs["D_H"]
    np.testing.assert_allclose(y, inputs["s_BLH"] * gain, atol=1e-5)
    np.testing.assert_allclose(state[:, :, 0], np.repeat(inputs["s_BLH"][:, -1, :, None], MODES, axis=-1), atol=1e-6)


def test_nothing_of_size_length_by_channels_by_modes() -> None:
    """In values and gradients, with documents and a state: at most a state per chunk, or a table of one chunk."""
    batch, length, channels, modes, chunk = 2, 2048, 64, 32, 256
    inputs = jax.tree.map(jnp.asarray, arrays(np.random.default_rng(6), batch, length, channels, modes))
    state = jnp.zeros((batch, channels, 2, modes))
    reset = jnp.zeros((batch, length), bool).at[:, ::300].set(True)

    def loss(inputs: Arrays, state: jax.Array) -> jax.Array:
        y, after = dss(**inputs, state=state, reset=reset, chunk_size=chunk)
        return jnp.sum(jnp.square(y)) + jnp.sum(jnp.square(after))

    largest, shape, _ = array_sizes(jax.grad(loss, argnums=(0, 1)), inputs, state)[0]
    states = batch * (length // chunk + 1) * channels * 2 * modes
    spectra = 4 * batch * length * channels
    assert largest <= max(states, spectra), shape
