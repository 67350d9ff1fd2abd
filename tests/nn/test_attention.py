"""The attention mixer against an oracle in float64 that goes token by token, blocks, documents and rotary angles included."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.nn.mixers import Attention
from ssm_jax.nn.state import AttentionState
from ssm_jax.ops.attention import attention
from tests.conformance.compare import assert_close, assert_trees_close
from tests.conformance.jaxpr import array_sizes

HEADS, WIDTH, D = 2, 4, 6
DOCUMENTS = (13, 1, 16, 7)


def module(block: int, rotary_base: float | None = None, **fields: Any) -> Attention:
    return Attention(heads=HEADS, head_dim=WIDTH, block=block, bias=True, rotary_base=rotary_base, **fields)


def drawn(block: int = 64, batch: int = 2, length: int = sum(DOCUMENTS)) -> tuple[Any, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (batch, length, D))
    variables = module(block).init(jax.random.key(0), x)
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return treedef.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]), x


def packed(batch: int = 2) -> jax.Array:
    return jnp.concatenate([jnp.arange(n) for n in DOCUMENTS])[None].repeat(batch, 0)


@functools.partial(jax.jit, static_argnames="mixer")
def run(mixer: Attention, variables: Any, x: Any, state: Any = None, positions: Any = None) -> Any:
    return mixer.apply(variables, x, state, positions)


def oracle(variables: Any, x: np.ndarray, positions: np.ndarray, block: int, base: float | None) -> np.ndarray:
    """One lane, token by token, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    q, k, v = (
        np.einsum("ld,dhp->lhp", np.asarray(x, np.float64), p[n]["kernel"]) + p[n]["bias"]
        for n in ("q_proj", "k_proj", "v_proj")
    )
    document = np.cumsum(positions == 0)
    if base is not None:
        angles = positions[:, None] * base ** (-2 * np.arange(WIDTH // 2) / WIDTH)
        turn = np.exp(1j * angles)[:, None]
        halves = ((z[..., : WIDTH // 2] + 1j * z[..., WIDTH // 2 :]) * turn for z in (q, k))
        q, k = (np.concatenate([z.real, z.imag], axis=-1) for z in halves)
    y = np.zeros_like(v)
    for t, place in enumerate(positions):
        seen = [
            j
            for j in range(t + 1)
            if document[j] == document[t] and positions[j] // block == place // block and positions[j] <= place
        ]
        for head in range(HEADS):
            scores = k[seen, head] @ q[t, head] / np.sqrt(WIDTH)
            weights = np.exp(scores - scores.max())
            y[t, head] = weights @ v[seen, head] / weights.sum()
    return np.einsum("lhp,hpd->ld", y, p["out_proj"]["kernel"]) + p["out_proj"]["bias"]


@pytest.mark.parametrize(
    ("block", "rotary_base"), [(1, None), (5, None), (5, 100.0), (16, 100.0), (64, None), (64, 100.0)]
)
def test_values_are_those_of_the_oracle(block: int, rotary_base: float | None) -> None:
    variables, x = drawn()
    mixer = module(block, rotary_base)
    for positions in (None, packed()):
        y, _ = run(mixer, variables, x, None, positions)
        places = np.arange(x.shape[1]) if positions is None else np.asarray(positions[0])
        for lane in range(2):
            assert_close(y[lane], oracle(variables, x[lane], places, block, rotary_base), 5e-5)


@pytest.mark.parametrize(
    ("block", "pieces"), [(1, (36, 1)), (5, (1, 36)), (5, (5, 1, 1, 23, 7)), (8, (12, 25)), (64, (5, 1, 1, 23, 7))]
)
def test_split_anywhere_equals_whole(block: int, pieces: tuple[int, ...]) -> None:
    variables, x = drawn()
    mixer = module(block, 100.0)
    for positions in (None, packed()):
        whole, expected = run(mixer, variables, x, None, positions)
        state, outputs, start = mixer.init_state(2), [], 0
        for length in pieces:
            part = slice(start, start + length)
            y, state = run(mixer, variables, x[:, part], state, None if positions is None else positions[:, part])
            outputs.append(y)
            start += length
        assert_close(jnp.concatenate(outputs, axis=1), whole, 2e-5)
        assert_trees_close(state, expected, 2e-6)


@pytest.mark.parametrize("block", [5, 64])
def test_absent_tokens_leave_the_state_untouched(block: int) -> None:
    variables, x = drawn(batch=4, length=15)
    mixer = module(block, 100.0)
    _, state = run(mixer, variables, x[:, :6])
    lengths = (9, 4, 1, 0)
    offsets = jnp.arange(9)
    positions = jnp.stack([jnp.where(offsets < n, offsets + 6, -1) for n in lengths])
    y, after = run(mixer, variables, x[:, 6:], state, positions)
    assert bool(jnp.isfinite(y).all())
    for lane, length in enumerate(lengths):
        before, got = (jax.tree.map(lambda leaf, lane=lane: leaf[lane : lane + 1], tree) for tree in (state, after))
        if length == 0:
            assert_trees_close(got, before, 0.0)
            continue
        alone, expected = run(mixer, variables, x[lane : lane + 1, 6 : 6 + length], before)
        assert_close(y[lane, :length], alone[0], 2e-5)
        assert_trees_close(got, expected, 2e-6)


def test_the_state_holds_what_the_next_token_reaches_and_zeros() -> None:
    variables, x = drawn(length=11)
    _, state = run(module(8), variables, x)
    assert state.k.shape == (2, HEADS, 7, WIDTH)
    np.testing.assert_array_equal(state.position, 11)
    assert not state.k[:, :, :4].any()
    assert not state.v[:, :, :4].any()
    assert state.k[:, :, 4:].all()
    p = variables["params"]["v_proj"]
    expected = jnp.einsum("bld,dhp->bhlp", x[:, 8:], p["kernel"]) + p["bias"][:, None]
    assert_close(state.v[:, :, 4:], expected, 1e-5)
    _, state = run(module(8), variables, x[:, :8])
    assert not state.k.any(), "the next token starts a block"


@pytest.mark.parametrize("block", [5, 64])
def test_what_is_not_a_number_stays_in_its_document_and_block(block: int) -> None:
    """Forward and backward: a weight of zero times NaN would be NaN."""
    variables, x = drawn()
    positions, mixer = packed(), module(block, 100.0)
    bad = x.at[0, 3].set(jnp.nan).at[1, 14].set(jnp.inf)
    clean, _ = run(mixer, variables, x, None, positions)
    y, state = run(mixer, variables, bad, None, positions)
    affected = np.zeros(clean.shape[:2], bool)
    affected[0, 3 : min(13, block)] = True
    affected[1, 14 : 14 + min(16, block)] = True
    assert bool(jnp.isnan(y[affected]).all())
    np.testing.assert_array_equal(y[~affected], clean[~affected])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (state.k, state.v))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        y = attention(q, k, v, positions % block, window=block)
        return jnp.sum(jnp.where(affected[..., None, None], 0, jnp.square(y)))

    shape = (2, sum(DOCUMENTS), HEADS, WIDTH)
    qkv = tuple(jax.random.normal(jax.random.key(n), shape) for n in range(3))
    broken = tuple(a.at[0, 3].set(jnp.nan).at[1, 14].set(jnp.inf) for a in qkv)
    expected, got = (jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays) for arrays in (qkv, broken))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one[~affected], other[~affected])


@pytest.mark.parametrize("length", [1, 12])
def test_a_document_start_clears_a_broken_lane(length: int) -> None:
    variables, x = drawn(length=length)
    mixer = module(8)
    fresh = mixer.init_state(2)
    broken = AttentionState(k=fresh.k + jnp.nan, v=fresh.v + jnp.inf, position=fresh.position + 5)
    positions = jnp.arange(length)[None].repeat(2, 0)
    assert_trees_close(run(mixer, variables, x, broken, positions), run(mixer, variables, x, fresh, positions), 0.0)


@pytest.mark.parametrize("block", [5, 64])
def test_gradients_are_those_of_the_formula_in_float64(block: int) -> None:
    positions = np.asarray(packed(1)[0])
    length = len(positions)
    document = np.cumsum(positions == 0)
    same = (document[:, None] == document) & (positions[:, None] // block == positions // block)
    seen = same & np.tri(length, dtype=bool)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, length, HEADS, WIDTH)) for _ in range(4)]

    def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("blhp,bshp->bhls", q, k) / WIDTH**0.5
        return jnp.einsum("bhls,bshp->blhp", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), v)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, jnp.asarray(positions % block)[None], window=block)

    def gradients(function: Any, dtype: Any) -> Any:
        *inputs, weight = (jnp.asarray(a, dtype) for a in arrays)
        found = jax.jit(jax.grad(lambda *qkv: jnp.sum(function(*qkv) * weight), argnums=(0, 1, 2)))(*inputs)
        return tuple(np.asarray(leaf, np.float32) for leaf in found)

    with jax.enable_x64(True):
        expected = gradients(formula, jnp.float64)
    assert_trees_close(gradients(ours, jnp.float32), expected, 1e-5, relative=True)


@pytest.mark.parametrize("with_state", [False, True])
def test_no_array_of_length_by_length(with_state: bool) -> None:
    block, length = 8, 256
    variables, x = drawn(batch=1, length=length)
    mixer = module(block)
    state = mixer.init_state(1) if with_state else None

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(mixer.apply(variables, x, state)[0])

    size, what, _ = array_sizes(jax.grad(loss), variables, x)[0]
    assert size <= length * 2 * block * HEADS * WIDTH + block**2 * HEADS * WIDTH, what
