"""In chunks: inside a chunk a convolution by FFT, between chunks the state. One chunk is the convolution alone.

For the tokens t = 0 .. T-1 of a chunk that is entered with the state X and has m tokens present, with a = exp(lambda):

    y_t  = sum_{j <= t} K_{t-j} s_j + Re(sum_n c_n a_n^{t+1} X_n) + D s_t
    X'_n = a_n^m X_n + sum_{j < m} a_n^{m-1-j} s_j

All but the first sum are matrix products with a table of powers of a. Resets are selections: sums over j go back to the last
document start only, and X reaches only the tokens before the first one.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float, Int

from ssm_jax.ops.dss.inputs import Inputs
from ssm_jax.ops.dss.powers import exponentials, powers
from ssm_jax.ops.linear_recurrence import linear_recurrence
from ssm_jax.ops.long_convolution import long_convolution

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

Result = tuple[Float[Array, "B L H"], Float[Array, "B H 2 N"]]


def kernel(table_T2N: Float[Array, "T 2 N"], c_H2N: Float[Array, "H 2 N"]) -> Float[Array, "T H"]:
    """K_t = Re(sum_n c_n a_n^t), from the powers of a."""
    return _product("tpn,hpn->th", table_T2N, _conjugate(c_H2N))


def forward(inputs: Inputs, *, chunk_size: int) -> Result:
    """The op on any number of tokens."""
    if inputs.s_BLH.shape[1] == 1:
        return _step(inputs)
    batch, length, width = inputs.s_BLH.shape
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    present = _present(inputs, chunks * chunk_size)
    s, reset = inputs.s_BLH, inputs.reset
    if present is not None:
        padding = [(0, 0), (0, chunks * chunk_size - length)]
        s = jnp.where(present[..., None], jnp.pad(s, [*padding, (0, 0)]), 0)
        reset = None if reset is None else jnp.pad(reset, padding) & present
    s = s.reshape(batch, chunks, chunk_size, width)
    reset, present = (None if x is None else x.reshape(batch, chunks, chunk_size) for x in (reset, present))
    table = powers(inputs.modes, chunk_size + 1)
    known = inputs.kernel_TH
    if known is None or known.shape[0] < chunk_size:
        known = kernel(table[:-1], inputs.c_H2N)
    y = long_convolution(s, known[:chunk_size], reset) + inputs.D_H * s
    entering, state = _states(inputs, s, reset, present, table)
    if entering is not None:
        read = _product("tpn,bchpn->bcth", table[1:], _conjugate(_times(inputs.c_H2N, entering)))
        y = y + (read if reset is None else jnp.where(_begun(reset)[..., None], 0, read))
    return y.reshape(batch, -1, width)[:, :length], state


def _step(inputs: Inputs) -> Result:
    """One token: a multiplication by a and a sum over n."""
    s = inputs.s_BLH[:, 0]
    a = exponentials(inputs.modes, jnp.int32(1))
    if inputs.state is None:
        before, turned = jnp.zeros((), s.dtype), jnp.zeros((*s.shape, *a.shape), s.dtype)
    else:
        before, turned = inputs.state, _times(a, inputs.state)
    if inputs.reset is not None:
        turned = jnp.where(inputs.reset[:, 0, None, None, None], 0, turned)
    state = turned + jnp.stack([s, jnp.zeros_like(s)], axis=-1)[..., None]
    y = _product("hpn,bhpn->bh", _conjugate(inputs.c_H2N), state) + inputs.D_H * s
    if inputs.lengths is not None:
        state = jnp.where((inputs.lengths > 0)[:, None, None, None], state, before)
    return y[:, None], state


def _states(
    inputs: Inputs, s: Array, reset: Array | None, present: Array | None, table: Array
) -> tuple[Float[Array, "B C H 2 N"] | None, Float[Array, "B H 2 N"]]:
    """The state that enters each chunk (None: zeros), and that after the last present token."""
    kept = s if reset is None else jnp.where(_last_document(reset)[..., None], s, 0)
    if present is None:
        decay = table[-1][None, None]
    else:
        count = jnp.sum(present, axis=-1, dtype=jnp.int32)
        decay, kept = exponentials(inputs.modes, count), _to_the_end(kept, count)
    added = _product("bcth,tpn->bchpn", kept, table[-2::-1])
    if s.shape[1] == 1 and inputs.state is None:
        return None, added[:, 0]
    state = jnp.zeros_like(added[:, 0]) if inputs.state is None else inputs.state
    starts = None if reset is None else jnp.any(reset, axis=-1)
    a = jnp.broadcast_to(decay, (decay.shape[0], s.shape[1], *decay.shape[2:]))[:, :, None]
    after, last = linear_recurrence(_complex(a), _complex(added), _complex(state), starts)
    entering = jnp.concatenate([state[:, None], _parts(after[:, :-1])], axis=1)
    return entering, _parts(last)


def _present(inputs: Inputs, padded: int) -> Bool[Array, "B L"] | None:
    """Which of the padded row's tokens are there; None where all are."""
    batch, length, _ = inputs.s_BLH.shape
    if inputs.lengths is None and padded == length:
        return None
    lengths = jnp.full((batch,), length) if inputs.lengths is None else inputs.lengths
    return jnp.arange(padded) < lengths[:, None]


def _begun(reset: Bool[Array, "B C T"]) -> Bool[Array, "B C T"]:
    """Whether a document has begun in the chunk, up to each token."""
    return jnp.cumsum(reset, axis=-1) > 0


def _last_document(reset: Bool[Array, "B C T"]) -> Bool[Array, "B C T"]:
    """Whether no document begins after the token in its chunk."""
    begun = jnp.cumsum(reset, axis=-1)
    return begun == begun[..., -1:]


def _to_the_end(s: Float[Array, "B C T H"], count: Int[Array, "B C"]) -> Float[Array, "B C T H"]:
    """The first ``count`` tokens of each chunk moved to its end; zeros before them."""
    source = jnp.arange(s.shape[2]) - (s.shape[2] - count[..., None])
    moved = jnp.take_along_axis(s, jnp.maximum(source, 0)[..., None], axis=2)
    return jnp.where((source >= 0)[..., None], moved, 0)


def _times(a: Float[Array, "*left 2 N"], b: Float[Array, "*right 2 N"]) -> Float[Array, "*both 2 N"]:
    """The complex product, parts on the second axis from the end."""
    (a_re, a_im), (b_re, b_im) = ((x[..., 0, :], x[..., 1, :]) for x in (a, b))
    return jnp.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], axis=-2)


def _conjugate(x: Float[Array, "*rest 2 N"]) -> Float[Array, "*rest 2 N"]:
    """Re(x y) is the scalar product of this with y."""
    return jnp.stack([x[..., 0, :], -x[..., 1, :]], axis=-2)


def _complex(x: Float[Array, "*rest 2 N"]) -> Complex[Array, "*rest N"]:
    return lax.complex(x[..., 0, :], x[..., 1, :])


def _parts(x: Complex[Array, "*rest N"]) -> Float[Array, "*rest 2 N"]:
    return jnp.stack([x.real, x.imag], axis=-2)
