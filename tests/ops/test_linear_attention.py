"""The chunked form against masked attention over the whole sequence, in float64, where only a wrong formula can differ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.linear_attention import default_chunk_size, linear_attention

LENGTH, HEADS, GROUPS, KEYS, VALUES = 37, 4, 2, 3, 5


def dense(q: Any, k: Any, v: Any, gain: Any, log_decay: Any, state: Any, reset: Any) -> tuple[Any, Any]:
    """y = (Q K^T o decay) V over all pairs of tokens: quadratic, without chunks or a recurrence."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    total = jnp.cumsum(log_decay, axis=1)
    document = jnp.cumsum(reset, axis=1)
    visible = (document[:, :, None] == document[:, None, :]) & np.tri(v.shape[1], dtype=bool)
    differences = total[:, :, None] - total[:, None, :]
    decay_BTSH = jnp.exp(jnp.where(visible[..., None], differences, -jnp.inf))
    y = jnp.einsum("bthn,bshn,btsh,bsh,bshp->bthp", q, k, decay_BTSH, gain, v)
    from_state = jnp.where(document[..., None] == 0, jnp.exp(total), 0)
    y += jnp.einsum("bthn,bth,bhnp->bthp", q, from_state, state)
    last = from_state[:, -1, :, None, None] * state
    return y, last + jnp.einsum("bshn,bsh,bsh,bshp->bhnp", k, decay_BTSH[:, -1], gain, v)


def arrays(seed: int = 0, lanes: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    tokens = (lanes, LENGTH)
    return (
        rng.normal(size=(*tokens, GROUPS, KEYS)),
        rng.normal(size=(*tokens, GROUPS, KEYS)),
        rng.normal(size=(*tokens, HEADS, VALUES)),
        rng.uniform(0, 1, (*tokens, HEADS)),
        -rng.uniform(0, 2, (*tokens, HEADS)),
        rng.normal(size=(lanes, HEADS, KEYS, VALUES)),
    )


def with_gradients(function: Any, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    @jax.jit
    def run(*inputs: Any) -> Any:
        outputs, pullback = jax.vjp(function, *inputs)
        cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), outputs)
        return outputs, pullback(cotangents)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(run(*inputs))]


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 8, 64])
def test_equals_masked_attention(chunk_size: int, resets: bool) -> None:
    with jax.enable_x64(True):
        reset = jnp.asarray(np.random.default_rng(1).random((2, LENGTH)) < (0.15 if resets else 0))
        optional = reset if resets else None
        actual = with_gradients(lambda *inputs: linear_attention(*inputs, optional, chunk_size=chunk_size), arrays())
        expected = with_gradients(lambda *inputs: dense(*inputs, reset), arrays())
        for result, target in zip(actual, expected, strict=True):
            np.testing.assert_allclose(result, target, rtol=0, atol=1e-12 * np.abs(target).max())


@pytest.mark.parametrize("decay", [-1.0, -20.0, -1e6])
def test_strong_decays_leave_later_weak_ones_exact(decay: float) -> None:
    """Half a chunk forgets at once and half remembers: a difference of plain float32 sums is wrong by 3e-5 and more."""
    q, k, v, gain, log_decay, state = arrays(lanes=1)
    log_decay = np.full_like(log_decay, -0.01)
    log_decay[:, : LENGTH // 2] = decay
    inputs = (q, k, v, gain, log_decay, state)
    single = with_gradients(
        lambda *inputs: linear_attention(*inputs, chunk_size=64), [x.astype(np.float32) for x in inputs]
    )
    with jax.enable_x64(True):
        exact = with_gradients(lambda *inputs: dense(*inputs, jnp.zeros((1, LENGTH), bool)), inputs)
    for result, target in zip(single, exact, strict=True):
        if result.shape[:2] == (1, LENGTH):
            result, target = result[:, LENGTH // 2 :], target[:, LENGTH // 2 :]
        np.testing.assert_allclose(result, target, rtol=0, atol=2e-6 * np.abs(target).max())


def test_default_chunk_size_balances_scores_and_states() -> None:
    assert [default_chunk_size(*widths) for widths in ((16, 64), (64, 64), (128, 64), (256, 512))] == [32, 64, 128, 256]
