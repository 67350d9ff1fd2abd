"""The causal convolution for NVIDIA GPUs, in Triton: a thread owns a few channels and walks through the tokens.

Bound by memory, as long as few instructions are spent per element: the last K-1 inputs stay in registers, so that every input is
loaded and widened once, not K times. In the backward pass a thread also keeps the K gradients of inputs that later tokens still add
to, and sums the gradients of its taps: each program leaves its part of those sums in an array of its own, to be added up. No
atomics, the same bits in every run.

Axes: E channels, K > 1 taps, L tokens, S segments. A program (i, b, s) runs channels [i BE, (i + 1) BE) of lane b through segment s
of SEGMENT tokens, UNROLL of them in a block, the rest in blocks of REST. Arrays: x, y and their gradients [lanes, L, E]; kernel
[1 or lanes, K, E] and bias [1 or lanes, E], with *_LANE their stride; windows [lanes, K-1, E]; reset [lanes, L]. Rows of the past
are tuples, the oldest first. Pointers of what is absent (HAS_*) are never read.
"""

from typing import no_type_check

import triton
import triton.language as tl

MINUS_LOG2E = tl.constexpr(-1.4426950408889634)


@triton.jit
@no_type_check
def _row(array, e, E: tl.constexpr, BE: tl.constexpr):
    """Channels of one token, in float32."""
    if E % BE == 0:
        return tl.load(array + e).to(tl.float32)
    else:
        return tl.load(array + e, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _row_if(array, e, E: tl.constexpr, there):
    """Zeros where there is none."""
    return tl.load(array + e, mask=(e < E) & there, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _store_row(array, e, E: tl.constexpr, BE: tl.constexpr, row):
    row = row.to(array.dtype.element_ty)
    if E % BE == 0:
        tl.store(array + e, row)
    else:
        tl.store(array + e, row, mask=e < E)


@triton.jit
@no_type_check
def _store_row_if(array, e, E: tl.constexpr, wanted, row):
    tl.store(array + e, row.to(array.dtype.element_ty), mask=(e < E) & wanted)


@triton.jit
@no_type_check
def _zeros(BE: tl.constexpr, ROWS: tl.constexpr):
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (tl.zeros((BE,), tl.float32),)
    return rows


@triton.jit
@no_type_check
def _rows(array, e, E: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr):
    rows = ()
    for j in tl.static_range(ROWS):
        rows = rows + (_row(array + j * E, e, E, BE),)
    return rows


@triton.jit
@no_type_check
def _rows_if(array, e, E: tl.constexpr, there, ROWS: tl.constexpr):
    """The first ``there`` of them, then zeros."""
    rows = ()
    for j in tl.static_range(ROWS):
        rows = rows + (_row_if(array + j * E, e, E, j < there),)
    return rows


@triton.jit
@no_type_check
def _flags(reset, COUNT: tl.constexpr, HAS_RESET: tl.constexpr):
    """Whether each of the next tokens starts a document."""
    flags = ()
    for u in tl.static_range(COUNT):
        flags = flags + (tl.load(reset + u) != 0 if HAS_RESET else False,)
    return flags


@triton.jit
@no_type_check
def _flags_if(reset, there, COUNT: tl.constexpr, HAS_RESET: tl.constexpr):
    flags = ()
    for u in tl.static_range(COUNT):
        flags = flags + (tl.load(reset + u, mask=u < there, other=0) != 0 if HAS_RESET else False,)
    return flags


@triton.jit
@no_type_check
def _length(lengths, b, L: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    length = L
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + b), L)
    return length


@triton.jit
@no_type_check
def _followed(rows, row, fresh, K: tl.constexpr, HAS_RESET: tl.constexpr):
    """``row`` after the K-1 ``rows`` before it, which are zero if it starts a document: by selection, whatever they are."""
    kept = ()
    for j in tl.static_range(K - 1):
        kept = kept + (tl.where(fresh, 0.0, rows[j]) if HAS_RESET else rows[j],)
    return kept + (row,)


@triton.jit
@no_type_check
def _before(
    x, window, reset, first, e, E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, HAS_RESET: tl.constexpr
):  # fmt: skip
    """The K-1 rows before token ``first``, those of its predecessor's document. Pointers of token 0."""
    rows = _zeros(BE, K - 1)
    for j in tl.static_range(K - 1):
        t = first + (j - (K - 1))
        old = _row_if(window + (t + K - 1) * E, e, E, t < 0)
        row = tl.where(t < 0, old, _row_if(x + t * E, e, E, t >= 0))
        fresh = tl.load(reset + t, mask=t >= 0, other=0) != 0 if HAS_RESET else False
        rows = _followed(rows, row, fresh, K, HAS_RESET)[1:]
    return rows


@triton.jit
@no_type_check
def _weighted(bias, taps, rows, K: tl.constexpr):
    total = bias
    for j in tl.static_range(K):
        total += taps[j] * rows[j]
    return total


@triton.jit
@no_type_check
def _exp_minus(x):
    return tl.exp2(x * MINUS_LOG2E)


@triton.jit
@no_type_check
def _activated(total, SILU: tl.constexpr):
    if SILU:
        return total / (1.0 + _exp_minus(total))
    else:
        return total


@triton.jit
@no_type_check
def forward(
    x, kernel, bias, window, reset, lengths,
    y, last,
    L: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BE: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr,
    REST: tl.constexpr, SILU: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    KERNEL_LANE: tl.constexpr, BIAS_LANE: tl.constexpr,
):  # fmt: skip
    """y_t = silu(bias + sum_j kernel_j x_{t-K+1+j}), and the window that follows."""
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    length = _length(lengths, b, L, HAS_LENGTHS)
    taps = _rows(kernel + b * KERNEL_LANE, e, E, BE, K)
    bias_e = _row(bias + b * BIAS_LANE, e, E, BE)
    x, y, reset = x + b * L * E, y + b * L * E, reset + b * L
    window, last = window + b * (K - 1) * E, last + b * (K - 1) * E
    first = tl.cast(s, tl.int64) * SEGMENT
    end = tl.minimum(first + SEGMENT, L)
    rows = _before(x, window, reset, first, e, E, BE, K, HAS_RESET)
    blocks = tl.maximum(tl.minimum(end, length) - first, 0) // UNROLL
    for block in range(0, blocks):
        t = first + block * UNROLL
        loaded, fresh = _rows(x + t * E, e, E, BE, UNROLL), _flags(reset + t, UNROLL, HAS_RESET)
        for u in tl.static_range(UNROLL):
            rows = _followed(rows, loaded[u], fresh[u], K, HAS_RESET)
            y_e = _activated(_weighted(bias_e, taps, rows, K), SILU)
            _store_row(y + (t + u) * E, e, E, BE, y_e)
            rows = rows[1:]
    for t in range(first + blocks * UNROLL, end, REST):
        loaded, fresh = _rows_if(x + t * E, e, E, length - t, REST), _flags_if(reset + t, L - t, REST, HAS_RESET)
        for u in tl.static_range(REST):
            rows = _followed(rows, loaded[u], fresh[u], K, HAS_RESET)
            y_e = _activated(_weighted(bias_e, taps, rows, K), SILU)
            _store_row_if(y + (t + u) * E, e, E, t + u < end, y_e)
            rows = rows[1:]
    if s == tl.num_programs(2) - 1:
        kept = True
        for lag in tl.static_range(K - 1):
            back = length - 1 - lag
            old = _row_if(window + (back + K - 1) * E, e, E, back < 0)
            kept_row = tl.where(back < 0, old, _row_if(x + back * E, e, E, back >= 0))
            if HAS_RESET:
                kept_row = tl.where(kept, kept_row, 0.0)
                kept = kept & (tl.load(reset + back, mask=back >= 0, other=0) == 0)
            _store_row(last + (K - 2 - lag) * E, e, E, BE, kept_row)


@triton.jit
@no_type_check
def _slope(total, SILU: tl.constexpr):
    if SILU:
        gate = 1.0 / (1.0 + _exp_minus(total))
        return gate * (1.0 + total * (1.0 - gate))
    else:
        return tl.full(total.shape, 1.0, tl.float32)


@triton.jit
@no_type_check
def _reached(pending, d_sum, taps, age, K: tl.constexpr, HAS_RESET: tl.constexpr):
    """The gradients of the inputs that a token reads, those of its document, with its own added. The oldest first, its own last."""
    reached = ()
    for j in tl.static_range(K):
        if j == K - 1:
            reached = reached + (taps[j] * d_sum,)
        elif HAS_RESET:
            reached = reached + (pending[j] + taps[j] * tl.where(K - 1 - j <= age, d_sum, 0.0),)
        else:
            reached = reached + (pending[j] + taps[j] * d_sum,)
    return reached


@triton.jit
@no_type_check
def _weighing(d_taps, d_sum, rows, K: tl.constexpr):
    sums = ()
    for j in tl.static_range(K):
        sums = sums + (d_taps[j] + d_sum * rows[j],)
    return sums


@triton.jit
@no_type_check
def _step_if(
    row, d_row, fresh, t, length, d_last, rows, age, pending, taps, bias_e, e,
    E: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Back through a token that may be absent, or the last one, whose window has a gradient."""
    if HAS_RESET:
        age = tl.where(fresh, 0, age + 1)
    rows = _followed(rows, row, fresh, K, HAS_RESET)
    d_sum = d_row * _slope(_weighted(bias_e, taps, rows, K), SILU)
    pending = _reached(pending, d_sum, taps, age, K, HAS_RESET)
    with_last = (pending[0],)
    for j in tl.static_range(K - 1):
        there = (t == length - 1) & (K - 2 - j <= age)
        with_last = with_last + (pending[j + 1] + _row_if(d_last + j * E, e, E, there),)
    return rows, age, with_last, d_sum


@triton.jit
@no_type_check
def backward(
    x, kernel, bias, window, reset, lengths, d_y, d_last,
    d_x, d_kernel, d_bias, d_window,
    LANES: tl.constexpr,
    L: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BE: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr,
    REST: tl.constexpr, SILU: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    KERNEL_LANE: tl.constexpr, BIAS_LANE: tl.constexpr,
):  # fmt: skip
    """With a_t what goes into the activation, and lags that do not reach across a document start:

        d_a_t = dy_t silu'(a_t)      d_x_t = sum_j kernel_j d_a_{t+K-1-j}      d_kernel_j = sum_t d_a_t x_{t-K+1+j}

    The gradient of an input is complete K-1 tokens later. So a segment's program begins with K-1 tokens that only fill the pipeline
    (the program before counts them; the first one counts them itself, and d_window is what they complete), and ends K-1 tokens
    after its segment. d_kernel [S, lanes, K, E] and d_bias [S, lanes, E] are parts, to be added up.
    """
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    length = _length(lengths, b, L, HAS_LENGTHS)
    taps = _rows(kernel + b * KERNEL_LANE, e, E, BE, K)
    bias_e = _row(bias + b * BIAS_LANE, e, E, BE)
    x, d_y, d_x, reset = x + b * L * E, d_y + b * L * E, d_x + b * L * E, reset + b * L
    window, d_last, d_window = window + b * (K - 1) * E, d_last + b * (K - 1) * E, d_window + b * (K - 1) * E
    first = tl.cast(s, tl.int64) * SEGMENT
    end = tl.minimum(first + SEGMENT, L) + K - 1
    rows = _before(x, window, reset, first, e, E, BE, K, HAS_RESET)
    age = K - 1
    pending, d_taps, d_bias_e = (), _zeros(BE, K), tl.zeros((BE,), tl.float32)
    for j in tl.static_range(K - 1):
        # Without any token, the window that comes out is the one that went in.
        pending = pending + (_row_if(d_last + j * E, e, E, length == 0),)
    head = _rows_if(x + first * E, e, E, length - first, K - 1)
    starts = _flags_if(reset + first, L - first, K - 1, HAS_RESET)
    d_head = _rows_if(d_y + first * E, e, E, length - first, K - 1)
    counted = s == 0
    for u in tl.static_range(K - 1):
        rows, age, pending, d_sum = _step_if(
            head[u], d_head[u], starts[u], first + u, length, d_last, rows, age, pending, taps, bias_e, e, E, K, SILU,
            HAS_RESET,
        )  # fmt: skip
        d_sum = tl.where(counted, d_sum, 0.0)
        d_taps = _weighing(d_taps, d_sum, rows, K)
        d_bias_e += d_sum
        _store_row_if(d_window + u * E, e, E, counted, pending[0])
        rows, pending = rows[1:], pending[1:]
    first += K - 1
    blocks = tl.maximum(tl.minimum(end, length - 1) - first, 0) // UNROLL
    for block in range(0, blocks):
        t = first + block * UNROLL
        loaded, fresh = _rows(x + t * E, e, E, BE, UNROLL), _flags(reset + t, UNROLL, HAS_RESET)
        d_loaded = _rows(d_y + t * E, e, E, BE, UNROLL)
        for u in tl.static_range(UNROLL):
            if HAS_RESET:
                age = tl.where(fresh[u], 0, age + 1)
            rows = _followed(rows, loaded[u], fresh[u], K, HAS_RESET)
            d_sum = d_loaded[u] * _slope(_weighted(bias_e, taps, rows, K), SILU)
            pending = _reached(pending, d_sum, taps, age, K, HAS_RESET)
            d_taps = _weighing(d_taps, d_sum, rows, K)
            d_bias_e += d_sum
            _store_row(d_x + (t + u - (K - 1)) * E, e, E, BE, pending[0])
            rows, pending = rows[1:], pending[1:]
    for t in range(first + blocks * UNROLL, end, REST):
        here = tl.minimum(end, length) - t
        loaded, fresh = _rows_if(x + t * E, e, E, here, REST), _flags_if(reset + t, L - t, REST, HAS_RESET)
        d_loaded = _rows_if(d_y + t * E, e, E, here, REST)
        for u in tl.static_range(REST):
            rows, age, pending, d_sum = _step_if(
                loaded[u], d_loaded[u], fresh[u], t + u, length, d_last, rows, age, pending, taps, bias_e, e, E, K, SILU,
                HAS_RESET,
            )  # fmt: skip
            d_taps = _weighing(d_taps, d_sum, rows, K)
            d_bias_e += d_sum
            _store_row_if(d_x + (t + u - (K - 1)) * E, e, E, t + u < end, pending[0])
            rows, pending = rows[1:], pending[1:]
    there = s * LANES + b
    for j in tl.static_range(K):
        _store_row(d_kernel + (there * K + j) * E, e, E, BE, d_taps[j])
    _store_row(d_bias + there * E, e, E, BE, d_bias_e)
