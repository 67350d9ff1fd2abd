"""The selective scan for NVIDIA GPUs, in Triton: a thread owns one channel with all its state entries, in registers.

Bound by instructions, not by memory: every state entry of every token takes an exponential and a handful of multiply-adds, and
these kernels are written for few of them. States are tiles [N, channels] whose fast axis is spread over the threads of one warp, so
that sums over entries stay within a thread, and sums over channels (dB, dC) within a warp. Sums between programs go through arrays
that are added up afterwards: no atomics, the same bits in every run.

Axes: E channels, N entries (NP of them in registers, a power of two), L tokens, K chunks, S segments. A program (i, b, s) runs
channels [i BE, (i + 1) BE) of lane b through segment s, SEGMENT chunks of CHUNK tokens. Arrays: x, dt, z, y and their gradients
[lanes, L, E]; B, C [lanes, L, N]; A [1 or lanes, N, E], D and bias [1 or lanes, E], with *_LANE their stride; states [K, lanes, N,
E]. Pointers of what is absent (HAS_*) are never read.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def _row(array, t, e, E: tl.constexpr, BE: tl.constexpr, live, RAGGED: tl.constexpr):
    """Channels of token t from ``array`` on; zeros where the token is absent."""
    if RAGGED:
        return tl.load(array + t * E + e, mask=(e < E) & live, other=0.0)
    elif E % BE != 0:
        return tl.load(array + t * E + e, mask=e < E, other=0.0)
    else:
        return tl.load(array + t * E + e)


@triton.jit
@no_type_check
def _block(
    x, dt, z, t0, e, L: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, UNROLL: tl.constexpr, length,
    RAGGED: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """Rows of UNROLL tokens from t0 on, as they lie in memory; behind the end zeros, or what nobody reads."""
    if not RAGGED:
        t0 = tl.minimum(t0, L - UNROLL)
    x, dt, z = x + t0 * E, dt + t0 * E, z + t0 * E
    xs, dts, zs = (), (), ()
    for u in tl.static_range(UNROLL):
        live = t0 + u < length
        xs = xs + (_row(x, u, e, E, BE, live, RAGGED),)
        dts = dts + (_row(dt, u, e, E, BE, live, RAGGED),)
        if HAS_Z:
            zs = zs + (_row(z, u, e, E, BE, live, RAGGED),)
    return xs, dts, zs


@triton.jit
@no_type_check
def _store_row(array, t, e, E: tl.constexpr, BE: tl.constexpr, inside, RAGGED: tl.constexpr, row):
    row = row.to(array.dtype.element_ty)
    if RAGGED:
        tl.store(array + t * E + e, row, mask=(e < E) & inside)
    elif E % BE != 0:
        tl.store(array + t * E + e, row, mask=e < E)
    else:
        tl.store(array + t * E + e, row)


@triton.jit
@no_type_check
def _map(array, t, n, N: tl.constexpr, NP: tl.constexpr, live, RAGGED: tl.constexpr):
    """B or C of token t from ``array`` on."""
    if RAGGED:
        return tl.load(array + t * N + n, mask=(n < N) & live, other=0.0).to(tl.float32)
    elif N != NP:
        return tl.load(array + t * N + n, mask=n < N, other=0.0).to(tl.float32)
    else:
        return tl.load(array + t * N + n).to(tl.float32)


@triton.jit
@no_type_check
def _is_reset(reset, u, t0, L: tl.constexpr, RAGGED: tl.constexpr):
    if RAGGED:
        return tl.load(reset + u, mask=t0 + u < L, other=0) != 0
    else:
        return tl.load(reset + u) != 0


@triton.jit
@no_type_check
def _tile(array, n, e, N: tl.constexpr, NP: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """One state, [N, channels]."""
    if N == NP and E % BE == 0:
        return tl.load(array + n[:, None] * E + e[None, :])
    else:
        return tl.load(array + n[:, None] * E + e[None, :], mask=(n[:, None] < N) & (e[None, :] < E), other=0.0)


@triton.jit
@no_type_check
def _store_tile(array, n, e, N: tl.constexpr, NP: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, tile):
    if N == NP and E % BE == 0:
        tl.store(array + n[:, None] * E + e[None, :], tile)
    else:
        tl.store(array + n[:, None] * E + e[None, :], tile, mask=(n[:, None] < N) & (e[None, :] < E))


@triton.jit
@no_type_check
def _vector(array, e, E: tl.constexpr):
    return tl.load(array + e, mask=e < E, other=0.0)


@triton.jit
@no_type_check
def _step_size(raw, live, SOFTPLUS: tl.constexpr, RAGGED: tl.constexpr):
    """softplus(raw), 0 at absent tokens, and its derivative.

    softplus(r) = max(r, 0) + log1p(exp(-|r|)); log1p(w) = w p(w) for w in [0, 1], p a polynomial within 4e-8 of it, relatively:
    the hardware's logarithm is absolutely accurate, which is not enough for small steps.
    """
    if SOFTPLUS:
        w = tl.exp2(-tl.abs(raw) * LOG2E)
        p = w * 0.0051058256067335606 - 0.028991956263780594
        p = p * w + 0.07738073915243149
        p = p * w - 0.13590599596500397
        p = p * w + 0.1907130926847458
        p = p * w - 0.2483394593000412
        p = p * w + 0.3331793546676636
        p = p * w - 0.4999943673610687
        p = p * w + 0.9999999403953552
        step = tl.maximum(raw, 0.0) + w * p
        slope = tl.where(raw >= 0, 1.0, w) / (1.0 + w)
    else:
        step = raw
        slope = tl.full(raw.shape, 1.0, tl.float32)
    if RAGGED:
        step = tl.where(live, step, 0.0)
        slope = tl.where(live, slope, 0.0)
    return step, slope


@triton.jit
@no_type_check
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
@no_type_check
def _length(lengths, b, L: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    length = L
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + b), L)
    return length


@triton.jit
@no_type_check
def _through(decay, inner, carry):
    """A carry after a segment: zero where the decay is, whatever the carry."""
    return tl.where(decay == 0, 0.0, decay * carry) + inner


@triton.jit
@no_type_check
def forward(
    x, dt, A, B, C, D, z, bias, state, reset, lengths, decays, ends,
    y, last, states,
    LANES: tl.constexpr, L: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, RAGGED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    A_LANE: tl.constexpr, D_LANE: tl.constexpr, BIAS_LANE: tl.constexpr,
):  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = (sum_n C_t h_t + D x_t) silu(z_t).

    ``decays`` and ``ends`` [S, lanes, N, E] are what ``segment_ends`` says of the segments before this one.
    """
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, NP)
    length = _length(lengths, b, L, HAS_LENGTHS)
    rates = _tile(A + b * A_LANE, n, e, N, NP, E, BE) * LOG2E
    D_e = _vector(D + b * D_LANE, e, E) if HAS_D else tl.zeros((BE,), tl.float32)
    bias_e = _vector(bias + b * BIAS_LANE, e, E) if HAS_BIAS else tl.zeros((BE,), tl.float32)
    h = _tile(state + b * N * E, n, e, N, NP, E, BE)
    for before in range(0, s):
        there = (before * LANES + b) * N * E
        h = _through(_tile(decays + there, n, e, N, NP, E, BE), _tile(ends + there, n, e, N, NP, E, BE), h)
    x, dt, z, y = x + b * L * E, dt + b * L * E, z + b * L * E, y + b * L * E
    B, C, reset = B + b * L * N, C + b * L * N, reset + b * L
    BLOCKS: tl.constexpr = CHUNK // UNROLL
    K: tl.constexpr = (L + CHUNK - 1) // CHUNK
    start = s * SEGMENT * BLOCKS
    xs, dts, zs = _block(x, dt, z, tl.cast(start, tl.int64) * UNROLL, e, L, E, BE, UNROLL, length, RAGGED, HAS_Z)
    for block in range(start, tl.minimum(s * SEGMENT + SEGMENT, K) * BLOCKS):
        if K > 1 and block % BLOCKS == 0:
            _store_tile(states + (tl.cast(block // BLOCKS, tl.int64) * LANES + b) * N * E, n, e, N, NP, E, BE, h)
        t0 = tl.cast(block, tl.int64) * UNROLL
        # The next block is on its way while this one is computed, and nothing is stored before all of its B and C are asked for.
        next_xs, next_dts, next_zs = _block(x, dt, z, t0 + UNROLL, e, L, E, BE, UNROLL, length, RAGGED, HAS_Z)
        B_block, C_block, reset_block, y_block = B + t0 * N, C + t0 * N, reset + t0, y + t0 * E
        ys = ()
        for u in tl.static_range(UNROLL):
            live = t0 + u < length
            x_e = xs[u].to(tl.float32)
            step, _ = _step_size(dts[u].to(tl.float32) + bias_e, live, SOFTPLUS, RAGGED)
            B_n, C_n = _map(B_block, u, n, N, NP, live, RAGGED), _map(C_block, u, n, N, NP, live, RAGGED)
            h = tl.exp2(step[None, :] * rates) * h
            if HAS_RESET:
                h = tl.where(_is_reset(reset_block, u, t0, L, RAGGED), 0.0, h)
            h += (step * x_e)[None, :] * B_n[:, None]
            y_e = tl.sum(h * C_n[:, None], axis=0) + D_e * x_e
            if HAS_Z:
                z_e = zs[u].to(tl.float32)
                y_e = y_e * z_e * _sigmoid(z_e)
            ys = ys + (y_e,)
        for u in tl.static_range(UNROLL):
            _store_row(y_block, u, e, E, BE, t0 + u < L, RAGGED, ys[u])
        xs, dts, zs = next_xs, next_dts, next_zs
    if s == tl.num_programs(2) - 1:
        _store_tile(last + b * N * E, n, e, N, NP, E, BE, h)


@triton.jit
@no_type_check
def segment_ends(
    x, dt, A, B, z, bias, reset, lengths,
    decays, ends,
    LANES: tl.constexpr, L: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, RAGGED: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    A_LANE: tl.constexpr, BIAS_LANE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment does to what enters it: carry' = decay * carry + end, so that all segments can run at once.

    Forward, the carry is the state h. In REVERSE it is its gradient q, which comes from the right: q_{t-1} = exp(dt_t A) (q_t +
    dy_t C_t), with dy for ``x``, C for ``B``, and dy_t silu(z_t) for dy_t where there is z.
    """
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, NP)
    length = _length(lengths, b, L, HAS_LENGTHS)
    rates = _tile(A + b * A_LANE, n, e, N, NP, E, BE) * LOG2E
    bias_e = _vector(bias + b * BIAS_LANE, e, E) if HAS_BIAS else tl.zeros((BE,), tl.float32)
    carry, total, kept = tl.zeros((NP, BE), tl.float32), tl.zeros((BE,), tl.float32), 1.0
    x, dt, z = x + b * L * E, dt + b * L * E, z + b * L * E
    B, reset = B + b * L * N, reset + b * L
    K: tl.constexpr = (L + CHUNK - 1) // CHUNK
    first = tl.cast(s, tl.int64) * SEGMENT * CHUNK
    tokens = (tl.minimum(s * SEGMENT + SEGMENT, K) - s * SEGMENT) * CHUNK
    for block in range(0, tokens // UNROLL):
        t0 = first + (tokens - (block + 1) * UNROLL if REVERSE else block * UNROLL)
        x_block, dt_block, z_block, B_block, reset_block = x + t0 * E, dt + t0 * E, z + t0 * E, B + t0 * N, reset + t0
        for i in tl.static_range(UNROLL):
            u = UNROLL - 1 - i if REVERSE else i
            live = t0 + u < length
            x_e = _row(x_block, u, e, E, BE, live, RAGGED).to(tl.float32)
            raw = _row(dt_block, u, e, E, BE, live, RAGGED).to(tl.float32) + bias_e
            step, _ = _step_size(raw, live, SOFTPLUS, RAGGED)
            B_n = _map(B_block, u, n, N, NP, live, RAGGED)
            decay = tl.exp2(step[None, :] * rates)
            total += step
            if REVERSE:
                if HAS_Z:
                    z_e = _row(z_block, u, e, E, BE, live, RAGGED).to(tl.float32)
                    x_e = x_e * z_e * _sigmoid(z_e)
                carry = decay * (carry + x_e[None, :] * B_n[:, None])
            else:
                carry = decay * carry
            if HAS_RESET:
                fresh = _is_reset(reset_block, u, t0, L, RAGGED)
                carry = tl.where(fresh, 0.0, carry)
                kept = tl.where(fresh, 0.0, kept)
            if not REVERSE:
                carry += (step * x_e)[None, :] * B_n[:, None]
    there = (s * LANES + b) * N * E
    _store_tile(decays + there, n, e, N, NP, E, BE, tl.exp2(total[None, :] * rates) * kept)
    _store_tile(ends + there, n, e, N, NP, E, BE, carry)


@triton.jit
@no_type_check
def backward(
    x, dt, A, B, C, D, z, bias, reset, lengths, states, d_y, d_last, decays, ends,
    d_x, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_state, scratch,
    LANES: tl.constexpr, L: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, RAGGED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    A_LANE: tl.constexpr, D_LANE: tl.constexpr, BIAS_LANE: tl.constexpr,
):  # fmt: skip
    """Chunks from the last to the first, each in two passes: its states again from the one that entered it, every UNROLL tokens one
    kept in ``scratch``; then, block after block from the end, the states of a block into registers, and back through it.

    With p_t = exp(dt_t A) h_{t-1} and q_t, the gradient that reaches h_t from later tokens:

        g_t = q_t + dy_t C_t                     q_{t-1} = exp(dt_t A) g_t
        d(dt_t x_t) = sum_n g_t B_t              dB_t = sum_e g_t dt_t x_t
        d(dt_t)    += sum_n g_t p_t A            dC_t = sum_e dy_t h_t            dA += dt_t g_t p_t

    ``decays`` and ``ends`` are those of the segments after this one. d_A [S, lanes, N, E], d_D and d_bias [S, lanes, E], d_B and
    d_C [channel blocks, lanes, L, N] are parts, to be added up.
    """
    i, b, s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    e, n = i * BE + tl.arange(0, BE), tl.arange(0, NP)
    length = _length(lengths, b, L, HAS_LENGTHS)
    rates = _tile(A + b * A_LANE, n, e, N, NP, E, BE) * LOG2E
    D_e = _vector(D + b * D_LANE, e, E) if HAS_D else tl.zeros((BE,), tl.float32)
    bias_e = _vector(bias + b * BIAS_LANE, e, E) if HAS_BIAS else tl.zeros((BE,), tl.float32)
    segments = tl.num_programs(2)
    q = _tile(d_last + b * N * E, n, e, N, NP, E, BE)
    for after in range(0, segments - 1 - s):
        there = ((segments - 1 - after) * LANES + b) * N * E
        q = _through(_tile(decays + there, n, e, N, NP, E, BE), _tile(ends + there, n, e, N, NP, E, BE), q)
    x, dt, z, d_y = x + b * L * E, dt + b * L * E, z + b * L * E, d_y + b * L * E
    d_x, d_dt, d_z = d_x + b * L * E, d_dt + b * L * E, d_z + b * L * E
    B, C, reset = B + b * L * N, C + b * L * N, reset + b * L
    d_B, d_C = d_B + (i * LANES + b) * L * N, d_C + (i * LANES + b) * L * N
    K: tl.constexpr = (L + CHUNK - 1) // CHUNK
    BLOCKS: tl.constexpr = CHUNK // UNROLL
    scratch += (
        ((s * LANES + b) * tl.num_programs(0) + i) * BLOCKS * NP * BE + n[:, None] * BE + tl.arange(0, BE)[None, :]
    )
    dA = tl.zeros((NP, BE), tl.float32)
    dD, d_bias_e = tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    first = s * SEGMENT
    chunks = tl.minimum(first + SEGMENT, K) - first
    for back in range(0, chunks):
        k = tl.cast(first + chunks - 1 - back, tl.int64)
        h = _tile(states + (k * LANES + b) * N * E, n, e, N, NP, E, BE)
        for block in range(0, BLOCKS):
            tl.store(scratch + block * NP * BE, h)
            t0 = k * CHUNK + block * UNROLL
            x_block, dt_block, B_block, reset_block = x + t0 * E, dt + t0 * E, B + t0 * N, reset + t0
            for u in tl.static_range(UNROLL):
                live = t0 + u < length
                x_e = _row(x_block, u, e, E, BE, live, RAGGED).to(tl.float32)
                raw = _row(dt_block, u, e, E, BE, live, RAGGED).to(tl.float32) + bias_e
                step, _ = _step_size(raw, live, SOFTPLUS, RAGGED)
                B_n = _map(B_block, u, n, N, NP, live, RAGGED)
                h = tl.exp2(step[None, :] * rates) * h
                if HAS_RESET:
                    h = tl.where(_is_reset(reset_block, u, t0, L, RAGGED), 0.0, h)
                h += (step * x_e)[None, :] * B_n[:, None]
        # The threads that load a state again may be others than those that stored it.
        tl.debug_barrier()
        for block_back in range(0, BLOCKS):
            block = BLOCKS - 1 - block_back
            t0 = k * CHUNK + block * UNROLL
            x_block, dt_block, z_block, d_y_block = x + t0 * E, dt + t0 * E, z + t0 * E, d_y + t0 * E
            d_x_block, d_dt_block, d_z_block = d_x + t0 * E, d_dt + t0 * E, d_z + t0 * E
            B_block, C_block, reset_block = B + t0 * N, C + t0 * N, reset + t0
            d_B_block, d_C_block = d_B + t0 * N, d_C + t0 * N
            h = tl.load(scratch + block * NP * BE)
            ps, xs, steps, slopes, dys, fresh = (), (), (), (), (), ()
            for u in tl.static_range(UNROLL):
                live = t0 + u < length
                x_e = _row(x_block, u, e, E, BE, live, RAGGED).to(tl.float32)
                dy_e = _row(d_y_block, u, e, E, BE, live, RAGGED).to(tl.float32)
                raw = _row(dt_block, u, e, E, BE, live, RAGGED).to(tl.float32) + bias_e
                step, slope = _step_size(raw, live, SOFTPLUS, RAGGED)
                B_n = _map(B_block, u, n, N, NP, live, RAGGED)
                p = tl.exp2(step[None, :] * rates) * h
                if HAS_RESET:
                    fresh = fresh + (_is_reset(reset_block, u, t0, L, RAGGED),)
                    p = tl.where(fresh[u], 0.0, p)
                if HAS_Z:
                    h = p + (step * x_e)[None, :] * B_n[:, None]
                    C_n = _map(C_block, u, n, N, NP, live, RAGGED)
                    z_e = _row(z_block, u, e, E, BE, live, RAGGED).to(tl.float32)
                    gate = _sigmoid(z_e)
                    slope_z = gate * (1.0 + z_e * (1.0 - gate))
                    y_e = tl.sum(h * C_n[:, None], axis=0) + D_e * x_e
                    _store_row(d_z_block, u, e, E, BE, t0 + u < L, RAGGED, dy_e * y_e * slope_z)
                    dy_e = dy_e * z_e * gate
                elif u < UNROLL - 1:
                    h = p + (step * x_e)[None, :] * B_n[:, None]
                ps, xs, steps, slopes, dys = ps + (p,), xs + (x_e,), steps + (step,), slopes + (slope,), dys + (dy_e,)
            for w in tl.static_range(UNROLL):
                u = UNROLL - 1 - w
                live = t0 + u < length
                p, x_e, step, dy_e = ps[UNROLL - 1 - w], xs[UNROLL - 1 - w], steps[UNROLL - 1 - w], dys[UNROLL - 1 - w]
                u_e = step * x_e
                B_n, C_n = _map(B_block, u, n, N, NP, live, RAGGED), _map(C_block, u, n, N, NP, live, RAGGED)
                dC = tl.sum((p + u_e[None, :] * B_n[:, None]) * dy_e[None, :], axis=1)
                g = q + dy_e[None, :] * C_n[:, None]
                dB = tl.sum(g * u_e[None, :], axis=1)
                tl.store(d_C_block + u * N + n, dC, mask=(n < N) & (t0 + u < L))
                tl.store(d_B_block + u * N + n, dB, mask=(n < N) & (t0 + u < L))
                du_e = tl.sum(g * B_n[:, None], axis=0)
                gp = g * p
                dA += step[None, :] * gp
                d_step = tl.sum(gp * rates, axis=0) * LN2 + x_e * du_e
                d_raw = d_step * slopes[UNROLL - 1 - w]
                q = tl.exp2(step[None, :] * rates) * g
                if HAS_RESET:
                    q = tl.where(fresh[UNROLL - 1 - w], 0.0, q)
                dD += dy_e * x_e
                d_bias_e += d_raw
                _store_row(d_dt_block, u, e, E, BE, t0 + u < L, RAGGED, d_raw)
                _store_row(d_x_block, u, e, E, BE, t0 + u < L, RAGGED, step * du_e + D_e * dy_e)
        tl.debug_barrier()
    there = s * LANES + b
    _store_tile(d_A + there * N * E, n, e, N, NP, E, BE, dA)
    tl.store(d_D + there * E + e, dD, mask=e < E)
    tl.store(d_bias + there * E + e, d_bias_e, mask=e < E)
    if s == 0:
        _store_tile(d_state + b * N * E, n, e, N, NP, E, BE, q)
