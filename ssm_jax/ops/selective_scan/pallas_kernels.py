"""The bodies of the TPU kernels of the selective scan: one program runs through the tokens of up to 1024 channels of one lane.

Two arrangements of the same numbers occur. Arrays of the caller lie in tiles: 8 tokens times 128 channels fill a register. The
recurrence wants one token times 8 groups of 128 channels. Tiles are stored into scratch with a stride of 8 rows, and loaded again
without: so rows 8 t to 8 t + 7 of a scratch array are token t. States lie alike, rows 8 n to 8 n + 7 are entry n.

Everything position-wise (step size, gate, skip, and their gradients) is computed on tiles, tokens being rows there. B and C are
spread over the lanes of a register, one row per token, and a token's row is loaded into all rows at once, which costs nothing.
exp(dt A) is 2^(dt A') with A' = A / ln 2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssm_jax.ops.tpu import LANES, SUBLANES

# JAX 0.12 has moved it.
reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal
TOGETHER = 16
"""State entries that are held in registers at once."""
PITCH = SUBLANES + 1
"""Rows from one token or entry to the next. With 8, a register's rows would lie in one bank, and be read in two halves."""


ROWS = 16
"""Tokens of a tile: of one register in bfloat16, of two in float32."""
COLUMNS = LANES // 3
"""Columns of B and C in one register, each in three parts."""


SMALL = 4.4e-4
"""Below it, e^3 / 3 is nothing beside e in float32."""


