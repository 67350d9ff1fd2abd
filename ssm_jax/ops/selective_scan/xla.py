"""The selective scan in plain JAX: sequential in time, parallel over lanes and channels, in the memory of one chunk.

An associative scan would hold B * L * N * E decays and inputs, several times over. Here a loop over chunks contains a loop over
tokens; nothing larger than one chunk of states exists, and only the state entering each chunk is kept for the backward pass, which
computes the states of a chunk again. What makes it fast:

* Decays are computed where they are used: an exponential costs less than loading it.
* The backward pass stores p_t = exp(dt_t A) h_{t-1}, the state before the token's own input is added. With q_t, the gradient that
  reaches h_t from later tokens, every gradient is a sum of products of p_t and g_t, taken while both are in cache:

      g_t = q_t + dy_t C_t                     q_{t-1} = exp(dt_t A) g_t
      d(dt_t x_t) = sum_n g_t B_t              dB_t = sum_e q_t dt_t x_t + C_t s_t
      d(dt_t)    += sum_n g_t p_t A            dC_t = sum_e p_t dy_t     + B_t s_t,      s_t = sum_e dy_t dt_t x_t
      dA         += dt_t g_t p_t

* Sums over the state entries are written out entry by entry: vector code over channels.
* Channels are split into up to 8 groups, and sums over channels (dB, dC) stay one per group until all tokens are done. So a mesh
  that splits the channels adds them up once, not once per token.
* dA is the sum of two, over even and over odd tokens. XLA:CPU shares the work of a plain sum among its threads, who then wait
  for each other at every token; an element of a stack it updates in place, by itself.

Axes in this file: B lane, K chunk, T token of a chunk, S channel group, N state entry, E channel of a group.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ssm_jax.ops.selective_scan.inputs import Inputs, skip_and_gate, step_size

MIN_GROUP_SIZE = 128


class _Sequences(NamedTuple):
    """Everything that has a time axis (axis 1), filled up to whole chunks; also one chunk of it."""

    x_BTSE: Array
    dt_BTSE: Array
    z_BTSE: Array | None
    B_BTN: Array
    C_BTN: Array
    reset_BT: Array | None
    present_BT: Array | None


class _Parameters(NamedTuple):
    """D and dt_bias are repeated per lane: a mesh that splits the lanes adds their gradients up once, at the end."""

    A_SNE: Array
    D_B1SE: Array | None
    dt_bias_B1SE: Array | None


class _Tokens(NamedTuple):
    """What the recurrence sees of a chunk: [B, T, ...]. And of one token, with axes that broadcast against a state [B, S, N, E]."""

    dt: Array
    u: Array
    B: Array
    C: Array
    reset: Array | None

    def at(self, t: Array) -> "_Tokens":
        reset = None if self.reset is None else _at(self.reset, t)[:, None, None, None]
        dt, u = (_at(v, t)[:, :, None] for v in (self.dt, self.u))
        B, C = (_at(v, t)[:, None, :, None] for v in (self.B, self.C))
        return _Tokens(dt, u, B, C, reset)


def forward(inputs: Inputs, *, dt_softplus: bool, chunk_size: int) -> tuple[Array, Array, Array]:
    """y_BLE, the last state_BNE, and the states_KBNE that enter the chunks."""
    length = inputs.x_BLE.shape[1]
    if length == 1:
        return _one_token(inputs, dt_softplus=dt_softplus)
    parameters, state, sequences = _group(inputs, chunk_size)
    chunks = sequences.x_BTSE.shape[1] // chunk_size

    def run_chunk(k: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state, states, y = carry
        states = lax.dynamic_update_index_in_dim(states, _ungroup_state(state), k, 0)
        chunk = _chunk(sequences, k, chunk_size)
        dt, u = _discretise(chunk.x_BTSE, chunk.dt_BTSE, parameters.dt_bias_B1SE, chunk.present_BT, dt_softplus)
        tokens = _Tokens(dt, u, chunk.B_BTN, chunk.C_BTN, chunk.reset_BT)

        def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            state, y = carry
            token = tokens.at(t)
            state = _decay(state, token, parameters.A_SNE) + token.u * token.B
            y_t = _sum_over_entries(lambda n: state[:, :, n] * token.C[:, :, n], state.shape[2])
            return state, lax.dynamic_update_index_in_dim(y, y_t, t, 1)

        state, y_chunk = lax.fori_loop(0, chunk_size, step, (state, jnp.zeros_like(u)))
        y_chunk = skip_and_gate(y_chunk, chunk.x_BTSE, parameters.D_B1SE, chunk.z_BTSE).astype(y.dtype)
        return state, states, lax.dynamic_update_slice_in_dim(y, y_chunk, k * chunk_size, 1)

    states = jnp.zeros((chunks, *inputs.state_BNE.shape), state.dtype)
    y = jnp.zeros_like(sequences.x_BTSE)
    state, states, y = lax.fori_loop(0, chunks, run_chunk, (state, states, y))
    return _ungroup(y)[:, :length], _ungroup_state(state), states


def backward(
    inputs: Inputs, states_KBNE: Array, d_y_BLE: Array, d_state_BNE: Array, *, dt_softplus: bool, chunk_size: int
) -> Inputs:
    """Gradients with respect to ``inputs``, from the states that entered the chunks; None for reset and lengths."""
    parameters, state, sequences = _group(inputs, chunk_size)
    length, chunks = inputs.x_BLE.shape[1], states_KBNE.shape[0]
    groups, entries = parameters.A_SNE.shape[:2]
    d_y = _split_channels(_fill(d_y_BLE, chunk_size), groups)

    def run_chunk(i: Array, carry: Any) -> Any:
        q, p_T, d_sequences, d_parameters = carry
        k = chunks - 1 - i
        chunk = _chunk(sequences, k, chunk_size)
        (dt, u), pull_dt_u = jax.vjp(
            lambda x, dt, dt_bias: _discretise(x, dt, dt_bias, chunk.present_BT, dt_softplus),
            chunk.x_BTSE,
            chunk.dt_BTSE,
            parameters.dt_bias_B1SE,
        )
        tokens = _Tokens(dt, u, chunk.B_BTN, chunk.C_BTN, chunk.reset_BT)
        state = _split_state(_at(states_KBNE, k, 0), groups)
        p_T, y_chunk = _states_again(state, tokens, parameters.A_SNE, p_T)
        out, pull_out = jax.vjp(skip_and_gate, y_chunk, chunk.x_BTSE, parameters.D_B1SE, chunk.z_BTSE)
        d_out = lax.dynamic_slice_in_dim(d_y, k * chunk_size, chunk_size, 1).astype(out.dtype)
        d_y_chunk, d_x, d_D, d_z = pull_out(d_out)
        q, d_A, d_tokens = _token_gradients(q, d_parameters.A_SNE, tokens, p_T, d_y_chunk, parameters.A_SNE)
        d_x_too, d_dt, d_dt_bias = pull_dt_u((d_tokens.dt, d_tokens.u))
        d_chunk = _Sequences(d_x + d_x_too, d_dt, d_z, d_tokens.B, d_tokens.C, None, None)
        d_sequences = jax.tree.map(
            lambda d, d_k: lax.dynamic_update_slice_in_dim(d, d_k.astype(d.dtype), k * chunk_size, 1),
            d_sequences,
            d_chunk,
        )
        d_parameters = _Parameters(d_A, *jax.tree.map(jnp.add, d_parameters[1:], (d_D, d_dt_bias)))
        return q, p_T, d_sequences, d_parameters

    p_T = jnp.zeros((chunk_size, *state.shape), state.dtype)
    per_group = jnp.zeros((*sequences.x_BTSE.shape[:3], entries), state.dtype)
    d_sequences = jax.tree.map(jnp.zeros_like, sequences)._replace(
        B_BTN=per_group, C_BTN=per_group, reset_BT=None, present_BT=None
    )
    d_parameters = jax.tree.map(jnp.zeros_like, parameters)._replace(A_SNE=jnp.zeros((2, *state.shape), state.dtype))
    q, _, d_sequences, d_parameters = lax.fori_loop(
        0, chunks, run_chunk, (_split_state(d_state_BNE, groups), p_T, d_sequences, d_parameters)
    )
    d_x, d_dt, d_z, d_B, d_C = jax.tree.map(lambda d: d[:, :length], d_sequences[:5])
    d_x, d_dt, d_z = jax.tree.map(_ungroup, (d_x, d_dt, d_z))
    d_D, d_dt_bias = jax.tree.map(lambda d: d.sum((0, 1)).reshape(-1), d_parameters[1:])
    return Inputs(
        x_BLE=d_x,
        dt_BLE=d_dt,
        A_NE=_ungroup_state(d_parameters.A_SNE.sum((0, 1))),
        B_BLN=d_B.sum(2).astype(inputs.B_BLN.dtype),
        C_BLN=d_C.sum(2).astype(inputs.C_BLN.dtype),
        D_E=d_D,
        z_BLE=d_z,
        dt_bias_E=d_dt_bias,
        state_BNE=_ungroup_state(q),
        reset_BL=None,
        lengths_B=None,
    )


def _states_again(state: Array, tokens: _Tokens, A: Array, p_T: Array) -> tuple[Array, Array]:
    """p_t of all tokens of a chunk, and y before skip and gate. What ``p_T`` held is overwritten: a buffer for all chunks.

    The loop carries p_t itself, with the input of the token before still to come: p_t = exp(dt_t A) (p_{t-1} + u_{t-1} B_{t-1}).
    """
    tokens_before = tokens._replace(u=_shift(tokens.u), B=_shift(tokens.B))

    def step(t: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        p, p_T, y = carry
        token, before = tokens.at(t), tokens_before.at(t)
        p = _decay(p + before.u * before.B, token, A)
        y_t = _sum_over_entries(
            lambda n: (p[:, :, n] + token.u[:, :, 0] * token.B[:, :, n]) * token.C[:, :, n], A.shape[1]
        )
        p_T = lax.dynamic_update_index_in_dim(p_T, p, t, 0)
        return p, p_T, lax.dynamic_update_index_in_dim(y, y_t, t, 1)

    _, p_T, y = lax.fori_loop(0, p_T.shape[0], step, (state, p_T, jnp.zeros_like(tokens.u)))
    return p_T, y


def _token_gradients(
    q: Array, d_A: Array, tokens: _Tokens, p_T: Array, d_y: Array, A: Array
) -> tuple[Array, Array, _Tokens]:
    """From q at the end of a chunk to q before it, dA with the chunk's share added, and the gradients of its tokens.

    d(dt) is the part through the decay only; dB and dC are per channel group.
    """
    chunk_size, entries = p_T.shape[0], A.shape[1]

    def step(i: Array, carry: tuple[Array, Array, _Tokens]) -> tuple[Array, Array, _Tokens]:
        q, d_A, d_tokens = carry
        t = chunk_size - 1 - i
        token, p, d_y_t = tokens.at(t), _at(p_T, t, 0), _at(d_y, t)[:, :, None]

        def g(n: int) -> Array:
            return q[:, :, n] + d_y_t[:, :, 0] * token.C[:, :, n]

        d_token = _Tokens(
            dt=_sum_over_entries(lambda n: g(n) * p[:, :, n] * A[:, n], entries),
            u=_sum_over_entries(lambda n: g(n) * token.B[:, :, n], entries),
            B=_matmul("bsne,bsoe->bsn", q, token.u),
            C=_matmul("bsne,bsoe->bsn", p, d_y_t),
            reset=None,
        )
        d_tokens = jax.tree.map(lambda d, d_t: lax.dynamic_update_index_in_dim(d, d_t, t, 1), d_tokens, d_token)
        g_all = q + d_y_t * token.C
        d_A = lax.dynamic_update_index_in_dim(d_A, _at(d_A, t % 2, 0) + token.dt * g_all * p, t % 2, 0)
        return _decay(g_all, token, A), d_A, d_tokens

    per_channel = jnp.zeros_like(tokens.u)
    per_group = jnp.zeros((*tokens.u.shape[:3], entries), tokens.u.dtype)
    d_tokens = _Tokens(per_channel, per_channel, per_group, per_group, None)
    q, d_A, d_tokens = lax.fori_loop(0, chunk_size, step, (q, d_A, d_tokens))
    s = _matmul("btse,btse->bts", d_y, tokens.u)[..., None]
    d_B, d_C = d_tokens.B + tokens.C[:, :, None] * s, d_tokens.C + tokens.B[:, :, None] * s
    return q, d_A, d_tokens._replace(B=d_B, C=d_C)


def _one_token(inputs: Inputs, *, dt_softplus: bool) -> tuple[Array, Array, Array]:
    """The decoding step, in closed form."""
    wide = inputs.state_BNE.dtype
    x, dt, B, C = (v[:, 0].astype(wide) for v in (inputs.x_BLE, inputs.dt_BLE, inputs.B_BLN, inputs.C_BLN))
    z = None if inputs.z_BLE is None else inputs.z_BLE[:, 0].astype(wide)
    present = None if inputs.lengths_B is None else inputs.lengths_B[:, None] > 0
    dt = step_size(dt, inputs.dt_bias_E, present, softplus=dt_softplus)
    x, dt = jnp.moveaxis(_materialise(jnp.stack([x, dt], axis=1)), 1, 0)
    state = jnp.exp(dt[:, None] * _materialise(inputs.A_NE)) * inputs.state_BNE
    if inputs.reset_BL is not None:
        state = jnp.where(inputs.reset_BL[:, :, None], 0.0, state)
    state += B[:, :, None] * (dt * x)[:, None]
    y = skip_and_gate(_matmul("bn,bne->be", C, state), x, inputs.D_E, z)
    return y[:, None].astype(inputs.x_BLE.dtype), state, inputs.state_BNE[None]


def _discretise(
    x: Array, dt: Array, dt_bias: Array | None, present: Array | None, softplus: bool
) -> tuple[Array, Array]:
    """The step sizes and dt_t x_t."""
    present = None if present is None else present[:, :, None, None]
    dt = step_size(dt, dt_bias, present, softplus=softplus)
    return dt, dt * x


def _decay(state: Array, token: _Tokens, A: Array) -> Array:
    """exp(dt_t A) times the state (or, backwards, times its gradient), exactly 0 at the start of a document."""
    decayed = jnp.exp(token.dt * A) * state
    return decayed if token.reset is None else jnp.where(token.reset, 0.0, decayed)


def _sum_over_entries(term: Callable[[int], Array], entries: int) -> Array:
    return functools.reduce(jnp.add, map(term, range(entries)))


def _materialise(v: Array) -> Array:
    """v itself. XLA:CPU fuses whatever it can, and would compute v anew for every state entry; it does not fuse into products."""

    def through_product(v: Array) -> Array:
        eye = jnp.broadcast_to(jnp.eye(v.shape[-2], dtype=v.dtype), (*v.shape[:-2], v.shape[-2], v.shape[-2]))
        return _matmul("...ij,...jk->...ik", eye, v)

    return lax.platform_dependent(v, cpu=through_product, default=lambda v: v)


def _matmul(axes: str, *arrays: Array) -> Array:
    return jnp.einsum(axes, *arrays, precision=lax.Precision.HIGHEST)


def _chunk(sequences: _Sequences, k: Array, chunk_size: int) -> _Sequences:
    """Chunk k, widened to float32: inputs of lower precision exist wide one chunk at a time."""
    wide = jnp.promote_types(sequences.x_BTSE.dtype, jnp.float32)

    def cut(v: Array) -> Array:
        v = lax.dynamic_slice_in_dim(v, k * chunk_size, chunk_size, 1)
        return v if v.dtype == bool else v.astype(wide)

    return jax.tree.map(cut, sequences)


def _at(v: Array, t: Array, axis: int = 1) -> Array:
    return lax.dynamic_index_in_dim(v, t, axis, keepdims=False)


def _group(inputs: Inputs, chunk_size: int) -> tuple[_Parameters, Array, _Sequences]:
    """Channels split into groups, and the time axis filled up to whole chunks with absent tokens."""
    batch, length, channels = inputs.x_BLE.shape
    groups = max(g for g in (1, 2, 4, 8) if g == 1 or channels % (g * MIN_GROUP_SIZE) == 0)
    split = functools.partial(_split_channels, groups=groups)

    def per_lane(v: Array | None) -> Array | None:
        return None if v is None else jnp.broadcast_to(split(v), (batch, 1, groups, channels // groups))

    present = None
    if inputs.lengths_B is not None or length % chunk_size:
        lengths = jnp.full(batch, length) if inputs.lengths_B is None else inputs.lengths_B
        present = jnp.arange(-(-length // chunk_size) * chunk_size) < lengths[:, None]
    x, dt, z, B, C, reset = jax.tree.map(
        functools.partial(_fill, chunk_size=chunk_size),
        (inputs.x_BLE, inputs.dt_BLE, inputs.z_BLE, inputs.B_BLN, inputs.C_BLN, inputs.reset_BL),
    )
    sequences = _Sequences(split(x), split(dt), None if z is None else split(z), B, C, reset, present)
    parameters = _Parameters(_split_state(inputs.A_NE, groups), per_lane(inputs.D_E), per_lane(inputs.dt_bias_E))
    return parameters, _split_state(inputs.state_BNE, groups), sequences


def _shift(v: Array) -> Array:
    """What the token before had; zeros for the first one."""
    return jnp.pad(v[:, :-1], [(0, 0), (1, 0), *[(0, 0)] * (v.ndim - 2)])


def _fill(v: Array, chunk_size: int) -> Array:
    fill = -v.shape[1] % chunk_size
    return jnp.pad(v, [(0, 0), (0, fill), *[(0, 0)] * (v.ndim - 2)]) if fill else v


def _split_channels(v: Array, groups: int) -> Array:
    return v.reshape(*v.shape[:-1], groups, -1)


def _split_state(v: Array, groups: int) -> Array:
    return jnp.moveaxis(_split_channels(v, groups), -2, -3)


def _ungroup(v: Array) -> Array:
    return v.reshape(*v.shape[:-2], -1)


def _ungroup_state(v: Array) -> Array:
    return _ungroup(jnp.moveaxis(v, -3, -2))
