"""The masks against sorting oracles, the draws against their definition."""

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from ssm_jax.generation.sampler import NOT_A_TOKEN, Sampling, sample, top_k_mask, top_p_mask

ROWS, VOCAB = 2, 9
_top_k, _top_p, _sample = jax.jit(top_k_mask), jax.jit(top_p_mask), jax.jit(sample)

# Few distinct values, so that ties are common; the extremes of float32, both zeros and excluded tokens among them.
_values = st.sampled_from([-np.inf, -3.4e38, -2.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 0.5000001, 3.0, 3.4e38])
_logits = hypothesis.extra.numpy.arrays(np.float32, (ROWS, VOCAB), elements=_values.map(np.float32))
_moderate = hypothesis.extra.numpy.arrays(
    np.float32, (ROWS, VOCAB), elements=st.floats(-20, 20, width=16).map(np.float32)
)


def _flushed(logits: np.ndarray) -> np.ndarray:
    """Subnormals are zero where the device flushes them."""
    return np.where(np.abs(logits) < np.finfo(np.float32).tiny, np.float32(0), logits)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(_logits, st.integers(1, VOCAB))
def test_top_k_keeps_what_a_sort_keeps(logits: np.ndarray, k: int) -> None:
    logits = _flushed(logits)
    kth = np.sort(logits, axis=-1)[:, ::-1][:, k - 1 : k]
    np.testing.assert_array_equal(_top_k(logits, jnp.int32(k)), logits >= kth)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(_moderate, st.floats(0.01, 0.999))
def test_top_p_keeps_what_a_sort_keeps(logits: np.ndarray, p: float) -> None:
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=-1, keepdims=True)
    order = np.argsort(-exact, axis=-1, kind="stable")
    mass = np.cumsum(np.take_along_axis(exact, order, axis=-1), axis=-1)
    hypothesis.assume(np.abs(mass - p).min() > 1e-5)  # else rounding decides, here and there
    last = np.take_along_axis(order, np.argmax(mass >= p, axis=-1)[:, None], axis=-1)
    expected = logits >= np.take_along_axis(logits, last, axis=-1)
    np.testing.assert_array_equal(_top_p(logits, jnp.float32(p)), expected)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(_logits)
def test_greedy_takes_the_first_of_the_largest(logits: np.ndarray) -> None:
    logits = _flushed(logits)
    got = _sample(logits, Sampling(), jax.random.key(0), jnp.int32(0))
    np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


def test_a_lane_with_logits_that_are_not_numbers_gives_no_token() -> None:
    logits = jnp.zeros((ROWS, VOCAB)).at[1, 2].set(jnp.nan)
    for sampling in (Sampling(), Sampling(jnp.float32(1.0), jnp.int32(3), jnp.float32(0.5))):
        tokens = _sample(logits, sampling, jax.random.key(0), jnp.int32(0))
        assert ((tokens == NOT_A_TOKEN) == (np.arange(ROWS) == 1)).all()
        assert (tokens < VOCAB).all()


def test_a_probability_of_one_keeps_every_token() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32) * 5
    assert np.asarray(_top_p(logits, jnp.float32(1.0))).all()


def test_a_draw_is_the_argmax_of_noisy_logits_within_both_masks() -> None:
    rng, key, step = np.random.default_rng(0), jax.random.key(7), jnp.int32(3)
    logits = rng.normal(size=(3, 50)).astype(np.float32) * 3
    got = sample(jnp.asarray(logits), Sampling(jnp.float32(0.7), jnp.int32(8), jnp.float32(0.6)), key, step)
    for lane, row in enumerate(logits / np.float32(0.7)):
        kept = np.where(row >= np.sort(row)[-8], row, -np.inf)
        probabilities = np.exp(kept - kept.max()) / np.exp(kept - kept.max()).sum()
        nucleus = np.sort(probabilities)[::-1]
        least = nucleus[np.argmax(np.cumsum(nucleus) >= 0.6)]
        noise = jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, lane), step), (50,))
        assert got[lane] == np.argmax(np.where(probabilities >= least, kept + noise, -np.inf))


def test_frequencies_are_the_softmax() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]])) * 2.0
    draw = jax.vmap(lambda step: sample(logits, Sampling(jnp.float32(2.0)), jax.random.key(0), step)[0])
    frequencies = np.bincount(np.asarray(draw(jnp.arange(20_000))), minlength=5) / 20_000
    np.testing.assert_allclose(frequencies, [0.5, 0.25, 0.125, 0.0625, 0.0625], atol=0.015)


def test_a_lane_draws_the_same_whatever_the_others_are() -> None:
    logits = jax.random.normal(jax.random.key(1), (5, 30))
    sampling, key = Sampling(jnp.float32(1.0)), jax.random.key(2)
    alone = [_sample(logits[:2], sampling, key, jnp.int32(step)).tolist() for step in range(20)]
    among = [_sample(logits, sampling, key, jnp.int32(step)).tolist()[:2] for step in range(20)]
    assert alone == among
    assert len({tuple(row) for row in alone}) > 5, "steps draw apart"
    same = jnp.repeat(logits[:1], 2, axis=0)
    draws = [_sample(same, sampling, key, jnp.int32(step)).tolist() for step in range(20)]
    assert any(first != second for first, second in draws), "lanes draw apart"


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = jnp.array([[100.0, 300.0, 299.99, -1e32], [-500.0, -600.0, -700.0, -np.inf]])
    sampling = Sampling(jnp.float32(temperature), None, jnp.float32(0.9))
    assert sample(logits, sampling, jax.random.key(0), jnp.int32(0)).tolist() == [1, 0]


def test_a_huge_temperature_draws_every_kept_token() -> None:
    logits = jnp.array([[9.0, 5.0, 1.0, -3.0]])
    sampling = Sampling(jnp.float32(1e30), jnp.int32(3))
    drawn = {int(_sample(logits, sampling, jax.random.key(0), jnp.int32(step))[0]) for step in range(40)}
    assert drawn == {0, 1, 2}