class Plan(NamedTuple):
    """What is known when a kernel is built.

    A chunk of ``chunk`` tokens takes up ``filled`` places, tiles of ``ROWS``; a program's step is ``chunks`` of them.
    """

    entries: int
    groups: int
    chunk: int
    filled: int
    chunks: int
    softplus: bool
    resets: bool
    masked: bool
    compiled: bool

    @property
    def columns(self) -> int:
        """Of B, C and the resets."""
        return 2 * self.entries + self.resets

    @property
    def places(self) -> int:
        return self.chunks * self.filled

    @property
    def entry_rows(self) -> int:
        """Rows of a state, and of sums per entry: entries filled up to whole registers."""
        return -(-self.entries // SUBLANES) * SUBLANES


class Tile(NamedTuple):
    """``ROWS`` tokens: where they lie in the arrays of the step, and in scratch arrays of one chunk."""

    index: Any
    at: Any
    present: Array | None


def forward_kernel(plan: Plan, refs: dict[str, Any]) -> None:
    """x, dt, z, bc, A, D, dt_bias, state -> y, states; ``last`` is the state all along."""
    state, length, step = refs["last"], refs["lengths"][pl.program_id(0)], pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = refs["state"][...]

    def chunk(k: Any, _: None) -> None:
        for first, col in _state_tiles(plan):
            count = min(SUBLANES, plan.entries - first)
            refs["states"][k, first : first + count, _lanes(col)] = state[_rows(first, col, count), :]

        def tile(i: Any, _: None) -> None:
            here = _tile(plan, length, step, k, i)
            _spread(plan, refs, here, 0)
            _discretise(plan, refs, here, 0)
            for entries in _entries_together(plan):
                _advance(plan, refs, state, entries)
            for col in range(plan.groups):
                y = _skip(plan, refs, here, col, _token_tile(plan, refs["y_scratch"], 0, col))
                if "z" in refs:
                    z = _load(refs["z"], here, col)
                    y = y * z * _sigmoid(plan, z)
                refs["y"][here.at, _lanes(col)] = y.astype(refs["y"].dtype)

        _loop(plan.filled // ROWS, tile)

    _loop(plan.chunks, chunk)


def _advance(plan: Plan, refs: dict[str, Any], state: Any, entries: range) -> None:
    """The recurrence of some state entries over one tile, their part of y added to that of those before."""
    A = [refs["A"][n] for n in entries]

    def token(s: Any, h: tuple[Array, ...]) -> tuple[Array, ...]:
        dt, u = (_token(plan, refs[name], s) for name in ("dt_scratch", "u_scratch"))
        kept = _kept(plan, refs, s)
        h = tuple(
            _decayed(dt, A_n, h_n, kept) + u * _map(plan, refs, n, s) for n, A_n, h_n in zip(entries, A, h, strict=True)
        )
        y = _sum([h_n * _map(plan, refs, plan.entries + n, s) for n, h_n in zip(entries, h, strict=True)])
        if entries.start:
            y += _token(plan, refs["y_scratch"], s)
        refs["y_scratch"][_token_rows(plan, s), :] = y
        return h

    h = tuple(state[_token_rows(plan, n), :] for n in entries)
    h = _tokens(plan, token, h)
    for n, h_n in zip(entries, h, strict=True):
        state[_token_rows(plan, n), :] = h_n


def backward_kernel(plan: Plan, refs: dict[str, Any]) -> None:
    """Chunks from the last to the first: their states again, then back through their tokens.

    x, dt, z, bc, A, D, dt_bias, states, d_y, d_last -> d_x, d_dt, d_z, d_A, d_bc, s, d_D, d_dt_bias; ``d_state`` is q all along.
    The notation is that of ``xla``: p_t is the decayed state before the token's own input, q_t what later tokens pass back.
    """

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        refs["d_state"][...] = refs["d_last"][...]
        for name in {"d_A", "d_D", "d_dt_bias"} & refs.keys():
            refs[name][...] = jnp.zeros_like(refs[name])

    length, step = refs["lengths"][pl.program_id(0)], pl.num_programs(2) - 1 - pl.program_id(2)
    tiles = plan.filled // ROWS

    def chunk(k: Any, _: None) -> None:
        k = plan.chunks - 1 - k
        for first, col in _state_tiles(plan):
            count = min(SUBLANES, plan.entries - first)
            refs["h"][_rows(first, col, count), :] = refs["states"][k, first : first + count, _lanes(col)]

        def again(i: Any, _: None) -> None:
            here = _tile(plan, length, step, k, i)
            _spread(plan, refs, here, i)
            _discretise(plan, refs, here, i)
            for entries in _entries_together(plan):
                _states_again(plan, refs, i, entries)
            _through_gate(plan, refs, here, i)

        def back(i: Any, _: None) -> None:
            i = tiles - 1 - i
            here = _tile(plan, length, step, k, i)
            for entries in _entries_together(plan):
                _token_gradients(plan, refs, k, i, entries)
            _through_step_size(plan, refs, here, i)

        _loop(tiles, again)
        _loop(tiles, back)

    _loop(plan.chunks, chunk)


def _states_again(plan: Plan, refs: dict[str, Any], i: Any, entries: range) -> None:
    """p of one tile into scratch, and y where the gate asks for it."""
    A = [refs["A"][n] for n in entries]

    def token(s: Any, h: tuple[Array, ...]) -> tuple[Array, ...]:
        t = i * ROWS + s
        dt, u = (_token(plan, refs[name], t) for name in ("dt_scratch", "u_scratch"))
        kept = _kept(plan, refs, s, i)
        p = [_decayed(dt, A_n, h_n, kept) for A_n, h_n in zip(A, h, strict=True)]
        for n, p_n in zip(entries, p, strict=True):
            refs["p"][t * plan.entries + n] = p_n
        h = tuple(p_n + u * _map(plan, refs, n, s, i) for n, p_n in zip(entries, p, strict=True))
        if "z" in refs:
            y = _sum([h_n * _map(plan, refs, plan.entries + n, s, i) for n, h_n in zip(entries, h, strict=True)])
            if entries.start:
                y += _token(plan, refs["y_scratch"], s)
            refs["y_scratch"][_token_rows(plan, s), :] = y
        return h

    h = tuple(refs["h"][_token_rows(plan, n), :] for n in entries)
    h = _tokens(plan, token, h)
    for n, h_n in zip(entries, h, strict=True):
        refs["h"][_token_rows(plan, n), :] = h_n


def _through_gate(plan: Plan, refs: dict[str, Any], here: Tile, i: Any) -> None:
    """d_z, d_D, and the gradient of the recurrence's y; also s, the sum over channels of dy u, but for its 128 lanes."""
    s = jnp.zeros((ROWS, LANES), jnp.float32)
    for col in range(plan.groups):
        d_y = _load(refs["d_y"], here, col)
        if "z" in refs:
            z = _load(refs["z"], here, col)
            gate = _sigmoid(plan, z)
            y = _skip(plan, refs, here, col, _token_tile(plan, refs["y_scratch"], 0, col))
            d_z = d_y * y * (gate * (1 + z * (1 - gate)))
            refs["d_z"][here.at, _lanes(col)] = d_z.astype(refs["d_z"].dtype)
            d_y = d_y * (z * gate)
        if "D" in refs:
            _accumulate(plan, refs["d_D"], col, d_y * _load(refs["x"], here, col))
        s = s + d_y * _token_tile(plan, refs["u_scratch"], i, col)
        _store_tokens(plan, refs["dy_scratch"], i, col, d_y)
    refs["s"][here.at, :] = s


def _token_gradients(plan: Plan, refs: dict[str, Any], k: Any, i: Any, entries: range) -> None:
    """Back through the recurrence of some entries over one tile.

    What is summed over channels is stored entry by entry and loaded again group by group: then an entry is a row, the sum over
    groups one of whole registers, and that over 128 lanes one instruction for 8 entries.
    """
    A = [refs["A"][n] for n in entries]
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, refs["d_bc"].shape[2]), 1)
    q_ref, count = refs["d_state"], len(entries)

    def token(s: Any, carry: tuple[tuple[Array, ...], tuple[Array, ...]]) -> Any:
        q, d_A = carry
        s = ROWS - 1 - s
        t = i * ROWS + s
        dt, u, d_y = (_token(plan, refs[name], t) for name in ("dt_scratch", "u_scratch", "dy_scratch"))
        kept = _kept(plan, refs, s, i)
        p = [refs["p"][t * plan.entries + n] for n in entries]
        g = [q_n + d_y * _map(plan, refs, plan.entries + n, s, i) for n, q_n in zip(entries, q, strict=True)]
        gp = [g_n * p_n for g_n, p_n in zip(g, p, strict=True)]
        d_dt = _sum([gp_n * A_n for gp_n, A_n in zip(gp, A, strict=True)])
        d_u = _sum([g_n * _map(plan, refs, n, s, i) for n, g_n in zip(entries, g, strict=True)])
        if entries.start:
            d_dt += _token(plan, refs["d_dt_scratch"], t)
            d_u += _token(plan, refs["d_u_scratch"], t)
        refs["d_dt_scratch"][_token_rows(plan, t), :] = d_dt
        refs["d_u_scratch"][_token_rows(plan, t), :] = d_u
        for n in range(count):
            refs["products"][_token_rows(plan, 2 * TOGETHER * s + n), :] = g[n] * u
            refs["products"][_token_rows(plan, 2 * TOGETHER * s + TOGETHER + n), :] = p[n] * d_y
        for half, first_row in enumerate((0, plan.entry_rows)):
            for first in range(0, count, SUBLANES):
                start = (2 * s + half) * TOGETHER + first
                total = _sum([refs["products"][_rows(start, col, SUBLANES), :] for col in range(plan.groups)])
                total = jnp.sum(total, axis=1, keepdims=True)
                at = (k, pl.ds(first_row + entries.start + first, SUBLANES), slice(None))
                refs["d_bc"][at] = jnp.where(lane == t, total, refs["d_bc"][at])
        q = tuple(_decayed(dt, A_n, g_n, kept) for A_n, g_n in zip(A, g, strict=True))
        return q, tuple(d_A_n + dt * gp_n for d_A_n, gp_n in zip(d_A, gp, strict=True))

    q = tuple(q_ref[_token_rows(plan, n), :] for n in entries)
    d_A = tuple(refs["d_A"][n] for n in entries)
    q, d_A = _tokens(plan, token, (q, d_A))
    for n, q_n, d_A_n in zip(entries, q, d_A, strict=True):
        q_ref[_token_rows(plan, n), :] = q_n
        refs["d_A"][n] = d_A_n


