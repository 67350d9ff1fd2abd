"""The attention mixer against an oracle in float64 that goes token by token, blocks, documents and rotary angles included."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.nn.mixers import Attention
from ssm_jax.nn.mixers import attention as attention_module
from ssm_jax.ops.attention import attention
from tests.conformance.compare import assert_close, assert_trees_close
from tests.conformance.jaxpr import array_sizes

HEADS, WIDTH, D = 2, 4, 6  # the width of the heads together is not that of the model
DOCUMENTS = (13, 1, 16, 7)


def module(block: int, rotary_base: float | None = None, heads: int = HEADS, **fields: Any) -> Attention:
    return Attention(heads=heads, head_dim=WIDTH, block=block, bias=True, rotary_base=rotary_base, **fields)


def drawn(batch: int = 2, length: int = sum(DOCUMENTS), **fields: Any) -> tuple[Any, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (batch, length, D))
    variables = module(64, **fields).init(jax.random.key(0), x)
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
    y, shared = np.zeros_like(q), q.shape[1] // k.shape[1]
    for t, place in enumerate(positions):
        seen = [
            j
            for j in range(t + 1)
            if document[j] == document[t] and positions[j] // block == place // block and positions[j] <= place
        ]
        for head in range(q.shape[1]):
            scores = k[seen, head // shared] @ q[t, head] / np.sqrt(WIDTH)
            weights = np.exp(scores - scores.max())
            y[t, head] = weights @ v[seen, head // shared] / weights.sum()
    return np.einsum("lhp,hpd->ld", y, p["out_proj"]["kernel"]) + p["out_proj"]["bias"]


@pytest.mark.parametrize(
    ("block", "rotary_base"), [(1, None), (5, None), (5, 100.0), (16, 100.0), (64, None), (64, 100.0)]
)
def test_values_are_those_of_the_oracle(block: int, rotary_base: float | None) -> None:
    variables, x = drawn()
    check_values(module(block, rotary_base), variables, x)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 2), (3, 1), (2, 2)])
def test_values_with_shared_keys_are_those_of_the_oracle(heads: int, key_heads: int) -> None:
    shared = {"heads": heads, "key_heads": key_heads}
    variables, x = drawn(**shared)
    assert variables["params"]["v_proj"]["kernel"].shape == (D, key_heads, WIDTH)
    check_values(module(5, 100.0, **shared), variables, x)


def check_values(mixer: Attention, variables: Any, x: jax.Array) -> None:
    for positions in (None, packed()):
        y, _ = run(mixer, variables, x, None, positions)
        places = np.arange(x.shape[1]) if positions is None else np.asarray(positions[0])
        for lane in range(2):
            assert_close(y[lane], oracle(variables, x[lane], places, mixer.block, mixer.rotary_base), 5e-5)


SPLITS = [(1, (36, 1)), (5, (1, 36)), (5, (5, 1, 1, 23, 7)), (8, (12, 25)), (8, (1,) * 37), (64, (5, 1, 1, 23, 7))]


@pytest.mark.parametrize(("block", "pieces"), SPLITS)
def test_split_anywhere_equals_whole(block: int, pieces: tuple[int, ...]) -> None:
    shared = {"heads": 2, "key_heads": 1}
    variables, x = drawn(**shared)
    mixer = module(block, 100.0, **shared)
    for positions in (None, packed()):
        whole, expected = run(mixer, variables, x, None, positions)
        got, state = in_pieces(mixer, variables, x, positions, pieces, mixer.init_state(2))
        assert_close(got, whole, 2e-5)
        assert_trees_close(state, expected, 2e-6)


def in_pieces(
    mixer: Attention, variables: Any, x: jax.Array, positions: Any, pieces: tuple[int, ...], state: Any
) -> tuple[jax.Array, Any]:
    outputs, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        y, state = run(mixer, variables, x[:, part], state, None if positions is None else positions[:, part])
        outputs.append(y)
        start += length
    return jnp.concatenate(outputs, axis=1), state


def lanes_with_room(monkeypatch: pytest.MonkeyPatch, few: int) -> tuple[Any, Any, jax.Array, np.ndarray]:
    """A mixer that reads at least ``few`` rows of a state, its variables, inputs, and how much each of four lanes has read."""
    monkeypatch.setattr(attention_module, "_FEW", few)
    variables, x = drawn(4, 60, rotary_base=100.0)
    return module(64, rotary_base=100.0), variables, x, np.array([0, 3, 40, 17])


def test_rows_of_a_state_are_read_as_far_as_any_lane_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes at different places, in a state with room for many more; then a new document in the longest one."""
    mixer, variables, x, read = lanes_with_room(monkeypatch, 4)
    index = np.arange(40)
    before = jnp.asarray(np.where(index < read[:, None], index, -1), jnp.int32)
    _, state = jax.jit(mixer.apply)(variables, x[:, :40], mixer.init_state(4, capacity=60), before)
    rest = jnp.stack([x[lane, n : n + 9] for lane, n in enumerate(read)])
    for starts in (read, np.where(read == 40, 0, read)):
        at = jnp.asarray(starts[:, None] + np.arange(9), jnp.int32)
        got, _ = jax.jit(mixer.apply)(variables, rest, state, at)
        for lane, n in enumerate(read):
            whole = x[lane, n : n + 9] if starts[lane] == 0 else x[lane, : n + 9]
            expected, _ = jax.jit(mixer.apply)(variables, whole[None])
            assert_close(got[lane], expected[0, -9:], 2e-5)


