"""The causal convolution's Triton kernels, interpreted, against the oracle; and what is theirs alone: segments, lanes, devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ssm_jax.ops import triton_call
from ssm_jax.ops.causal_conv import causal_conv, triton
from tests.conformance.op import Arrays, assert_run_close
from tests.ops import test_causal_conv as base


class TestSilu(base.TestSilu):
    implementations = ("triton",)

    def test_segments_equal_the_oracle(self, monkeypatch: pytest.MonkeyPatch, masks: str) -> None:
        """A length that is cut into segments which run at once: 12, 12, 12 and 1 of 37 tokens, fewer than a token reads."""
        monkeypatch.setattr(triton, "MIN_SEGMENT", 9)
        assert triton._segment(2, 37, 4) == 12
        actual = self.run(self.call(implementation="triton"), self.case(37, masks))
        assert_run_close(actual, self.oracle(37, masks), self.tolerance)


@pytest.mark.parametrize("min_segment", [4, 32])
def test_a_broken_document_breaks_no_other(monkeypatch: pytest.MonkeyPatch, min_segment: int) -> None:
    """Neither later ones nor, through the gradients, earlier ones; in one segment and where segments meet."""
    monkeypatch.setattr(triton, "MIN_SEGMENT", min_segment)
    case = jax.tree.map(jnp.asarray, TestSilu().case(18))
    x, window = case.inputs.pop("x_BLD"), case.state
    reset = jnp.isin(jnp.arange(18), jnp.asarray([5, 13]))[None].repeat(2, 0)

    @jax.jit
    def run(x: jax.Array) -> tuple[Any, ...]:
        conv = functools.partial(causal_conv, **case.inputs, reset=reset, activation="silu", implementation="triton")
        out, pull = jax.vjp(lambda x, window: conv(x, state=window), x, window)
        return out, pull(case.cotangents)

    (y, last), (d_x, d_window) = run(x.at[:, 6:12].set(jnp.nan))
    (sound_y, sound_last), (sound_d_x, sound_d_window) = run(x)
    sound = np.r_[0:5, 13:18]
    assert np.isnan(y[:, 6:12]).all()
    assert np.isnan(d_x[:, 6:12]).all()
    for actual, expected in ((y[:, sound], sound_y[:, sound]), (d_x[:, sound], sound_d_x[:, sound])):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(last, sound_last)
    np.testing.assert_array_equal(d_window, sound_d_window)


def _case_of(width: int, taps: int, activation: str | None) -> base.TestSilu:
    class Wide(base.TestSilu):
        op = staticmethod(functools.partial(causal_conv, activation=activation))

        def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
            return {
                "x_BLD": rng.normal(size=(batch, length, width)).astype(np.float32),
                "kernel_KD": rng.normal(size=(taps, width)).astype(np.float32),
                "bias_D": rng.normal(size=width).astype(np.float32),
            }

        def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
            return rng.normal(size=(batch, taps - 1, width)).astype(np.float32)

    return Wide()


@pytest.mark.parametrize(
    ("width", "taps", "activation", "masks"),
    [
        (256, 4, "silu", "documents"),
        (130, 4, "silu", "ragged"),
        (3, 1, "silu", "ragged"),
        (3, 2, None, "documents"),
        (3, 3, "silu", "ragged"),
        (3, 8, None, "none"),
        (3, 8, "silu", "ragged"),
    ],
)
def test_widths_and_taps(width: int, taps: int, activation: str | None, masks: str) -> None:
    """Two programs' channels exactly, and not a whole number of programs; taps that a row is shorter than."""
    like = _case_of(width, taps, activation)
    case = like.case(7, masks)
    actual = like.run(like.call(implementation="triton"), case)
    assert_run_close(actual, like.run(like.call(implementation="reference"), case), like.tolerance)


def test_a_decoding_step_is_one_launch() -> None:
    """And copies nothing."""
    x, kernel, window = jnp.ones((2, 1, 32)), jnp.ones((4, 32)), jnp.ones((2, 3, 32))
    with triton_call.recorded() as launches:
        step = jax.make_jaxpr(lambda: causal_conv(x, kernel, jnp.ones(32), window, implementation="triton"))()
    assert [launch.kernel.fn.__name__ for launch in launches] == ["forward"]
    assert "concatenate" not in str(step)


def test_shared_parameters_are_not_repeated_under_vmap() -> None:
    """Mapped over the sequences alone, and over the parameters alone: lanes of the kernel either way."""
    case = jax.tree.map(jnp.asarray, TestSilu().case(5))
    parameters = ("kernel_KD", "bias_D")

    def loss(mapped: Arrays, shared: Arrays, implementation: str) -> jax.Array:
        y, state = causal_conv(**mapped, **shared, activation="silu", implementation=implementation)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + jnp.sum(state**2)

    for mapped_names, kernel_lanes in ((parameters, 6), (("x_BLD",), 1)):
        # No lane's is the mean of all: what uses one lane's parameters for all of them has wrong sums.
        scales = jnp.asarray([1.0, 0.5, 2.0])
        mapped = {n: jnp.einsum("v,...->v...", scales, case.inputs[n]) for n in mapped_names}
        shared = {n: x for n, x in case.inputs.items() if n not in mapped_names}

        def gradients(implementation: str, mapped: Arrays = mapped, shared: Arrays = shared) -> Arrays:
            def total(mapped: Arrays, shared: Arrays) -> jax.Array:
                return jax.vmap(lambda m: loss(m, shared, implementation))(mapped).sum()

            d_mapped, d_shared = jax.jit(jax.grad(total, argnums=(0, 1)))(mapped, shared)
            return {**d_mapped, **d_shared}

        with triton_call.recorded() as launches:
            actual = gradients("triton")
        assert_run_close(actual, gradients("reference"), 1e-5)
        run = [launch for launch in launches if launch.grid[1] == 6]
        assert {launch.kernel.fn.__name__ for launch in run} == {"forward", "backward"}
        assert {launch.arguments[1].shape[0] for launch in run} == {kernel_lanes}


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_each_device_runs_its_own_lanes_and_channels(shape: tuple[int, int]) -> None:
    """On a mesh: values and gradients of one device, also where 2 lanes do not divide over 4."""
    wide = _case_of(8, 4, "silu")
    case = wide.case(6, "documents")
    expected = wide.run(wide.call(implementation="xla"), case)
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), triton_call.recorded() as launches:
        assert_run_close(wide.run(wide.call(implementation="triton"), case), expected, 1e-5)
    lanes, channels = (2 if shape[0] == 4 else 2 // shape[0]), 8 // shape[1]
    assert launches[-1].arguments[0].shape == (lanes, 6, channels)