def _through_step_size(plan: Plan, refs: dict[str, Any], here: Tile, i: Any) -> None:
    """d_x, d_dt and d_dt_bias."""
    for col in range(plan.groups):
        x = _load(refs["x"], here, col)
        dt, d_dt, d_u, d_y = (
            _token_tile(plan, refs[name], i, col)
            for name in ("dt_scratch", "d_dt_scratch", "d_u_scratch", "dy_scratch")
        )
        d_x = d_u * dt
        if "D" in refs:
            d_x += refs["D"][:, _lanes(col)] * d_y
        refs["d_x"][here.at, _lanes(col)] = d_x.astype(refs["d_x"].dtype)
        d_dt = d_dt * math.log(2) + d_u * x
        if plan.softplus:
            d_dt *= _sigmoid(plan, _raw_step_size(plan, refs, here, col))
        d_dt = _where_present(here, d_dt)
        if "dt_bias" in refs:
            _accumulate(plan, refs["d_dt_bias"], col, d_dt)
        refs["d_dt"][here.at, _lanes(col)] = d_dt.astype(refs["d_dt"].dtype)


def _discretise(plan: Plan, refs: dict[str, Any], here: Tile, i: Any) -> None:
    """Step sizes and dt x of a tile, token by token into scratch. Both are 0 at absent tokens."""
    for col in range(plan.groups):
        dt = _raw_step_size(plan, refs, here, col)
        if plan.softplus:
            dt = _softplus(dt)
        dt = _where_present(here, dt)
        _store_tokens(plan, refs["dt_scratch"], i, col, dt)
        _store_tokens(plan, refs["u_scratch"], i, col, dt * _load(refs["x"], here, col))


