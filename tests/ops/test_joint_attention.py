"""Attention to keys in several arrays equals attention to all of them in one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ssm_jax.ops.joint_attention import Part, joint_attention


def _inputs(dtype: type = np.float32) -> tuple[jax.Array, list[Part]]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 2, dtype)

    parts = [
        Part(draw(2, 3, keys, 4), draw(2, 3, keys, 6), jnp.asarray(rng.random((2, 5, keys)) < 0.6))
        for keys in (7, 2, 9)
    ]
    return draw(2, 5, 3, 4), parts


def _plain(q: np.ndarray, parts: list[Part]) -> np.ndarray:
    """Query by query in float64: the softmax over the keys it sees."""
    y = np.zeros((*q.shape[:3], 6))
    for lane, place, head in np.ndindex(*q.shape[:3]):
        keys = np.concatenate(
            [np.asarray(part.k_BHSP)[lane, head][np.asarray(part.seen_BTS)[lane, place]] for part in parts]
        )
        values = np.concatenate(
            [np.asarray(part.v_BHSQ)[lane, head][np.asarray(part.seen_BTS)[lane, place]] for part in parts]
        )
        scores = keys @ q[lane, place, head] / 2
        weights = np.exp(scores - scores.max())
        y[lane, place, head] = weights @ values / weights.sum()
    return y


def test_it_equals_one_softmax_over_all_keys() -> None:
    with jax.enable_x64(True):
        q, parts = _inputs(np.float64)
        np.testing.assert_allclose(jax.jit(joint_attention)(q, parts), _plain(np.asarray(q), parts), rtol=1e-12)
    q, parts = _inputs()
    np.testing.assert_allclose(jax.jit(joint_attention)(q, parts), _plain(np.asarray(q, np.float64), parts), atol=2e-6)


def test_large_scores_do_not_overflow_and_no_key_gives_zero() -> None:
    q, parts = _inputs()
    unseen = [part._replace(seen_BTS=part.seen_BTS.at[0, 1].set(False)) for part in parts]

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(joint_attention(q, unseen))

    large = jax.jit(joint_attention)(q * 1e4, unseen)
    assert not np.asarray(large[0, 1]).any()
    assert bool(jnp.isfinite(large).all())
    assert bool(jnp.isfinite(jax.jit(jax.grad(total))(q)).all())


def test_gradients_equal_those_of_one_softmax() -> None:
    with jax.enable_x64(True):
        q, parts = _inputs(np.float64)

        def joined(q: jax.Array, parts: list[Part]) -> jax.Array:
            k, v = (jnp.concatenate([part[i] for part in parts], axis=2) for i in (0, 1))
            seen = jnp.concatenate([part.seen_BTS for part in parts], axis=2)
            scores = jnp.where(seen[:, None], jnp.einsum("bthp,bhsp->bhts", q, k) / 2, -jnp.inf)
            return jnp.einsum("bhts,bhsq->bthq", jax.nn.softmax(scores), v)

        def loss(
            function: Callable[..., jax.Array], q: jax.Array, keys: list[tuple[jax.Array, jax.Array]]
        ) -> jax.Array:
            whole = [Part(k, v, part.seen_BTS) for (k, v), part in zip(keys, parts, strict=True)]
            return jnp.sum(jnp.sin(function(q, whole)))

        keys = [(part.k_BHSP, part.v_BHSQ) for part in parts]
        gradient = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
        got, expected = (gradient(f, q, keys) for f in (joint_attention, joined))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
