"""How a call is read chunk by chunk: pauses and memory put around its tokens, layers applied, both taken out again.

Pure functions over a ``Flow``, which says how layers are applied and how to branch and loop around them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssm_jax.nn.slots import ChunkShape, Slots, fill, lay_out
from ssm_jax.nn.state import ChunkedState
from ssm_jax.typing import Activations, Lengths, PyTree

Run = Callable[[Activations, PyTree, Slots], tuple[Activations, PyTree]]
"""All layers over the slots of one chunk: (h_BTD, states, slots) -> (h_BTD, states)."""
_Tokens = Float[Array, "B C D"]
_Slots = Float[Array, "B T D"]
Reading = tuple[_Tokens, Lengths, ChunkedState]
"""The next tokens of each lane's chunk, how many there are, and the state before them."""
Read = Callable[[Run, Any], Any]
"""What is done with layers and an argument."""


class Flow(NamedTuple):
    """run: the layers. cond: (which, if_true, if_false, argument) -> result, the two being ``Read``.

    scan: (body, carry, inputs) -> (carry, outputs), body being (flow, carry, input) -> (carry, output).
    """

    run: Run
    cond: Callable[[Array, Read, Read, Any], Any]
    scan: Callable[[Callable[["Flow", Any, Any], tuple[Any, Any]], Any, Any], tuple[Any, Any]]