def _softplus(x: Array) -> Array:
    """max(x, 0) + log(1 + e^-|x|), by a parabola where 1 + e would lose digits: what the compiler's log1p does."""
    e = jnp.exp2(jnp.abs(x) * (-1 / math.log(2)))
    return jnp.maximum(x, 0) + jnp.where(e < SMALL, (1 - 0.5 * e) * e, jnp.log(1 + e))


def _sigmoid(plan: Plan, x: Array) -> Array:
    """1 / (1 + e^-x) with one Newton step after the processor's estimate: a denominator between 1 and 2^115 needs no other care."""
    denominator = 1 + jnp.exp2(jnp.minimum(x * (-1 / math.log(2)), 115.0))
    estimate = reciprocal(denominator, approx=plan.compiled)
    return estimate + estimate * (1 - denominator * estimate)


def _raw_step_size(plan: Plan, refs: dict[str, Any], here: Tile, col: int) -> Array:
    dt = _load(refs["dt"], here, col)
    return dt + refs["dt_bias"][:, _lanes(col)] if "dt_bias" in refs else dt


def _skip(plan: Plan, refs: dict[str, Any], here: Tile, col: int, y: Array) -> Array:
    return y + refs["D"][:, _lanes(col)] * _load(refs["x"], here, col) if "D" in refs else y