def test_gradients_through_a_state_keep_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ways there are to read it: a switch would keep what every one of them needs."""

    def memory(few: int) -> int:
        mixer, variables, x, _ = lanes_with_room(monkeypatch, few)
        state = mixer.init_state(4, capacity=60)

        def loss(variables: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(mixer.apply(variables, x, state)[0]))

        return int(jax.jit(jax.grad(loss)).lower(variables, x[:, :30]).compile().memory_analysis().temp_size_in_bytes)

    assert memory(2) < 1.1 * memory(64)


@pytest.mark.parametrize(("block", "capacity"), [(64, 37), (8, 100)])
@pytest.mark.parametrize("pieces", [(5, 1, 1, 23, 7), (1,) * 37], ids=str)
def test_a_state_with_room_for_what_is_read_gives_the_same(block: int, capacity: int, pieces: tuple[int, ...]) -> None:
    variables, x = drawn()
    mixer = module(block, 100.0)
    fresh = mixer.init_state(2, capacity)
    assert fresh.k.shape == (2, HEADS, min(block, capacity), WIDTH)
    for positions in (None, packed()):
        whole, _ = run(mixer, variables, x, None, positions)
        got, state = in_pieces(mixer, variables, x, positions, pieces, fresh)
        assert_close(got, whole, 2e-5)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)


@pytest.mark.parametrize("pieces", [(37,), (9, 28), (1,) * 37], ids=str)
def test_beyond_the_capacity_is_not_a_number_and_the_next_document_is_whole(pieces: tuple[int, ...]) -> None:
    variables, x = drawn()
    mixer, room = module(64, 100.0), 12
    whole, _ = run(mixer, variables, x, None, packed())
    got, state = in_pieces(mixer, variables, x, packed(), pieces, mixer.init_state(2, room))
    beyond = np.asarray(packed()[0] >= room)
    assert bool(jnp.isnan(got[:, beyond]).all())
    assert_close(got[:, ~beyond], whole[:, ~beyond], 2e-5)
    assert bool(jnp.isfinite(state.k).all())
    beyond = np.arange(x.shape[1]) >= room
    got, full = in_pieces(mixer, variables, x, None, pieces, mixer.init_state(2, room))
    assert bool(jnp.isnan(got[:, beyond]).all())
    assert bool(jnp.isfinite(got[:, ~beyond]).all())
    _, expected = run(mixer, variables, x[:, :room], mixer.init_state(2, room))
    assert_trees_close((full.k, full.v), (expected.k, expected.v), 2e-6)


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


def test_a_single_absent_token_leaves_the_state_untouched() -> None:
    variables, x = drawn(length=7)
    mixer = module(8)
    _, state = run(mixer, variables, x[:, :6])
    _, after = run(mixer, variables, x[:, 6:], state, jnp.asarray([[6], [-1]]))
    _, expected = run(mixer, variables, x[:, 6:], state)
    for lane, reference in enumerate((expected, state)):
        got, wanted = (jax.tree.map(lambda leaf, lane=lane: leaf[lane], tree) for tree in (after, reference))
        assert_trees_close(got, wanted, 0.0)


def test_the_state_holds_the_last_token_at_every_place() -> None:
    variables, x = drawn(length=11)
    positions = jnp.asarray([[*range(11)], [*range(7), *range(4)]])
    _, state = run(module(8), variables, x, None, positions)
    assert state.k.shape == (2, HEADS, 8, WIDTH)
    np.testing.assert_array_equal(state.position, [11, 4])
    p = variables["params"]["v_proj"]
    values = jnp.einsum("bld,dhp->bhlp", x, p["kernel"]) + p["bias"][:, None]
    assert_close(state.v[0], values[0][:, [8, 9, 10, 3, 4, 5, 6, 7]], 1e-5)
    assert_close(state.v[1, :, :4], values[1][:, 7:], 1e-5)
    assert state.k.any(axis=(1, 3))[0].all()
    for cache in (state.k, state.v):
        assert not cache[1, :, 4:].any(), "nothing of another document"


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


def test_what_is_not_a_number_stays_in_its_block_token_by_token() -> None:
    variables, x = drawn()
    mixer = module(8, 100.0)
    bad = x.at[0, 3].set(jnp.nan).at[1, 14].set(jnp.inf)
    got, state = in_pieces(mixer, variables, bad, None, (1,) * x.shape[1], mixer.init_state(2))
    expected, _ = run(mixer, variables, bad)
    np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(expected))
    assert int(jnp.isnan(got[..., 0]).sum()) == (8 - 3) + (16 - 14)
    again, _ = run(mixer, variables, x[:, :9], state, jnp.arange(9)[None].repeat(2, 0))
    assert_close(again, run(mixer, variables, x[:, :9])[0], 2e-5)


@pytest.mark.parametrize("length", [1, 12])
def test_a_document_start_clears_a_broken_lane(length: int) -> None:
    variables, x = drawn(length=length)
    mixer = module(8)
    fresh = mixer.init_state(2)
    broken = fresh.replace(k=fresh.k + jnp.nan, v=fresh.v + jnp.inf, position=fresh.position + 5)
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


def test_a_token_writes_its_row_and_moves_nothing() -> None:
    """In the jaxpr, and in the program, which works in the caches that it is given."""
    mixer, (variables, x) = module(512, 100.0), drawn(length=1)
    state = mixer.init_state(2)
    writers = {name for size, _, name in array_sizes(mixer.apply, variables, x, state) if size >= state.k.size}
    assert writers == {"scatter"}
    step = jax.jit(lambda state: mixer.apply(variables, x, state), donate_argnums=0)
    memory = step.lower(state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state.k.nbytes


def test_a_state_that_nobody_wants_is_not_made() -> None:
    block = 1009
    mixer, (variables, x) = module(block), drawn()

    def loss(variables: Any) -> jax.Array:
        return jnp.sum(mixer.apply(variables, x)[0])

    for function in (loss, jax.grad(loss)):
        assert f",{block}" not in jax.jit(function).lower(variables).compile().as_text()
