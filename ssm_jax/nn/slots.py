"""Where things stand in a chunk with pause tokens and memory.

A chunk of a lane is a row of slots, at places 0, 1, ...:

    [read: R memory rows, not in a lane's first chunk] [pauses and up to n_ctx tokens] [write: R rows, once the chunk is closed]

(BakaLLM; pauses: Goyal et al. 2023, arXiv:2310.02226; memory: Bulatov et al. 2022, arXiv:2207.06881.) Pause i stands at place
i * stride of the middle part, stride = n_ctx // n_pauses, so that the first token follows pause 0. All arithmetic is on integers,
per lane.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_Lanes = Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class ChunkShape:
    """n_ctx: tokens of a chunk. pauses: in it. memory: R, rows that are read and written.

    close_calls: whether the end of every call closes the chunk, whatever is in it, as published; there pause i stands in a chunk
    of n tokens where i * stride <= n, which for the last tokens before a pause is later than in a longer chunk. Else a chunk goes
    on in the next call.
    """

    n_ctx: int
    pauses: int
    memory: int
    close_calls: bool

    @property
    def stride(self) -> int:
        """Places from pause to pause."""
        return self.n_ctx // self.pauses if self.pauses else 1

    @property
    def places(self) -> int:
        """S: the slots of a full chunk that reads memory."""
        return self.n_ctx + self.pauses + 2 * self.memory

    def slots_for(self, tokens: int) -> int:
        """The most slots that ``tokens`` tokens of one chunk take with all that may come before, between and after them."""
        between = min(self.pauses, tokens // max(self.stride - 1, 1) + 1) if self.stride > 1 else self.pauses
        return tokens + between + 2 * self.memory

    def pauses_in(self, tokens: _Lanes) -> _Lanes:
        """Pauses of a chunk that is closed with so many tokens."""
        return (
            jnp.minimum(tokens // self.stride + 1, self.pauses)
            if self.close_calls
            else jnp.full_like(tokens, self.pauses)
        )

    def place_of(self, token: Int[Array, "*shape"], pauses: Int[Array, "#*shape"]) -> Int[Array, "*shape"]:
        """Place in the middle part of the chunk's n-th token, n from 0, in a chunk with so many pauses."""
        if not self.pauses:
            return token
        before = token // (self.stride - 1) + 1 if self.stride > 1 else jnp.full_like(token, self.pauses)
        return token + jnp.minimum(before, pauses)


class Slots(NamedTuple):
    """The slots of one call that belong to one chunk of each lane, T of them, from the lane's next place on.

    place_BT: of each, -1 where there is none (a suffix). start_B: the first place, None where it is 0 in every lane.
    end_B: the place after the last one, 0 where a lane has none. tokens_B: how many are tokens.
    length_B: slots of the whole chunk once it is closed. fresh_B: whether it is a lane's first chunk.
    closed_B: whether the chunk ends with the last slot. read_BT, pause_BT, write_BT: what stands where; elsewhere a token.
    row_BT: which row of the memory. token_BT: which of the call's tokens of this chunk.
    out_BC: at which slot the n-th of these tokens stands. may_close: whether any chunk could end here, known before any value is.
    """

    place_BT: Int[Array, "B T"]
    start_B: _Lanes | None
    end_B: _Lanes
    tokens_B: _Lanes
    length_B: _Lanes
    fresh_B: Bool[Array, "B"]
    closed_B: Bool[Array, "B"]
    read_BT: Bool[Array, "B T"]
    pause_BT: Bool[Array, "B T"]
    write_BT: Bool[Array, "B T"]
    row_BT: Int[Array, "B T"]
    token_BT: Int[Array, "B T"]
    out_BC: Int[Array, "B C"]
    may_close: bool

    @property
    def present_BT(self) -> Bool[Array, "B T"]:
        """Whether there is a slot."""
        return self.place_BT >= 0


def fill(shape: ChunkShape, position_B: _Lanes) -> _Lanes:
    """Tokens in the open chunk of lanes that have read so many tokens of their documents."""
    return jnp.zeros_like(position_B) if shape.close_calls else position_B % shape.n_ctx


def lay_out(
    shape: ChunkShape, position_B: _Lanes, tokens_B: _Lanes, *, capacity: int, slots: int, from_start: bool
) -> Slots:
    """The slots that the next ``tokens_B`` <= ``capacity`` tokens of the open chunks take.

    Args:
        position_B: tokens of its document that a lane has read.
        slots: T, at least as many as any lane needs.
        from_start: whether no lane is within a chunk.
    """
    filled_B = jnp.zeros_like(position_B) if from_start else fill(shape, position_B)
    fresh_B = position_B == 0 if shape.close_calls else position_B < shape.n_ctx
    any_B = tokens_B > 0
    pauses_B = shape.pauses_in(tokens_B)
    read_B = jnp.where(fresh_B, 0, shape.memory)
    middle_B = (tokens_B if shape.close_calls else jnp.full_like(tokens_B, shape.n_ctx)) + pauses_B
    length_B = read_B + middle_B + shape.memory
    closed_B = any_B & (shape.close_calls | (filled_B + tokens_B == shape.n_ctx))
    begun_B = read_B + shape.place_of(filled_B - 1, pauses_B) + 1
    start_B = jnp.where(filled_B > 0, begun_B, 0)
    open_end_B = read_B + shape.place_of(filled_B + tokens_B - 1, pauses_B) + 1
    end_B = jnp.where(any_B, jnp.where(closed_B, length_B, open_end_B), 0)

    place_BT = start_B[:, None] + jnp.arange(slots, dtype=jnp.int32)
    present_BT = place_BT < end_B[:, None]
    inner_BT = place_BT - read_B[:, None]
    read_BT = inner_BT < 0
    write_BT = inner_BT >= middle_B[:, None]
    pause_number_BT = inner_BT // shape.stride
    pause_BT = (inner_BT % shape.stride == 0) & (pause_number_BT < pauses_B[:, None]) & ~read_BT & ~write_BT
    before_BT = jnp.minimum(-(-inner_BT // shape.stride), pauses_B[:, None])
    token_BT = inner_BT - before_BT - filled_B[:, None]
    row_BT = jnp.where(read_BT, place_BT, inner_BT - middle_B[:, None])
    nth_BC = filled_B[:, None] + jnp.arange(capacity, dtype=jnp.int32)
    out_BC = read_B[:, None] + shape.place_of(nth_BC, pauses_B[:, None]) - start_B[:, None]
    return Slots(
        place_BT=jnp.where(present_BT, place_BT, -1),
        start_B=None if from_start else start_B,
        end_B=end_B,
        tokens_B=tokens_B,
        length_B=length_B,
        fresh_B=fresh_B,
        closed_B=closed_B,
        read_BT=read_BT & present_BT,
        pause_BT=pause_BT & present_BT,
        write_BT=write_BT & present_BT,
        row_BT=jnp.clip(row_BT, 0, max(shape.memory - 1, 0)),
        token_BT=jnp.clip(token_BT, 0, capacity - 1),
        out_BC=jnp.clip(out_BC, 0, slots - 1),
        may_close=slots > shape.memory,
    )
