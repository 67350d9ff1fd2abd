"""Causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762), over a whole context or over chunks of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from ssm_jax.nn import initializers, key_cache
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.rotary import geometric, rotate
from ssm_jax.nn.state import AttentionState
from ssm_jax.ops.attention import attention, attention_step
from ssm_jax.ops.products import dot_general
from ssm_jax.ops.resets import clear
from ssm_jax.typing import Activations, Positions

_Heads = Float[Array, "B L H P"]
_Keys = Float[Array, "B L G P"]
_Past = Float[Array, "B S G P"]
_Caches = tuple[key_cache.Cache, key_cache.Cache]
_FEW = 512
"""Rows of a state that are read whether they are needed or not."""


class Attention(nn.Module):
    """Softmax attention within blocks: the token at position p of its document sees itself and the p mod W tokens before it.

        q, k, v = u W_q, u W_k, u W_v;  y_t = sum_j softmax_j(q_t . k_j / sqrt(P)) v_j, 0 <= t - j <= p_t mod W;  out = y W_out

    W at least as long as any document is ordinary causal attention; a smaller W is attention over chunks that do not overlap
    (as in the hybrid of Mehta et al. 2022, arXiv:2206.13947: chunks of 512). Rotary angles are those of the place p mod W, which
    never changes within a block, so that keys are kept rotated. With fewer key heads than heads, each serves H / G of them
    (grouped queries: Ainslie et al. 2023, arXiv:2305.13245).

    Positions go up by one from token to token, from 0 or from where the state stands. Beyond the capacity of the state the
    result is NaN.

    Attributes:
        heads: H. head_dim: P. block: W. key_heads: G, None for H.
        bias: whether the four projections carry a bias.
        rotary_base: of the rotary angles (10,000 is usual); None turns nothing.
        rotary_width: of each head, its first entries, which are turned; None for all.
        kernel_init, out_init: initialisers of q, k, v and of the output projection.
    """

    heads: int
    head_dim: int
    block: int
    key_heads: int | None = None
    bias: bool = False
    rotary_base: float | None = None
    rotary_width: int | None = None
    kernel_init: Initializer = initializers.torch_linear
    out_init: Initializer = initializers.torch_linear
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> AttentionState:
        """Zeros: the state before any token, with room for documents of ``capacity`` tokens; None: of any length."""
        places = self.block if capacity is None else min(capacity, self.block)
        cache = jnp.zeros((batch_size, self.key_heads or self.heads, places, self.head_dim), jnp.float32)
        return AttentionState(k=cache, v=cache, position=jnp.zeros((batch_size,), jnp.int32), block=self.block)

    @nn.compact
    def __call__(
        self, x_BLD: Activations, state: AttentionState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, AttentionState]:
        batch, length, d_model = x_BLD.shape
        kinds: dict[str, Any] = {
            "use_bias": self.bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "dot_general": dot_general,
        }
        before = self.init_state(batch) if state is None else state
        position_BL = jnp.maximum(positions_lib.resolve(before.position, length, positions), 0)
        place_BL = position_BL % self.block

        def project(name: str, heads: int) -> Array:
            shape = (heads, self.head_dim)
            return nn.DenseGeneral(shape, kernel_init=self.kernel_init, name=name, **kinds)(x_BLD)

        key_heads = self.key_heads or self.heads
        q, k, v = project("q_proj", self.heads), project("k_proj", key_heads), project("v_proj", key_heads)
        if self.rotary_base is not None:
            frequencies = geometric(self.rotary_width or self.head_dim, self.rotary_base)
            q, k = (rotate(x, place_BL, frequencies) for x in (q, k))
        next_B = positions_lib.next_positions(before.position, length, positions)
        if state is not None and length == 1:
            y_BLHP, caches = _one_more(q, k, v, place_BL, state, positions)
        else:
            y_BLHP = _many(q, k, v, place_BL, state, self.block)
            caches = _caches_after(k, v, before, next_B, positions)
        if before.capacity is not None:
            y_BLHP = jnp.where((position_BL >= before.capacity)[..., None, None], jnp.nan, y_BLHP)
        out = nn.DenseGeneral(d_model, axis=(-2, -1), kernel_init=self.out_init, name="out_proj", **kinds)(y_BLHP)
        return out, AttentionState(*caches, position=next_B, block=self.block)


def _one_more(
    q: _Heads, k: _Keys, v: _Keys, place_BL: Int[Array, "B 1"], state: AttentionState, positions: Positions | None
) -> tuple[_Heads, _Caches]:
    """Attention of a single token, and the caches with its row. An absent token has none."""
    row_B, starts_B = place_BL[:, 0], None
    if positions is not None:
        row_B = jnp.where(positions[:, 0] < 0, state.k.shape[2], row_B)
        starts_B = positions[:, 0] == 0
    pairs = zip((state.k, state.v), key_cache.storable(k, v), strict=True)
    keys, values = (key_cache.write_token(clear(cache, starts_B), x[:, 0], row_B) for cache, x in pairs)
    return attention_step(q[:, 0], keys, values, place_BL[:, 0])[:, None], (keys, values)


def _many(
    q: _Heads, k: _Keys, v: _Keys, place_BL: Int[Array, "B L"], state: AttentionState | None, block: int
) -> _Heads:
    """Attention to the keys of a call and to those of the state before them, at a cost by how many have been read.

    A state may have room for many more than it holds. Of its rows in the order of time the last are taken, the least power of two
    that every query's reach needs.
    """
    if state is None:
        return attention(q, k, v, place_BL, window=block)
    pasts = [key_cache.in_order(cache, state.position, block) for cache in (state.k, state.v)]
    room = pasts[0].shape[1]
    counts = [0, *(2**i for i in range(_FEW.bit_length() - 1, room.bit_length()) if 2**i < room), room]

    def attend(count: int, q: _Heads, k: _Keys, v: _Keys, *pasts: _Past) -> _Heads:
        last = (past[:, room - count :] for past in pasts)
        keys, values = (jnp.concatenate([old.astype(x.dtype), x], axis=1) for old, x in zip(last, (k, v), strict=True))
        return attention(q, keys, values, place_BL, window=block)

    needed = jnp.max(place_BL - jnp.arange(q.shape[1]))
    which = jnp.sum(needed > jnp.asarray(counts[:-1]))
    # A switch keeps what the backward pass of every branch needs; computed again, there is nothing to keep.
    branches = [jax.checkpoint(functools.partial(attend, count)) for count in counts]
    return jax.lax.switch(which, branches, q, k, v, *pasts)


def _caches_after(
    k: _Keys, v: _Keys, before: AttentionState, next_B: Int[Array, "B"], positions: Positions | None
) -> _Caches:
    count_B = positions_lib.lengths(positions)
    if count_B is None:
        count_B = jnp.full_like(next_B, k.shape[1])
    pairs = zip((before.k, before.v), key_cache.storable(k, v), strict=True)
    keys, values = (key_cache.write_tokens(cache, x, count_B, next_B, before.block) for cache, x in pairs)
    return keys, values
