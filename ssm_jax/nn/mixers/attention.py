"""Causal multi-head attention (Vaswani et al. 2017, arXiv:1706.03762), over a whole context or over chunks of it."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.rotary import geometric, rotate
from ssm_jax.nn.state import AttentionState
from ssm_jax.ops.attention import attention, attention_step
from ssm_jax.typing import Activations, Lengths, Positions

_Heads = Float[Array, "B L H P"]


class Attention(nn.Module):
    """Softmax attention within blocks: the token at position p of its document sees itself and the p mod W tokens before it.

        q, k, v = u W_q, u W_k, u W_v;  y_t = sum_j softmax_j(q_t . k_j / sqrt(P)) v_j, 0 <= t - j <= p_t mod W;  out = y W_out

    W at least as long as any document is ordinary causal attention; a smaller W is attention over chunks that do not overlap
    (as in the hybrid of Mehta et al. 2022, arXiv:2206.13947: chunks of 512). Rotary angles are those of the place p mod W, which
    never changes within a block, so that keys are kept rotated.

    Positions go up by one from token to token, from 0 or from where the state stands.

    Attributes:
        heads: H. head_dim: P. block: W.
        bias: whether the four projections carry a bias.
        rotary_base: of the rotary angles (10,000 is usual); None turns nothing.
        kernel_init, out_init: initialisers of q, k, v and of the output projection.
    """

    heads: int
    head_dim: int
    block: int
    bias: bool = False
    rotary_base: float | None = None
    kernel_init: Initializer = initializers.torch_linear
    out_init: Initializer = initializers.torch_linear
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int) -> AttentionState:
        """Zeros: the state before any token."""
        window = jnp.zeros((batch_size, self.heads, self.block - 1, self.head_dim), jnp.float32)
        return AttentionState(k=window, v=window, position=jnp.zeros((batch_size,), jnp.int32))

    @nn.compact
    def __call__(
        self, x_BLD: Activations, state: AttentionState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, AttentionState]:
        batch, length, d_model = x_BLD.shape
        kinds: dict[str, Any] = {"use_bias": self.bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        start_B = state.position if state else jnp.zeros((batch,), jnp.int32)
        place_BL = jnp.maximum(positions_lib.resolve(start_B, length, positions), 0) % self.block

        def project(name: str) -> Array:
            shape = (self.heads, self.head_dim)
            return nn.DenseGeneral(shape, kernel_init=self.kernel_init, name=name, **kinds)(x_BLD)

        q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
        if self.rotary_base is not None:
            frequencies = geometric(self.head_dim, self.rotary_base)
            q, k = (rotate(x, place_BL, frequencies) for x in (q, k))
        y_BLHP, windows = self._attend(q, k, v, place_BL, state, positions)
        out = nn.DenseGeneral(d_model, axis=(-2, -1), kernel_init=self.out_init, name="out_proj", **kinds)(y_BLHP)

        next_B = positions_lib.next_positions(start_B, length, positions)
        lags = jnp.arange(self.block - 1, 0, -1)
        reached_BS = lags <= (next_B % self.block)[:, None]
        k, v = (jnp.where(reached_BS[:, None, :, None], x, 0).astype(jnp.float32) for x in windows)
        return out, AttentionState(k=k, v=v, position=next_B)

    def _attend(
        self,
        q: _Heads,
        k: _Heads,
        v: _Heads,
        place_BL: Int[Array, "B L"],
        state: AttentionState | None,
        positions: Positions | None,
    ) -> tuple[_Heads, list[Array]]:
        """The attention's result, and the last W-1 present keys and values, [B, H, W-1, P]."""
        past = [x.astype(q.dtype) for x in (state.k, state.v)] if state else None
        if past and q.shape[1] == 1:
            if positions is not None:
                past = [jnp.where(positions[:, :, None, None] == 0, 0, x) for x in past]
            y_BHP = attention_step(q[:, 0], k[:, 0], v[:, 0], past[0], past[1], place_BL[:, 0])
            moved = [
                jnp.concatenate([x, new[:, 0, :, None]], axis=2)[:, :, 1:] for x, new in zip(past, (k, v), strict=True)
            ]
            if positions is not None:
                moved = [jnp.where(positions[:, :, None, None] < 0, x, y) for x, y in zip(past, moved, strict=True)]
            return y_BHP[:, None], moved
        if past:
            k, v = (jnp.concatenate([jnp.swapaxes(old, 1, 2), x], axis=1) for old, x in zip(past, (k, v), strict=True))
        y_BLHP = attention(q, k, v, place_BL, window=self.block)
        lengths = positions_lib.lengths(positions)
        return y_BLHP, [jnp.swapaxes(_window(x, q.shape[1], lengths, self.block - 1), 1, 2) for x in (k, v)]


def _window(
    x_BSHP: Float[Array, "B S H P"], length: int, lengths: Lengths | None, size: int
) -> Float[Array, "B window H P"]:
    """The last ``size`` rows that are present, oldest first, zeros before them.

    ``x_BSHP``: the old window, if any, and ``length`` new rows, of which ``lengths`` are present.
    """
    missing = size + length - x_BSHP.shape[1]
    x_BSHP = jnp.pad(x_BSHP, ((0, 0), (missing, 0), (0, 0), (0, 0)))
    if lengths is None:
        return x_BSHP[:, length:]
    rows = lengths[:, None] + jnp.arange(size)
    return jnp.take_along_axis(x_BSHP, rows[..., None, None], axis=1)
