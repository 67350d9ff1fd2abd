"""Where things stand in a chunk, against lists that are built by hand: the published rule, split in every way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.nn.slots import ChunkShape, Slots, lay_out

Slot = tuple[str, int]
"""("read" | "pause" | "token" | "write", its number)."""


def _chunk(shape: ChunkShape, tokens: int, first: bool) -> list[Slot]:
    """A closed chunk: pauses go in at final indices stride * i <= tokens, one after another (BakaLLM's rule)."""
    middle: list[Slot] = [("token", n) for n in range(tokens)]
    for i in range(shape.pauses):
        if (shape.n_ctx // shape.pauses) * i <= tokens:
            middle.insert((shape.n_ctx // shape.pauses) * i, ("pause", i))
    read = [] if first else [("read", row) for row in range(shape.memory)]
    return [*read, *middle, *(("write", row) for row in range(shape.memory))]


def _open(shape: ChunkShape, tokens: int, first: bool) -> list[Slot]:
    """What stands of a chunk that is not full: up to its last token."""
    if tokens == shape.n_ctx:
        return _chunk(shape, tokens, first)
    whole = _chunk(shape, shape.n_ctx, first)
    return whole[: whole.index(("token", tokens - 1)) + 1] if tokens else []


def _described(slots: Slots, lane: int, filled: int) -> list[Slot]:
    """A lane's slots, the pauses counted from its first."""
    found: list[Slot] = []
    for t in range(slots.place_BT.shape[1]):
        if slots.place_BT[lane, t] < 0:
            break
        assert slots.place_BT[lane, t] == (0 if slots.start_B is None else slots.start_B[lane]) + t
        kinds = {"read": slots.read_BT, "pause": slots.pause_BT, "write": slots.write_BT}
        kind = [name for name, marks in kinds.items() if marks[lane, t]]
        assert len(kind) <= 1
        if not kind:
            token = int(slots.token_BT[lane, t])
            assert int(slots.out_BC[lane, token]) == t
            found.append(("token", filled + token))
        elif kind[0] == "pause":
            found.append(("pause", sum(name == "pause" for name, _ in found)))
        else:
            found.append((kind[0], int(slots.row_BT[lane, t])))
    return found


def _numbered(slots: list[Slot]) -> list[Slot]:
    """Pauses counted from the first of the list."""
    pauses = [slot for slot in slots if slot[0] == "pause"]
    return [("pause", pauses.index(slot)) if slot[0] == "pause" else slot for slot in slots]


SHAPES = [
    ChunkShape(n_ctx, pauses, memory, close)
    for close in (False, True)
    for n_ctx, pauses, memory in (
        (8, 2, 2),
        (7, 3, 1),
        (5, 5, 0),
        (9, 4, 3),
        (6, 0, 2),
        (1, 1, 1),
        (10, 1, 0),
        (11, 7, 2),
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("from_start", [False, True])
def test_slots_are_those_of_the_rule(shape: ChunkShape, from_start: bool) -> None:
    """Every number of tokens, from every place in a first, a second and a third chunk, each a lane of one call."""
    fills = [0] if shape.close_calls or from_start else range(shape.n_ctx)
    lanes = [(c, f, n) for c in range(3) for f in fills for n in range(shape.n_ctx - f + 1)]
    lay = functools.partial(
        lay_out, shape, capacity=shape.n_ctx, slots=shape.slots_for(shape.n_ctx), from_start=from_start
    )
    before = 1 if shape.close_calls else shape.n_ctx  # the least that a chunk before can have held
    position = jnp.asarray([c * before + f for c, f, _ in lanes], jnp.int32)
    slots = jax.jit(lay)(position, jnp.asarray([n for *_, n in lanes], jnp.int32))
    slots = Slots(*(None if x is None else np.asarray(x) for x in slots))
    for lane, (chunk, filled, count) in enumerate(lanes):
        first = chunk == 0
        if shape.close_calls:
            stood, after = [], _chunk(shape, count, first) if count else []
        else:
            stood, after = _open(shape, filled, first), _open(shape, filled + count, first)
        assert after[: len(stood)] == stood
        assert _described(slots, lane, filled) == _numbered(after[len(stood) :])
        assert slots.end_B[lane] == (len(after) if count else 0)
        assert slots.closed_B[lane] == (count > 0 and (shape.close_calls or filled + count == shape.n_ctx))
        assert slots.fresh_B[lane] == first
        assert not slots.closed_B[lane] or slots.length_B[lane] == len(after)
        assert slots.start_B is None or slots.start_B[lane] == len(stood)


@pytest.mark.parametrize(("pauses", "places"), [(8, [0, 64, 128, 192, 256, 320, 384, 448]), (0, [])])
def test_pauses_of_the_published_chunk(pauses: int, places: list[int]) -> None:
    """The first token follows pause 0, and 63 tokens stand between two pauses."""
    shape = ChunkShape(512, pauses, 16, False)
    assert shape.places == 512 + pauses + 32
    assert [i for i, (kind, _) in enumerate(_chunk(shape, 512, True)) if kind == "pause"] == places
    zero, full = jnp.zeros((1,), jnp.int32), jnp.full((1,), 512, jnp.int32)
    slots = lay_out(shape, zero, full, capacity=512, slots=shape.slots_for(512), from_start=True)
    assert jnp.flatnonzero(slots.pause_BT[0]).tolist() == places
    assert int(slots.end_B[0]) == 512 + pauses + 16
