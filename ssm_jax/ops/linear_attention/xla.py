"""Linear attention in plain JAX, in chunks.

Inside a chunk y is masked attention, and the chunk adds one N x P update to the state; a pass over the chunks turns the updates
into the states that enter them (Dao & Gu 2024, arXiv:2405.21060, section 6). Work and memory are linear in the length: with
chunks of T tokens, L T scores and L/T states per head.

The backward pass keeps the inputs alone. The states are cheaper to compute again than to store: they are N/T times as large
as v. With W_ts = dy_t . v_s gain_s (q_t . k_s) decay_ts, the gradient of a log decay is the sum of everything that it scaled,

    sum_{t >= r > s} W_ts  (pairs across r)  +  what the entering state gave to tokens from r on  +  what tokens before r gave,
    and the entering state, to the leaving one,

where the pairs across r come from the row and column sums of one and the same W, so that rounded matmuls cannot make them differ.

What makes it fast on a CPU, where it was measured, besides large matmuls: sums over a product are written as einsums (a fused
multiply and reduce is ten times slower there); cumulative sums are products with a triangular matrix (so that they are not
computed again in every loop that uses them); what the states touch has the chunk axis first, so that no copy precedes the pass.

Axes in this file: B lane, M chunk, T and S token of a chunk, G group, R head of a group, N key, P value, X = R * P.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class _Chunks(NamedTuple):
    """The inputs cut into chunks, and every decay in them. ``later_BMTS``: s >= t, of one document. BM may be 1, 1."""

    q_BMGTN: Array
    k_BMGTN: Array
    v_BMGTRP: Array
    gain_BMGTR: Array
    pair_BMGRTS: Array
    entry_BMGTR: Array
    exit_BMGTR: Array
    later_BMTS: Array


def forward(
    q_BLGN: Array,
    k_BLGN: Array,
    v_BLHP: Array,
    gain_BLH: Array | None,
    log_decay: Array,
    state_BHNP: Array,
    reset_BL: Array | None,
    scale_BLH: Array | None,
    skip_H: Array | None,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """y_BLHP and the last state_BHNP."""
    gain_BLH, log_decay_BLH = _per_token(gain_BLH, log_decay, v_BLHP)
    chunks = _cut(q_BLGN, k_BLGN, v_BLHP, gain_BLH, log_decay_BLH, reset_BL, chunk_size, state_BHNP.dtype)
    q_MBGTN, k_MBGTN = _chunk_first(chunks.q_BMGTN), _chunk_first(chunks.k_BMGTN)
    decay_MBGR = _chunk_first(chunks.entry_BMGTR[..., -1, :])
    update_MBGNX = jnp.einsum("mbgtn,mbgtx->mbgnx", k_MBGTN, _to_exit(chunks))
    entering_MBGNX, last_BGNX = _pass_states(decay_MBGR, update_MBGNX, _pack_state(state_BHNP, chunks))

    scores_BMGTS = jnp.einsum("bmgtn,bmgsn->bmgts", chunks.q_BMGTN, chunks.k_BMGTN)
    values_BMGRTP = jnp.swapaxes(chunks.v_BMGTRP * chunks.gain_BMGTR[..., None], 3, 4)
    inner_BMGRTP = jnp.einsum("bmgrts,bmgrsp->bmgrtp", scores_BMGTS[:, :, :, None] * chunks.pair_BMGRTS, values_BMGRTP)
    outer_MBGTX = jnp.einsum("mbgtn,mbgnx->mbgtx", q_MBGTN, entering_MBGNX)
    outer_BMGTRP = _chunk_first(outer_MBGTX).reshape(chunks.v_BMGTRP.shape)
    y_BMGTRP = outer_BMGTRP * chunks.entry_BMGTR[..., None] + jnp.swapaxes(inner_BMGRTP, 3, 4)
    y_BLHP = _join(y_BMGTRP, v_BLHP)
    if scale_BLH is not None:
        y_BLHP = y_BLHP * scale_BLH[..., None]
    if skip_H is not None:
        y_BLHP = y_BLHP + skip_H[:, None] * v_BLHP
    return y_BLHP.astype(v_BLHP.dtype), _unpack_state(last_BGNX, state_BHNP)


def backward(
    q_BLGN: Array,
    k_BLGN: Array,
    v_BLHP: Array,
    gain_BLH: Array | None,
    log_decay: Array,
    state_BHNP: Array,
    reset_BL: Array | None,
    scale_BLH: Array | None,
    skip_H: Array | None,
    dy_BLHP: Array,
    dlast_BHNP: Array,
    *,
    chunk_size: int,
) -> tuple[Any, ...]:
    """Gradients of q, k, v, the gains, the log decays, the state and the skip."""
    gain_BLH, log_decay_BLH = _per_token(gain_BLH, log_decay, v_BLHP)
    dy_BLHP = dy_BLHP.astype(state_BHNP.dtype)
    dv_skipped, dskip_H = jnp.zeros((), v_BLHP.dtype), None
    if skip_H is not None:
        dskip_H = _reduce("blhp,blhp->h", dy_BLHP, v_BLHP.astype(dy_BLHP.dtype)).astype(skip_H.dtype)
        dv_skipped = skip_H[:, None] * dy_BLHP
    if scale_BLH is not None:
        dy_BLHP = dy_BLHP * scale_BLH[..., None]
    chunks = _cut(q_BLGN, k_BLGN, v_BLHP, gain_BLH, log_decay_BLH, reset_BL, chunk_size, state_BHNP.dtype)
    q, k, v, gain, pair, entry, exit_, later = chunks
    dy_BMGTRP = _group(_split(dy_BLHP, *v.shape[1:4:2]), v.shape[2])

    # The states again, and the gradients of the states that leave the chunks, from the last chunk to the first.
    q_MBGTN, k_MBGTN = _chunk_first(q), _chunk_first(k)
    decay_MBGR = _chunk_first(entry[..., -1, :])
    to_exit_MBGTX = _to_exit(chunks)
    from_entry_MBGTX = _chunk_first(_flat(dy_BMGTRP * entry[..., None]))
    update_MBGNX = jnp.einsum("mbgtn,mbgtx->mbgnx", k_MBGTN, to_exit_MBGTX)
    dupdate_MBGNX = jnp.einsum("mbgtn,mbgtx->mbgnx", q_MBGTN, from_entry_MBGTX)
    entering_MBGNX, _ = _pass_states(decay_MBGR, update_MBGNX, _pack_state(state_BHNP, chunks))
    dleaving_MBGNX, dstate_BGNX = _pass_states(decay_MBGR, dupdate_MBGNX, _pack_state(dlast_BHNP, chunks), reverse=True)

    # Between the tokens of a chunk.
    values_BMGRSP = jnp.swapaxes(v * gain[..., None], 3, 4)
    dy_BMGRTP = jnp.swapaxes(dy_BMGTRP, 3, 4)
    weights_BMGRTS = jnp.einsum("bmgtn,bmgsn->bmgts", q, k)[:, :, :, None] * pair
    dweights_BMGRTS = jnp.einsum("bmgrtp,bmgrsp->bmgrts", dy_BMGRTP, values_BMGRSP)
    dscores_BMGTS = _reduce("bmgrts,bmgrts->bmgts", dweights_BMGRTS, pair)
    dinner_BMGRSP = jnp.einsum("bmgrts,bmgrtp->bmgrsp", weights_BMGRTS, dy_BMGRTP)
    rows_BMGRT = _reduce("bmgrts,bmgrts->bmgrt", dweights_BMGRTS, weights_BMGRTS)
    columns_BMGRS = _reduce("bmgrts,bmgrts->bmgrs", dweights_BMGRTS, weights_BMGRTS)

    # Between the tokens and the states at the ends of their chunk.
    read_BMGTRP = _chunk_first(jnp.einsum("mbgtn,mbgnx->mbgtx", q_MBGTN, entering_MBGNX)).reshape(v.shape)
    dwrite_BMGTRP = _chunk_first(jnp.einsum("mbgtn,mbgnx->mbgtx", k_MBGTN, dleaving_MBGNX)).reshape(v.shape)
    read_BMGTR = _reduce("bmgtrp,bmgtrp->bmgtr", read_BMGTRP, dy_BMGTRP) * entry
    written_BMGTR = _reduce("bmgtrp,bmgtrp->bmgtr", dwrite_BMGTRP, v) * exit_ * gain
    kept_BMGR = _chunk_first(_reduce("mbgnrp,mbgnrp->mbgr", *(_heads(x, v) for x in (dleaving_MBGNX, entering_MBGNX))))

    dq = _chunk_first(jnp.einsum("mbgtx,mbgnx->mbgtn", from_entry_MBGTX, entering_MBGNX))
    dk = _chunk_first(jnp.einsum("mbgtx,mbgnx->mbgtn", to_exit_MBGTX, dleaving_MBGNX))
    dq += jnp.einsum("bmgts,bmgsn->bmgtn", dscores_BMGTS, k)
    dk += jnp.einsum("bmgts,bmgtn->bmgsn", dscores_BMGTS, q)
    dvalues_BMGTRP = dwrite_BMGTRP * exit_[..., None] + jnp.swapaxes(dinner_BMGRSP, 3, 4)
    dgain_BMGTR = _reduce("bmgtrp,bmgtrp->bmgtr", v, dvalues_BMGTRP)

    across_BMGTR = _sum_over(later, jnp.swapaxes(rows_BMGRT - columns_BMGRS, 3, 4) + read_BMGTR)
    before_TS = np.tri(v.shape[3], k=-1)
    into_exit_BMGTR = _sum_over(before_TS, written_BMGTR) + (kept_BMGR * entry[..., -1, :])[..., None, :]

    return (
        _join(dq, q_BLGN).astype(q_BLGN.dtype),
        _join(dk, k_BLGN).astype(k_BLGN.dtype),
        (_join(dvalues_BMGTRP * gain[..., None], v_BLHP) + dv_skipped).astype(v_BLHP.dtype),
        _join(dgain_BMGTR, gain_BLH).astype(gain_BLH.dtype),
        _join(across_BMGTR + into_exit_BMGTR, log_decay_BLH).astype(log_decay_BLH.dtype),
        _unpack_state(dstate_BGNX, state_BHNP),
        dskip_H,
    )


def _per_token(gain_BLH: Array | None, log_decay: Array, v_BLHP: Array) -> tuple[Array, Array]:
    shape = v_BLHP.shape[:3]
    gain_BLH = jnp.ones(shape, log_decay.dtype) if gain_BLH is None else gain_BLH
    return gain_BLH, jnp.broadcast_to(log_decay, shape)


def _cut(
    q: Array,
    k: Array,
    v: Array,
    gain: Array,
    log_decay: Array,
    reset: Array | None,
    chunk_size: int,
    dtype: jax.typing.DTypeLike,
) -> _Chunks:
    length, groups = q.shape[1:3]
    chunks = -(-length // chunk_size)
    tokens = -(-length // chunks)
    tokens = min(chunk_size, -(-tokens // 8) * 8)
    cut = functools.partial(_split, chunks=chunks, tokens=tokens)
    q, k, v, gain, log_decay = (cut(x.astype(dtype)) for x in (q, k, v, gain, log_decay))
    v, gain, log_decay = (_group(x, groups) for x in (v, gain, log_decay))

    later = jnp.asarray(np.tri(tokens, dtype=bool).T)[None, None]
    if reset is None:
        pair, entry, exit_ = _decays(log_decay, jnp.swapaxes(later, 2, 3))
    else:
        document = _sum_over(np.tri(tokens), cut(reset.astype(dtype))[..., None])[..., 0]
        later = later & (document[..., :, None] == document[..., None, :])
        pair, entry, exit_ = _decays(log_decay, jnp.swapaxes(later, 2, 3))
        entry *= (document == 0)[:, :, None, :, None]
        exit_ *= (document == document[..., -1:])[:, :, None, :, None]
    return _Chunks(jnp.swapaxes(q, 2, 3), jnp.swapaxes(k, 2, 3), v, gain, pair, entry, exit_, later)


def _decays(log_decay_BMGTR: Array, earlier_BMTS: Array) -> tuple[Array, Array, Array]:
    """exp of the sums of log decays from token s to t, up to and including t, and after t.

    A difference of two cumulative sums loses what is small in it when the sums are large, and a sum of many equal numbers is
    rounded the same way at every step. So the sums are taken of multiples of 2^-6 and of 2^-20, which are exact, and of the
    tiny rest. exp(-128) is 0, so nothing below needs to be represented.
    """
    rest = jnp.maximum(log_decay_BMGTR, -128.0)
    parts = []
    for steps in (2.0**6, 2.0**20):
        parts.append(jnp.round(rest * steps) / steps)
        rest = rest - parts[-1]
    sums = [_sum_over(np.tri(rest.shape[3]), x) for x in (*parts, rest)]
    entry_BMGTR = jnp.exp(_total(sums))
    exit_BMGTR = jnp.exp(_total(x[..., -1:, :] - x for x in sums))
    rows = [jnp.swapaxes(x, 3, 4) for x in sums]
    between_BMGRTS = _total(x[..., :, None] - x[..., None, :] for x in rows)
    pair_BMGRTS = jnp.exp(jnp.where(earlier_BMTS[:, :, None, None], between_BMGRTS, -jnp.inf))
    return pair_BMGRTS, entry_BMGTR, exit_BMGTR


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def _pass_states(
    decay_MBGR: Array, update_MBGNX: Array, first_BGNX: Array, *, reverse: bool = False
) -> tuple[Array, Array]:
    """The states that enter the chunks, and the one after all: state <- decay * state + update."""
    chunks = len(update_MBGNX)
    first, last = (chunks - 1, 0) if reverse else (0, chunks - 1)
    step = -1 if reverse else 1

    def after(states: Array, m: Array | int, update: Array) -> Array:
        state, decay = (lax.dynamic_index_in_dim(x, m, 0, keepdims=False) for x in (states, decay_MBGR))
        state_BGNRP = state.reshape(*state.shape[:3], decay.shape[-1], -1)
        return (state_BGNRP * decay[:, :, None, :, None]).reshape(state.shape) + update

    def pass_one(i: Array, states: Array) -> Array:
        m = first + step * i
        update = lax.dynamic_index_in_dim(states, m, 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(states, after(states, m - step, update), m, 0)

    parts = [update_MBGNX[1:], first_BGNX[None]] if reverse else [first_BGNX[None], update_MBGNX[:-1]]
    states_MBGNX = lax.fori_loop(1, chunks, pass_one, jnp.concatenate(parts))
    return states_MBGNX, after(states_MBGNX, last, update_MBGNX[last])


def _to_exit(chunks: _Chunks) -> Array:
    """What each token adds to the state that leaves its chunk, before it is multiplied by its key."""
    return _chunk_first(_flat(chunks.v_BMGTRP * (chunks.exit_BMGTR * chunks.gain_BMGTR)[..., None]))


_reduce = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
"""Sums over products, not matmuls: float32 everywhere."""


def _sum_over(mask_TS: Array | np.ndarray, x_BMSR: Array) -> Array:
    """sum_s mask_ts x_s over the third axis from the end but one, exactly as in float32."""
    if mask_TS.ndim == 4:
        mask_TS = mask_TS[:, :, None]
    return jnp.matmul(jnp.asarray(mask_TS, x_BMSR.dtype), x_BMSR, precision=lax.Precision.HIGHEST)


def _split(x: Array, chunks: int, tokens: int) -> Array:
    """[B, L, ...] -> [B, M, T, ...]. The last chunk is filled up with zeros: gain 0, decay 1."""
    missing = chunks * tokens - x.shape[1]
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], chunks, tokens, *x.shape[2:])


def _group(x: Array, groups: int) -> Array:
    """[B, M, T, H, ...] -> [B, M, G, T, R, ...]."""
    return jnp.swapaxes(x.reshape(*x.shape[:3], groups, x.shape[3] // groups, *x.shape[4:]), 2, 3)


def _join(x: Array, like: Array) -> Array:
    """[B, M, G, T, ...] -> [B, L, ...], as ``like``."""
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(x.shape[0], -1, *like.shape[2:])[:, : like.shape[1]]


def _pack_state(x_BHNP: Array, chunks: _Chunks) -> Array:
    lanes, _, keys, _ = x_BHNP.shape
    groups, heads, width = (chunks.v_BMGTRP.shape[i] for i in (2, 4, 5))
    return jnp.swapaxes(x_BHNP.reshape(lanes, groups, heads, keys, width), 2, 3).reshape(lanes, groups, keys, -1)


def _unpack_state(x_BGNX: Array, like_BHNP: Array) -> Array:
    x_BGNRP = x_BGNX.reshape(*x_BGNX.shape[:3], -1, like_BHNP.shape[-1])
    return jnp.swapaxes(x_BGNRP, 2, 3).reshape(like_BHNP.shape)


def _heads(x_MBGNX: Array, v_BMGTRP: Array) -> Array:
    return x_MBGNX.reshape(*x_MBGNX.shape[:4], *v_BMGTRP.shape[4:])


def _chunk_first(x: Array) -> Array:
    return jnp.swapaxes(x, 0, 1)


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)