class Reader(NamedTuple):
    """shape: of chunks. head: whether the first rows of a chunk's output become the memory, else the last. pause_D: a pause.
    memory_RD: what a lane's first chunk writes with. None where there are none."""

    shape: ChunkShape
    head: bool
    pause_D: Float[Array, "D"] | None
    memory_RD: Float[Array, "R D"] | None

    def piece(self, run: Run, reading: Reading, *, slots: int, from_start: bool) -> tuple[_Tokens, ChunkedState]:
        """Reads tokens of one chunk in every lane that has any; (last residual stream of each token, state).

        ``slots``, ``from_start``: see ``lay_out``.
        """
        h_BCD, tokens_B, state = reading
        capacity = h_BCD.shape[1]
        where = lay_out(self.shape, state.position, tokens_B, capacity=capacity, slots=slots, from_start=from_start)
        h_BTD, layers = run(self._filled(h_BCD, state, where), state.layers, where)
        memory, head = self._memory_after(h_BTD, state, where)
        out_BCD = jnp.take_along_axis(h_BTD, where.out_BC[..., None], axis=1)
        return out_BCD, ChunkedState(layers, state.position + tokens_B, memory, head)

    def _filled(self, h_BCD: _Tokens, state: ChunkedState, where: Slots) -> _Slots:
        """What stands in each slot; zeros where there is none."""
        h_BTD = jnp.take_along_axis(h_BCD, where.token_BT[..., None], axis=1)
        if self.pause_D is not None:
            h_BTD = jnp.where(where.pause_BT[..., None], self.pause_D.astype(h_BTD.dtype), h_BTD)
        if self.memory_RD is not None:
            first = where.fresh_B[:, None, None]
            rows_BRD = jnp.where(first, self.memory_RD.astype(state.memory.dtype), state.memory).astype(h_BTD.dtype)
            rows_BTD = jnp.take_along_axis(rows_BRD, where.row_BT[..., None], axis=1)
            h_BTD = jnp.where((where.read_BT | where.write_BT)[..., None], rows_BTD, h_BTD)
        return jnp.where(where.present_BT[..., None], h_BTD, 0)

    def _memory_after(self, h_BTD: _Slots, state: ChunkedState, where: Slots) -> tuple[Any, Any]:
        if self.memory_RD is None:
            return None, None
        rows_R = jnp.arange(self.shape.memory)
        start_B1 = jnp.zeros((1, 1), jnp.int32) if where.start_B is None else where.start_B[:, None]
        closed = where.closed_B[:, None, None]

        def outputs(place_BR: Int[Array, "#B R"]) -> Float[Array, "B R D"]:
            slot_BR = jnp.clip(place_BR - start_B1, 0, h_BTD.shape[1] - 1)
            return jnp.take_along_axis(h_BTD, slot_BR[..., None], axis=1).astype(state.memory.dtype)

        if not self.head:
            tail_BRD = outputs(where.end_B[:, None] - self.shape.memory + rows_R)
            return jnp.where(closed, tail_BRD, state.memory), None
        made_BR = (rows_R >= start_B1) & (rows_R < where.end_B[:, None])
        head_BRD = jnp.where(made_BR[..., None], outputs(rows_R[None]), state.head)
        return jnp.where(closed, head_BRD, state.memory), head_BRD

    def one_token(
        self, cond: Callable[..., Any], h_B1D: Activations, tokens_B: Lengths, state: ChunkedState
    ) -> tuple[Activations, ChunkedState]:
        """Reads at most one token per lane: as one slot, unless some lane begins or closes its chunk or pauses."""
        most = self.shape.slots_for(1)
        where = lay_out(self.shape, state.position, tokens_B, capacity=1, slots=most, from_start=False)
        assert where.start_B is not None
        more = jnp.any(where.end_B - where.start_B > 1)
        wide, narrow = (functools.partial(self.piece, slots=slots, from_start=False) for slots in (most, 1))
        return (
            cond(more, wide, narrow, (h_B1D, tokens_B, state))
            if most > 1
            else cond(more, narrow, narrow, (h_B1D, tokens_B, state))
        )

    def call(
        self, flow: Flow, h_BLD: Activations, tokens_B: Lengths, state: ChunkedState, *, from_start: bool, ragged: bool
    ) -> tuple[Activations, ChunkedState]:
        """Reads the first ``tokens_B`` tokens of every row: what completes the open chunk, then chunks from their start.

        Args:
            from_start: whether no lane is within a chunk.
            ragged: whether rows may have fewer tokens than columns.
        """
        length, n_ctx = h_BLD.shape[1], self.shape.n_ctx
        if from_start:
            return self._chunks(flow, h_BLD, tokens_B, state, always=not ragged)
        if length == 1:
            return self.one_token(flow.cond, h_BLD, tokens_B, state)
        filled_B = fill(self.shape, state.position)
        first_B = jnp.where(filled_B > 0, jnp.minimum(tokens_B, n_ctx - filled_B), 0)
        capacity = min(length, n_ctx - 1)
        if not capacity:
            return self._chunks(flow, h_BLD, tokens_B, state, always=False)
        complete = functools.partial(self.piece, slots=self.shape.slots_for(capacity), from_start=False)
        begun_BCD, state = flow.cond(jnp.any(first_B > 0), complete, _nothing, (h_BLD[:, :capacity], first_B, state))
        later_BL = first_B[:, None] + jnp.arange(length)
        rest_BLD = jnp.take_along_axis(h_BLD, jnp.minimum(later_BL, length - 1)[..., None], axis=1)
        rest_BLD, state = self._chunks(flow, rest_BLD, tokens_B - first_B, state, always=False)
        begun_BLD = jnp.pad(begun_BCD, ((0, 0), (0, length - capacity), (0, 0)))
        earlier_BL = jnp.maximum(jnp.arange(length) - first_B[:, None], 0)
        rest_BLD = jnp.take_along_axis(rest_BLD, earlier_BL[..., None], axis=1)
        return jnp.where((jnp.arange(length) < first_B[:, None])[..., None], begun_BLD, rest_BLD), state

    def _chunks(
        self, flow: Flow, h_BLD: Activations, tokens_B: Lengths, state: ChunkedState, *, always: bool
    ) -> tuple[Activations, ChunkedState]:
        """Whole chunks, the last perhaps not full. ``always``: whether each has a token in every lane."""
        batch, length, width = h_BLD.shape
        columns = min(length, self.shape.n_ctx)
        count = -(-length // columns)
        whole = functools.partial(self.piece, slots=self.shape.slots_for(columns), from_start=True)

        def read(flow: Flow, state: ChunkedState, inputs: tuple[_Tokens, Lengths]) -> tuple[ChunkedState, _Tokens]:
            reading = (*inputs, state)
            if always:
                out_BCD, state = whole(flow.run, reading)
            else:
                out_BCD, state = flow.cond(jnp.any(inputs[1] > 0), whole, _nothing, reading)
            return state, out_BCD

        counts_MB = jnp.clip(tokens_B - columns * jnp.arange(count)[:, None], 0, columns)
        if count == 1:
            state, out_BCD = read(flow, state, (h_BLD, counts_MB[0]))
            return out_BCD, state
        padded = jnp.pad(h_BLD, ((0, 0), (0, count * columns - length), (0, 0)))
        pieces_MBCD = jnp.moveaxis(padded.reshape(batch, count, columns, width), 1, 0)
        state, out_MBCD = flow.scan(read, state, (pieces_MBCD, counts_MB))
        return jnp.moveaxis(out_MBCD, 0, 1).reshape(batch, count * columns, width)[:, :length], state


def _nothing(run: Run, reading: Reading) -> tuple[_Tokens, ChunkedState]:
    h_BCD, _, state = reading
    return h_BCD, state


def begins_within(positions: Int[Array, "B L"]) -> Bool[Array, "B"]:
    """Whether a document begins behind the first column of a row."""
    return jnp.any(positions[:, 1:] == 0, axis=1)