def _spread(plan: Plan, refs: dict[str, Any], here: Tile, i: Any) -> None:
    """Every column of B, C and (where given) the resets over a register's lanes.

    A column alone, other columns masked out, times a matrix of ones: its three parts are added up without rounding, in every lane.
    """
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)
    for first in range(0, plan.columns, COLUMNS):
        columns = range(min(COLUMNS, plan.columns - first))
        bits = pltpu.bitcast(refs["bc"][here.at, _lanes(first // COLUMNS)], jnp.int32)
        alone = jnp.concatenate([bits & refs["masks"][n : n + 1, :] for n in columns], axis=0)
        spread = jnp.dot(pltpu.bitcast(alone, jnp.bfloat16), ones, preferred_element_type=jnp.float32)
        for n in columns:
            refs["bc_scratch"][i * plan.columns + first + n] = spread[n * ROWS : (n + 1) * ROWS]
    if plan.resets:
        starts = refs["bc_scratch"][i * plan.columns + 2 * plan.entries]
        refs["kept_scratch"][i] = jnp.where(starts > 0, 0, -1)


def _map(plan: Plan, refs: dict[str, Any], n: int, s: Any, i: Any = 0) -> Array:
    """Entry n of B (or entries + n: of C) of token s of tile i, in all rows."""
    row = refs["bc_scratch"][i * plan.columns + n, pl.ds(s, 1), :]
    return jnp.broadcast_to(row, (plan.groups, LANES))


def _kept(plan: Plan, refs: dict[str, Any], s: Any, i: Any = 0) -> Array | None:
    """Bits of a number that a token of a tile takes over from the token before: all, or none at the start of a document."""
    if not plan.resets:
        return None
    return jnp.broadcast_to(refs["kept_scratch"][i, pl.ds(s, 1), :], (plan.groups, LANES))


def _decayed(dt: Array, A: Array, h: Array, kept: Array | None) -> Array:
    h = jnp.exp2(dt * A) * h
    if kept is None:
        return h
    # Exactly 0 whatever h is, NaN too, without the few registers that hold conditions.
    return lax.bitcast_convert_type(lax.bitcast_convert_type(h, jnp.int32) & kept, jnp.float32)


def _tile(plan: Plan, length: Any, step: Any, k: Any, i: Any) -> Tile:
    at = pl.ds(_multiple(k * plan.filled + i * ROWS, ROWS), ROWS)
    if not plan.masked:
        return Tile(i, at, None)
    there = jnp.minimum(length - (step * plan.chunks + k) * plan.chunk, plan.chunk)
    return Tile(i, at, i * ROWS + lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0) < there)


def _where_present(here: Tile, v: Array) -> Array:
    return v if here.present is None else jnp.where(here.present, v, 0.0)


def _load(ref: Any, here: Tile, col: int) -> Array:
    """One group of a tile, 0 where tokens are absent, whatever stands there."""
    return _where_present(here, ref[here.at, _lanes(col)].astype(jnp.float32))


def _accumulate(plan: Plan, ref: Any, col: int, v: Array) -> None:
    """Adds up tokens, but for the last 8 rows."""
    parts = [v[first : first + SUBLANES] for first in range(0, ROWS, SUBLANES)]
    ref[:, _lanes(col)] += _sum(parts)


def _store_tokens(plan: Plan, scratch: Any, i: Any, col: int, v: Array) -> None:
    for first in range(0, ROWS, SUBLANES):
        scratch[_rows(i * ROWS + first, col, SUBLANES), :] = v[first : first + SUBLANES]


def _token_tile(plan: Plan, scratch: Any, i: Any, col: int) -> Array:
    firsts = range(0, ROWS, SUBLANES)
    parts = [scratch[_rows(i * ROWS + first, col, SUBLANES), :] for first in firsts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _token(plan: Plan, scratch: Any, t: Any) -> Array:
    return scratch[_token_rows(plan, t), :]


def _token_rows(plan: Plan, t: Any) -> Any:
    """All groups of one token, or of one state entry."""
    return pl.ds(t * PITCH, plan.groups)


def _multiple(of: Any, size: int) -> Any:
    return of if isinstance(of, int) else pl.multiple_of(of, size)


def _rows(first: Any, col: int, count: int) -> Any:
    """One group of ``count`` tokens or state entries."""
    return pl.ds(first * PITCH + col, count, stride=PITCH)


def _state_tiles(plan: Plan) -> list[tuple[int, int]]:
    return [(first, col) for first in range(0, plan.entries, SUBLANES) for col in range(plan.groups)]


def _entries_together(plan: Plan) -> list[range]:
    return [range(first, min(first + TOGETHER, plan.entries)) for first in range(0, plan.entries, TOGETHER)]


def _lanes(col: int) -> slice:
    return slice(col * LANES, (col + 1) * LANES)


def _sum(terms: Sequence[Array]) -> Array:
    """In pairs: the terms wait for each other less than in a row."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


def _loop(count: int, body: Callable[[Any, None], None]) -> None:
    """``body`` for 0, 1, ..., count - 1."""
    if count == 1:
        body(0, None)
    else:
        lax.fori_loop(0, count, lambda i, carry: body(i, carry), None)


def _tokens(plan: Plan, token: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``token`` for every token of a tile, one after the other: in one piece of code where it is compiled for a TPU."""
    return lax.fori_loop(0, ROWS, token, carry, unroll=plan.compiled)
