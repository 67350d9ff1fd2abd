"""Rotary positions against complex numbers in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.nn.rotary import geometric, geometric_to_end, rotate
from tests.conformance.compare import assert_close

PLACES = np.array([0, 1, 255, 256, 4097, 123_456, 2**20 - 1, 2**24 + 1, 2**31 - 1])
X = np.random.default_rng(0).normal(size=(1, len(PLACES), 2, 64))


@pytest.mark.parametrize("frequencies", [geometric(64, 10_000.0), geometric_to_end(64, 10_000.0), geometric(64, 5e5)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_are_exact_at_every_position(frequencies: np.ndarray, interleaved: bool) -> None:
    pairs = X[..., 0::2] + 1j * X[..., 1::2] if interleaved else X[..., :32] + 1j * X[..., 32:]
    turned = pairs * np.exp(1j * PLACES[:, None] * frequencies)[None, :, None]
    parts = [turned.real, turned.imag]
    expected = np.stack(parts, axis=-1).reshape(X.shape) if interleaved else np.concatenate(parts, axis=-1)
    got = rotate(
        jnp.asarray(X, jnp.float32), jnp.asarray(PLACES, jnp.int32)[None], frequencies, interleaved=interleaved
    )
    assert_close(got, expected, 3e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_fewer_frequencies_turn_the_first_entries_and_leave_the_rest(interleaved: bool) -> None:
    x, places = jnp.asarray(X, jnp.float32), jnp.asarray(PLACES, jnp.int32)[None]
    got = rotate(x, places, geometric(16, 10_000.0), interleaved=interleaved)
    narrow = rotate(x[..., :16], places, geometric(16, 10_000.0), interleaved=interleaved)
    np.testing.assert_array_equal(got, jnp.concatenate([narrow, x[..., 16:]], axis=-1))


def test_products_depend_on_distance_alone() -> None:
    q, k = (jnp.asarray(X[:, :1, :, :], jnp.float32)[:, :, [i]] for i in (0, 1))

    def product(position: int, distance: int) -> float:
        turned = [
            rotate(x, jnp.asarray([[p]], jnp.int32), geometric(64, 10_000.0)).astype(jnp.float32)
            for x, p in ((q, position), (k, position - distance))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    near = product(100, 37)
    assert abs(near - product(100, 36)) > 1e-2
    assert_close(product(2**24 + 100, 37), near, 3e-5)


def test_the_last_of_retnets_frequencies_is_exact() -> None:
    assert geometric_to_end(8, 10_000.0).tolist() == pytest.approx([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    assert geometric(8, 10_000.0).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_positions_need_pairs() -> None:
    with pytest.raises(ValueError, match="head_dim is 3; choose an even one"):
        geometric(3, 100.0)
