"""Linear attention with scalar decays for NVIDIA GPUs, in Triton: chunks in sequence, the state in registers.

    S_t = exp(log_decay_t) S_{t-1} + gain_t k_t v_t^T;   y_t = scale_t q_t^T S_t + skip v_t

A program (i, h, b S + s) runs values [i BV, (i + 1) BV) of head h of lane b through segment s, in one pass per direction. Inside a
chunk of C tokens, with G the running sum of the log decays,

    y = ((q k^T) * M) v + E q S,   S' = exp(G_C) S + (exp(G_C - G) gain k)^T v
    M_ij = scale_i exp(G_i - G_j) gain_j for j <= i,   E = scale exp(G)

All exponents are at most 0. Matrix products take operands of the inputs' type; sums, states and decays are float32. What is a sum
over values (gradients of q and k, of gains and decays) comes out in parts, one per i, to be added up.

Axes: N keys in KT tiles of BK, P values, L tokens, H heads, G groups of heads, S segments of SEGMENT chunks. Arrays: q, k [lanes,
L, G, N]; v, y [lanes, L, H, P]; gain, log_decay [lanes, L, H] (CONSTANT: [1 or lanes, H]); states [lanes, H, N, P].
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _dot(a, b, to, PRECISION: tl.constexpr):
    """a b + to. Triton's interpreter cannot multiply bfloat16."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=to, input_precision="ieee")
    else:
        return tl.dot(a, b, acc=to, input_precision=PRECISION)


