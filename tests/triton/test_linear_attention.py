"""Retention and SSD on their Triton kernels, interpreted: the ops' own tests, and what is the kernels' alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ssm_jax.ops import retention, triton_call
from ssm_jax.ops.linear_attention import linear_attention, triton
from tests.conformance.op import assert_run_close
from tests.ops import test_linear_attention as plain
from tests.ops import test_retention, test_ssd

# What is multiplied on matrix units has the inputs' type: scores, values with their decays and states are rounded once more, to
# 2^-9 of themselves, before they are multiplied; so is what becomes the last state.
BFLOAT16, BFLOAT16_STATE = 8e-3, 4e-3


class TestRetention(test_retention.TestRetention):
    implementations = ("triton",)
    bfloat16_tolerance, bfloat16_state_tolerance = BFLOAT16, BFLOAT16_STATE


class TestSSD(test_ssd.TestSSD):
    implementations = ("triton",)
    bfloat16_tolerance, bfloat16_state_tolerance = BFLOAT16, BFLOAT16_STATE


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-5) -> None:
    assert_run_close(dict(enumerate(actual)), dict(enumerate(expected)), tolerance)


@pytest.mark.parametrize("resets", [False, True])
def test_segments_equal_masked_attention(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 tokens in three chunks, each a segment of its own, that run at once; forward and backward."""
    monkeypatch.setattr(triton, "MIN_SEGMENT", 16)
    reset = np.random.default_rng(1).random((2, plain.LENGTH)) < (0.15 if resets else 0)
    narrow = [x.astype(np.float32) for x in plain.arrays()]
    given = jnp.asarray(reset) if resets else None
    actual = plain.with_gradients(
        lambda *inputs: linear_attention(*inputs, given, chunk_size=16, implementation="triton"), narrow
    )
    with jax.enable_x64(True):
        expected = plain.with_gradients(lambda *inputs: plain.dense(*inputs, reset), plain.arrays())
    assert_close(actual, expected)


def wide_inputs(keys: int, values: int, length: int, groups: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(2, length, groups, keys)).astype(np.float32) * keys**-0.5,
        rng.normal(size=(2, length, groups, keys)).astype(np.float32),
        rng.normal(size=(2, length, 4, values)).astype(np.float32),
        rng.uniform(0, 1, (2, length, 4)).astype(np.float32),
        -rng.uniform(0, 2, (2, length, 4)).astype(np.float32),
        rng.normal(size=(2, 4, keys, values)).astype(np.float32),
    ]


def test_segments_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """67 tokens in five chunks: a segment of three, and one of two."""
    monkeypatch.setattr(triton, "MIN_SEGMENT", 16)
    monkeypatch.setattr(triton, "FILLING_PROGRAMS", 16)
    inputs = wide_inputs(3, 5, length=67)
    inputs[4] *= 0.05  # so that what enters a segment also leaves it
    reset = np.random.default_rng(2).random((2, 67)) < np.asarray([[0], [0.05]])
    with triton_call.recorded() as launches:
        actual = plain.with_gradients(
            lambda *i: linear_attention(*i, jnp.asarray(reset), chunk_size=16, implementation="triton"), inputs
        )
    assert {(launch.constants["SEGMENTS"], launch.constants["SEGMENT"]) for launch in launches} == {(2, 3)}
    with jax.enable_x64(True):
        expected = plain.with_gradients(lambda *i: plain.dense(*i, reset), [x.astype(np.float64) for x in inputs])
    assert_close(actual, expected)


@pytest.mark.parametrize(("keys", "values"), [(70, 40), (129, 33)])
def test_keys_and_values_beyond_one_tile(keys: int, values: int) -> None:
    """Neither a power of two nor a multiple of a tile, as DenseRetNet's are not."""
    inputs = wide_inputs(keys, values, length=19)
    actual, expected = (
        plain.with_gradients(
            lambda *inputs, name=name: linear_attention(*inputs, None, chunk_size=16, implementation=name), inputs
        )
        for name in ("triton", "xla")
    )
    assert_close(actual, expected)