@triton.jit
@no_type_check
def _rows(array, c, x, L: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns x of the tokens of chunk c; zeros beyond the end, unless everything is EVEN: whole chunks and whole tiles."""
    i = tl.arange(0, C)
    there = array + tl.cast(c, tl.int64) * C * STRIDE + (i[:, None] * STRIDE + x[None, :])
    if EVEN:
        return tl.load(there)
    else:
        return tl.load(there, mask=(c * C + i[:, None] < L) & (x[None, :] < WIDTH), other=0.0)


@triton.jit
@no_type_check
def _store_rows(
    array, c, x, L: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, rows
):
    i = tl.arange(0, C)
    there = array + tl.cast(c, tl.int64) * C * STRIDE + (i[:, None] * STRIDE + x[None, :])
    rows = rows.to(array.dtype.element_ty)
    if EVEN:
        tl.store(there, rows)
    else:
        tl.store(there, rows, mask=(c * C + i[:, None] < L) & (x[None, :] < WIDTH))


@triton.jit
@no_type_check
def _per_token(array, c, H: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(array + tl.cast(c, tl.int64) * C * H + i * H, mask=c * C + i < L, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _store_per_token(array, c, H: tl.constexpr, L: tl.constexpr, C: tl.constexpr, x):
    i = tl.arange(0, C)
    tl.store(array + tl.cast(c, tl.int64) * C * H + i * H, x, mask=c * C + i < L)


@triton.jit
@no_type_check
def _state(array, n0, p, N: tl.constexpr, P: tl.constexpr, BK: tl.constexpr):
    n = n0 + tl.arange(0, BK)
    return tl.load(array + n[:, None] * P + p[None, :], mask=(n[:, None] < N) & (p[None, :] < P), other=0.0)


@triton.jit
@no_type_check
def _store_state(array, n0, p, N: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, tile):
    n = n0 + tl.arange(0, BK)
    tl.store(array + n[:, None] * P + p[None, :], tile, mask=(n[:, None] < N) & (p[None, :] < P))


@triton.jit
@no_type_check
def _rate(log_decay, CONSTANT: tl.constexpr):
    """The one log decay (of base 2) of a head, where it has one."""
    rate = 0.0
    if CONSTANT:
        rate = tl.load(log_decay).to(tl.float32) * LOG2E
    return rate


@triton.jit
@no_type_check
def _decays(
    rate, log_decay, reset, scale, c, H: tl.constexpr, L: tl.constexpr, C: tl.constexpr, CONSTANT: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """exp of the sums of log decays: between the tokens of a chunk, up to and including each one, after each one, and of the whole.
    The first two, which make up y, with the scale of y.

    Sums are taken of multiples of 2^-6, which are exact, and of the rest: differences of plain running sums would lose the small
    decays that follow large ones. Log decays below -160 (of base 2) are zeros in float32 anyway. Behind a document start, and for
    pairs across one, decays are exactly zero.
    """
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    if CONSTANT:
        between = (i[:, None] - i[None, :]).to(tl.float32) * rate
        entry = tl.exp2((i + 1).to(tl.float32) * rate)
        count = tl.minimum(L - c * C, C)
        leave = tl.exp2(tl.maximum(count - 1 - i, 0).to(tl.float32) * rate)
        whole = tl.exp2(count.to(tl.float32) * rate)
    else:
        rates = tl.maximum(_per_token(log_decay, c, H, L, C) * LOG2E, -160.0)
        coarse = tl.floor(rates * 64.0) * 0.015625
        fine = rates - coarse
        coarse_sum, fine_sum = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
        coarse_all, fine_all = tl.sum(coarse, 0), tl.sum(fine, 0)
        between = (coarse_sum[:, None] - coarse_sum[None, :]) + (fine_sum[:, None] - fine_sum[None, :])
        entry = tl.exp2(coarse_sum + fine_sum)
        leave = tl.exp2((coarse_all - coarse_sum) + (fine_all - fine_sum))
        whole = tl.exp2(coarse_all + fine_all)
    pair = tl.where(seen, tl.exp2(tl.where(seen, between, 0.0)), 0.0)
    if HAS_RESET:
        starts = tl.load(reset + c * C + i, mask=c * C + i < L, other=0).to(tl.int32)
        document, documents = tl.cumsum(starts, 0), tl.sum(starts, 0)
        pair = tl.where(document[:, None] == document[None, :], pair, 0.0)
        entry = tl.where(document == 0, entry, 0.0)
        leave = tl.where(document == documents, leave, 0.0)
        whole = tl.where(documents == 0, whole, 0.0)
    if HAS_SCALE:
        scales = _per_token(scale, c, H, L, C)
        pair, entry = pair * scales[:, None], entry * scales
    return pair, entry, leave, whole


@triton.jit
@no_type_check
def _carried(whole, state):
    """A state times a decay; nothing of it, not even a NaN, where a document starts on the way."""
    return tl.where(whole == 0, 0.0, whole * state)


@triton.jit
@no_type_check
def _entering(
    first, decays, ends, p, h, b, before, after, LANES: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    BK: tl.constexpr, KT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that a segment begins with: ``first`` carried through those before it, in REVERSE those after it, from the last."""
    tiles = ()
    for j in tl.static_range(KT):
        tiles = tiles + (_state(first + (b * H + h) * N * P, j * BK, p, N, P, BK),)
    for i in range(0, after if REVERSE else before):
        segment = before + after - i if REVERSE else i
        there = (segment * LANES + b) * H + h
        decay = tl.load(decays + there)
        new = ()
        for j in tl.static_range(KT):
            new = new + (_carried(decay, tiles[j]) + _state(ends + there * N * P, j * BK, p, N, P, BK),)
        tiles = new
    return tiles


@triton.jit
@no_type_check
def forward(
    q, k, v, gain, log_decay, state, reset, scale, skip, decays, ends,
    y, last,
    LANES: tl.constexpr, L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    CONSTANT: tl.constexpr, LOG_DECAY_LANE: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr, SKIP_LANE: tl.constexpr, HAS_RESET: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    h, b, s = tl.program_id(1), (tl.program_id(2) // SEGMENTS).to(tl.int64), tl.program_id(2) % SEGMENTS
    p = tl.program_id(0) * BV + tl.arange(0, BV)
    q, k = q + (b * L * G + h // (H // G)) * N, k + (b * L * G + h // (H // G)) * N
    v, y = v + (b * L * H + h) * P, y + (b * L * H + h) * P
    gain, scale, reset = gain + b * L * H + h, scale + b * L * H + h, reset + b * L
    log_decay = log_decay + b * LOG_DECAY_LANE + h
    rate = _rate(log_decay, CONSTANT)
    S = _entering(state, decays, ends, p, h, b, s, SEGMENTS - 1 - s, LANES, H, N, P, BK, KT, False)
    CHUNKS: tl.constexpr = (L + C - 1) // C
    for c in range(s * SEGMENT, tl.minimum(s * SEGMENT + SEGMENT, CHUNKS)):
        pair, entry, leave, whole = _decays(rate, log_decay, reset, scale, c, H, L, C, CONSTANT, HAS_RESET, HAS_SCALE)
        v_c = _rows(v, c, p, L, C, H * P, P, EVEN)
        if HAS_GAIN:
            gains = _per_token(gain, c, H, L, C)
            pair, leave = pair * gains[None, :], leave * gains
        into = (v_c * leave[:, None]).to(v_c.dtype)
        scores = tl.zeros((C, C), tl.float32)
        out = tl.zeros((C, BV), tl.float32)
        new = ()
        for j in tl.static_range(KT):
            q_c, k_c = (
                _rows(q, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN),
                _rows(k, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN),
            )
            scores = _dot(q_c, tl.trans(k_c), scores, PRECISION)
            out = _dot(q_c, S[j].to(q_c.dtype), out, PRECISION)
            new = new + (_dot(tl.trans(k_c), into, _carried(whole, S[j]), PRECISION),)
        out = out * entry[:, None]
        out = _dot((scores * pair).to(v_c.dtype), v_c, out, PRECISION)
        if HAS_SKIP:
            out += tl.load(skip + b * SKIP_LANE + h) * v_c.to(tl.float32)
        _store_rows(y, c, p, L, C, H * P, P, EVEN, out)
        S = new
    if s == SEGMENTS - 1:
        for j in tl.static_range(KT):
            _store_state(last + (b * H + h) * N * P, j * BK, p, N, P, BK, S[j])


@triton.jit
@no_type_check
def segment_ends(
    k, v, gain, log_decay, reset, scale,
    decays, ends,
    LANES: tl.constexpr, L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    CONSTANT: tl.constexpr, LOG_DECAY_LANE: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr, SKIP_LANE: tl.constexpr, HAS_RESET: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment does to a state that enters it: decay * state + end. In REVERSE, to the gradient of the state that leaves it,
    with q for ``k`` and the gradient of y for ``v``."""
    h, b, s = tl.program_id(1), (tl.program_id(2) // SEGMENTS).to(tl.int64), tl.program_id(2) % SEGMENTS
    p = tl.program_id(0) * BV + tl.arange(0, BV)
    k = k + (b * L * G + h // (H // G)) * N
    v = v + (b * L * H + h) * P
    gain, scale, reset = gain + b * L * H + h, scale + b * L * H + h, reset + b * L
    log_decay = log_decay + b * LOG_DECAY_LANE + h
    rate = _rate(log_decay, CONSTANT)
    CHUNKS: tl.constexpr = (L + C - 1) // C
    first, end = s * SEGMENT, tl.minimum(s * SEGMENT + SEGMENT, CHUNKS)
    S = ()
    for j in tl.static_range(KT):
        S = S + (tl.zeros((BK, BV), tl.float32),)
    decay = 1.0
    for i in range(first, end):
        c = first + end - 1 - i if REVERSE else i
        _, entry, leave, whole = _decays(rate, log_decay, reset, scale, c, H, L, C, CONSTANT, HAS_RESET, HAS_SCALE)
        v_c = _rows(v, c, p, L, C, H * P, P, EVEN)
        if REVERSE:
            into = (v_c * entry[:, None]).to(v_c.dtype)
        else:
            if HAS_GAIN:
                leave = leave * _per_token(gain, c, H, L, C)
            into = (v_c * leave[:, None]).to(v_c.dtype)
        new = ()
        for j in tl.static_range(KT):
            k_c = _rows(k, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN)
            new = new + (_dot(tl.trans(k_c), into, _carried(whole, S[j]), PRECISION),)
        S = new
        decay = decay * whole
    there = (s * LANES + b) * H + h
    if tl.program_id(0) == 0:
        tl.store(decays + there, decay)
    for j in tl.static_range(KT):
        _store_state(ends + there * N * P, j * BK, p, N, P, BK, S[j])


@triton.jit
@no_type_check
def query_gradients(
    q, k, v, gain, log_decay, state, reset, scale, d_y, decays, ends,
    d_q, reads, states,
    LANES: tl.constexpr, L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    CONSTANT: tl.constexpr, LOG_DECAY_LANE: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr, SKIP_LANE: tl.constexpr, HAS_RESET: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, OF_DECAYS: tl.constexpr,
):  # fmt: skip
    """Forward in time, the states once more: dq = ((dy v^T) * M) k + exp(G) dy S^T, in parts [value blocks, lanes, L, H, N].

    OF_DECAYS: also what the entering state gave to each token, in parts [value blocks, lanes, L, H], and the states that enter the
    chunks, [chunks, lanes, H, N, P].
    """
    i, h, b, s = (
        tl.program_id(0),
        tl.program_id(1),
        (tl.program_id(2) // SEGMENTS).to(tl.int64),
        tl.program_id(2) % SEGMENTS,
    )
    p = i * BV + tl.arange(0, BV)
    q, k = q + (b * L * G + h // (H // G)) * N, k + (b * L * G + h // (H // G)) * N
    v, d_y = v + (b * L * H + h) * P, d_y + (b * L * H + h) * P
    gain, scale, reset = gain + b * L * H + h, scale + b * L * H + h, reset + b * L
    log_decay = log_decay + b * LOG_DECAY_LANE + h
    rate = _rate(log_decay, CONSTANT)
    part = (i * LANES + b) * L * H + h
    S = _entering(state, decays, ends, p, h, b, s, SEGMENTS - 1 - s, LANES, H, N, P, BK, KT, False)
    CHUNKS: tl.constexpr = (L + C - 1) // C
    for c in range(s * SEGMENT, tl.minimum(s * SEGMENT + SEGMENT, CHUNKS)):
        pair, entry, leave, whole = _decays(rate, log_decay, reset, scale, c, H, L, C, CONSTANT, HAS_RESET, HAS_SCALE)
        v_c, d_c = _rows(v, c, p, L, C, H * P, P, EVEN), _rows(d_y, c, p, L, C, H * P, P, EVEN)
        if HAS_GAIN:
            gains = _per_token(gain, c, H, L, C)
            pair, leave = pair * gains[None, :], leave * gains
        into = (v_c * leave[:, None]).to(v_c.dtype)
        d_scores = (_dot(d_c, tl.trans(v_c), None, PRECISION) * pair).to(v_c.dtype)
        read = tl.zeros((C,), tl.float32)
        new = ()
        for j in tl.static_range(KT):
            k_c = _rows(k, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN)
            dq = _dot(d_c, tl.trans(S[j]).to(d_c.dtype), None, PRECISION) * entry[:, None]
            if OF_DECAYS:
                read += tl.sum(dq * _rows(q, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN).to(tl.float32), axis=1)
                _store_state(states + ((c * LANES + b) * H + h) * N * P, j * BK, p, N, P, BK, S[j])
            dq = _dot(d_scores, k_c, dq, PRECISION)
            _store_rows(d_q + part * N, c, j * BK + tl.arange(0, BK), L, C, H * N, N, EVEN, dq)
            new = new + (_dot(tl.trans(k_c), into, _carried(whole, S[j]), PRECISION),)
        if OF_DECAYS:
            _store_per_token(reads + part, c, H, L, C, read)
        S = new


@triton.jit
@no_type_check
def key_value_gradients(
    q, k, v, gain, log_decay, reset, scale, skip, d_y, d_last, states, decays, ends,
    d_k, d_v, d_gain, pairs, writes, kept, d_state, d_skip,
    LANES: tl.constexpr, L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    CONSTANT: tl.constexpr, LOG_DECAY_LANE: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr, SKIP_LANE: tl.constexpr, HAS_RESET: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, OF_DECAYS: tl.constexpr,
):  # fmt: skip
    """Backward in time, with dS, the gradient of the state that leaves a chunk:

        dv = ((q k^T) * M)^T dy + leave k dS;   dk = ((dy v^T) * M)^T q + leave v dS^T;   dS' = exp(G_C) dS + (exp(G) q)^T dy

    d_k in parts [value blocks, lanes, L, H, N]. OF_DECAYS: also, in parts [value blocks, lanes, L, H], the gradients of the gains;
    the difference of the row and column sums of W = (q k^T) * (dy v^T) * M; what each token gave to the leaving state; and, [value
    blocks, lanes, chunks, H], what the entering state did.
    """
    i, h, b, s = (
        tl.program_id(0),
        tl.program_id(1),
        (tl.program_id(2) // SEGMENTS).to(tl.int64),
        tl.program_id(2) % SEGMENTS,
    )
    p = i * BV + tl.arange(0, BV)
    q, k = q + (b * L * G + h // (H // G)) * N, k + (b * L * G + h // (H // G)) * N
    v, d_y, d_v = v + (b * L * H + h) * P, d_y + (b * L * H + h) * P, d_v + (b * L * H + h) * P
    gain, scale, reset = gain + b * L * H + h, scale + b * L * H + h, reset + b * L
    log_decay = log_decay + b * LOG_DECAY_LANE + h
    rate = _rate(log_decay, CONSTANT)
    part = (i * LANES + b) * L * H + h
    dS = _entering(d_last, decays, ends, p, h, b, s, SEGMENTS - 1 - s, LANES, H, N, P, BK, KT, True)
    CHUNKS: tl.constexpr = (L + C - 1) // C
    first, end = s * SEGMENT, tl.minimum(s * SEGMENT + SEGMENT, CHUNKS)
    of_skip = 0.0
    for back in range(first, end):
        c = first + end - 1 - back
        pair, entry, leave, whole = _decays(rate, log_decay, reset, scale, c, H, L, C, CONSTANT, HAS_RESET, HAS_SCALE)
        v_c, d_c = _rows(v, c, p, L, C, H * P, P, EVEN), _rows(d_y, c, p, L, C, H * P, P, EVEN)
        out = (d_c * entry[:, None]).to(d_c.dtype)
        scores = tl.zeros((C, C), tl.float32)
        for j in tl.static_range(KT):
            q_c, k_c = (
                _rows(q, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN),
                _rows(k, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN),
            )
            scores = _dot(q_c, tl.trans(k_c), scores, PRECISION)
        scores = scores * pair
        d_scores = _dot(d_c, tl.trans(v_c), None, PRECISION)
        dv = tl.zeros((C, BV), tl.float32)
        for j in tl.static_range(KT):
            k_c = _rows(k, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN)
            dv = _dot(k_c, dS[j].to(k_c.dtype), dv, PRECISION)
        dv = dv * leave[:, None]
        gains = _per_token(gain, c, H, L, C) if HAS_GAIN else tl.full((C,), 1.0, tl.float32)
        if OF_DECAYS:
            write = tl.sum(dv * v_c.to(tl.float32), axis=1) * gains
            _store_per_token(writes + part, c, H, L, C, write)
            W = scores * d_scores * gains[None, :]
            _store_per_token(pairs + part, c, H, L, C, tl.sum(W, axis=1) - tl.sum(W, axis=0))
        dv = _dot(tl.trans(scores).to(d_c.dtype), d_c, dv, PRECISION)
        if OF_DECAYS:
            _store_per_token(d_gain + part, c, H, L, C, tl.sum(dv * v_c.to(tl.float32), axis=1))
        dv = dv * gains[:, None]
        if HAS_SKIP:
            dv += tl.load(skip + b * SKIP_LANE + h) * d_c.to(tl.float32)
            of_skip += tl.sum(tl.sum(d_c.to(tl.float32) * v_c.to(tl.float32), axis=1), axis=0)
        _store_rows(d_v, c, p, L, C, H * P, P, EVEN, dv)
        d_scores = (d_scores * pair * gains[None, :]).to(d_c.dtype)
        leave = leave * gains
        over = 0.0
        new = ()
        for j in tl.static_range(KT):
            q_c = _rows(q, c, j * BK + tl.arange(0, BK), L, C, G * N, N, EVEN)
            dk = _dot(v_c, tl.trans(dS[j]).to(v_c.dtype), None, PRECISION) * leave[:, None]
            dk = _dot(tl.trans(d_scores), q_c, dk, PRECISION)
            _store_rows(d_k + part * N, c, j * BK + tl.arange(0, BK), L, C, H * N, N, EVEN, dk)
            if OF_DECAYS:
                S = _state(states + ((c * LANES + b) * H + h) * N * P, j * BK, p, N, P, BK)
                over += tl.sum(tl.sum(S * dS[j], axis=1), axis=0)
            new = new + (_dot(tl.trans(q_c), out, _carried(whole, dS[j]), PRECISION),)
        if OF_DECAYS:
            tl.store(kept + ((i * LANES + b) * CHUNKS + c) * H + h, over * whole)
        dS = new
    if s == 0:
        for j in tl.static_range(KT):
            _store_state(d_state + (b * H + h) * N * P, j * BK, p, N, P, BK, dS[j])
    if HAS_SKIP:
        tl.store(d_skip + ((i * SEGMENTS + s) * LANES + b) * H + h, of_skip)