def test_small_decays_after_large_ones() -> None:
    """A sum of log decays is as large as float32 can tell apart from itself plus a small one: the small ones count all the same."""
    inputs = wide_inputs(4, 4, length=32)
    inputs[4] = np.where(np.arange(32)[None, :, None] < 20, -90.0, -1e-3).astype(np.float32).repeat(4, 2).repeat(2, 0)
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in inputs]
        expected = plain.with_gradients(lambda *i: plain.dense(*i, np.zeros((2, 32), bool)), wide)
    actual = plain.with_gradients(
        lambda *inputs: linear_attention(*inputs, None, chunk_size=32, implementation="triton"), inputs
    )
    assert_close(actual[:-1], expected[:-1], 2e-6)
    assert np.abs(expected[-1]).max() < np.finfo(np.float32).tiny
    assert not actual[-1].any()


def test_states_beyond_float16() -> None:
    """Which inputs of that type may add up to: only what comes out is rounded to it."""
    q, k, v = (jnp.full((1, 32, 1, 16), value, jnp.float16) for value in (1e-3, 300.0, 30.0))
    y, expected = (
        retention(q, k, v, np.asarray([-1e-3]), chunk_size=16, implementation=name)[0] for name in ("triton", "xla")
    )
    assert float(np.finfo(np.float16).max) < 16 * 300 * 30
    np.testing.assert_allclose(y, expected, rtol=1e-3)


def test_constant_decays_equal_decays_per_token() -> None:
    """Gradients of all but the decays, which are constants then."""
    q, k, v, _, _, state = wide_inputs(5, 6, length=21, groups=4)
    rates = -np.asarray([0.01, 0.1, 0.5, 2.0], np.float32)

    def run(log_decay: Any, q: Any, k: Any, v: Any, state: Any) -> Any:
        return linear_attention(q, k, v, None, log_decay, state, chunk_size=16, implementation="triton")

    per_token = jnp.broadcast_to(rates, (2, 21, 4))
    actual, expected = (
        plain.with_gradients(lambda *inputs, decays=decays: run(decays, *inputs), [q, k, v, state])
        for decays in (jnp.asarray(rates), per_token)
    )
    assert_close(actual, expected, 2e-6)


def test_constant_decays_of_each_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vmap over the decays alone, in segments."""
    monkeypatch.setattr(triton, "MIN_SEGMENT", 16)
    q, k, v, _, _, state = wide_inputs(5, 6, length=21)
    rates = -jnp.asarray([[0.01, 0.1, 0.5, 2.0], [0.02, 0.3, 0.1, 0.0], [0.5, 0.01, 1.0, 0.2]])

    def run(q: Any, k: Any, v: Any, state: Any, implementation: str) -> Any:
        return jax.vmap(
            lambda rate: linear_attention(q, k, v, None, rate, state, chunk_size=16, implementation=implementation)
        )(rates)

    actual, expected = (
        plain.with_gradients(functools.partial(run, implementation=name), [q, k, v, state])
        for name in ("triton", "xla")
    )
    assert_close(actual, expected)


@pytest.mark.parametrize(("groups", "shape"), [(1, (2, 2)), (4, (1, 4)), (2, (2, 2)), (2, (1, 4))])
def test_each_device_runs_its_own_lanes_and_heads(groups: int, shape: tuple[int, int]) -> None:
    """Groups of one head each, of several, and one for all, whose gradients are added up; 2 groups do not divide over 4."""
    inputs = wide_inputs(4, 5, length=19, groups=groups)

    def run() -> list[np.ndarray]:
        return plain.with_gradients(
            lambda *inputs: linear_attention(*inputs, None, chunk_size=16, implementation="triton"), inputs
        )

    alone = run()
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert_close(run(), alone, 1e-6)
