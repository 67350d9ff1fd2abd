"""Multi-head attention within a chunk and to the whole chunk before it (BakaLLM's use of the XL cache)."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from ssm_jax.nn import initializers
from ssm_jax.nn.key_cache import write_token
from ssm_jax.nn.rotary import geometric, rotate
from ssm_jax.nn.slots import Slots
from ssm_jax.nn.state import ChunkAttentionState
from ssm_jax.ops.joint_attention import Part, joint_attention
from ssm_jax.ops.products import dot_general
from ssm_jax.typing import Activations


class Cache(NamedTuple):
    """Keys and values of a closed chunk, [B, H, S, P] and [B, H, S, Q], and how many there are in each lane.

    Keys are turned by their place less the chunk's length: by how far they stand before the next chunk.
    """

    k: Any
    v: Any
    count_B: Int[Array, "B"]


class ChunkAttention(nn.Module):
    """y_t = sum_j softmax_j(q_t . k_j / sqrt(P)) v_j over the slots j <= t of the open chunk and all of the chunk before it.

    Rotary angles are those of the place in the chunk, at and after 0 in the open one and before 0 in the one before, so that they
    never exceed two chunks: what the XL cache of Transformer-XL (Dai et al. 2019, arXiv:1901.02860) becomes with rotary positions.
    BakaLLM stores keys unturned and turns all of them in every call; here a key is turned where it is made, and once more by the
    length of its chunk when that is closed. The scores are the same, and a decoded token turns one key instead of two chunks.

    Attributes:
        heads: H. head_dim: P, of queries and keys. value_dim: Q. places: S, the slots of the longest chunk.
        cached: whether the chunk before is kept.
        rotary_base: of the angles base^(-2 i / P).
    """

    heads: int
    head_dim: int
    value_dim: int
    places: int
    cached: bool = True
    rotary_base: float = 10_000.0
    kernel_init: Initializer = initializers.torch_linear
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> ChunkAttentionState:
        """Zeros: the state before any token, of one size."""
        k = jnp.zeros((batch_size, self.heads, self.places, self.head_dim), jnp.float32)
        v = jnp.zeros((batch_size, self.heads, self.places, self.value_dim), jnp.float32)
        count = jnp.zeros((batch_size,), jnp.int32)
        return ChunkAttentionState(k, v, k, v, count) if self.cached else ChunkAttentionState(k, v, None, None, None)

    @nn.compact
    def __call__(
        self, x_BTD: Activations, state: ChunkAttentionState, slots: Slots, before: Cache | None
    ) -> tuple[Activations, ChunkAttentionState]:
        """``before``: the cache that is read, this layer's own or another's; None for none."""
        kinds: dict[str, Any] = {
            "use_bias": False,
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "dot_general": dot_general,
        }
        frequencies = geometric(self.head_dim, self.rotary_base)
        place_BT = jnp.maximum(slots.place_BT, 0)

        def project(name: str, width: int) -> Float[Array, "B T H P"]:
            return nn.DenseGeneral((self.heads, width), name=name, **kinds)(x_BTD)

        q, k = (rotate(project(name, self.head_dim), place_BT, frequencies) for name in ("q_proj", "k_proj"))
        v = project("v_proj", self.value_dim)
        k_BHSP, v_BHSQ = (self._held(old, new, slots) for old, new in ((state.k, k), (state.v, v)))
        place_S = jnp.arange(k_BHSP.shape[2])
        if slots.start_B is None:  # the chunk begins in this call: nothing lies in places that it does not reach
            k_BHTP, v_BHTQ = (jnp.swapaxes(x, 1, 2) for x in (k, v))
            parts = [Part(k_BHTP, v_BHTQ, jnp.arange(k.shape[1]) <= slots.place_BT[..., None])]
        else:
            parts = [Part(k_BHSP, v_BHSQ, place_S <= slots.place_BT[..., None])]
        if before is not None:
            seen_BTS = (place_S < before.count_B[:, None, None]) & slots.present_BT[..., None]
            parts.append(Part(before.k, before.v, seen_BTS))
        y_BTHQ = joint_attention(q, parts)
        out = nn.DenseGeneral(x_BTD.shape[-1], axis=(-2, -1), name="out_proj", **kinds)(y_BTHQ)
        return out, self._closed(dataclasses.replace(state, k=k_BHSP, v=v_BHSQ), slots)

    def _held(
        self, old_BHSP: Float[Array, "B H S P"], new_BTHP: Float[Array, "B T H P"], slots: Slots
    ) -> Float[Array, "B H S P"]:
        """The open chunk's keys or values with the new ones at their places."""
        new_BHTP = jnp.swapaxes(new_BTHP, 1, 2).astype(old_BHSP.dtype)
        place_S, count = jnp.arange(self.places), new_BHTP.shape[2]
        if slots.start_B is not None and count == 1:
            row_B = jnp.where(slots.present_BT[:, 0], slots.place_BT[:, 0], self.places)
            return write_token(old_BHSP, new_BHTP[:, :, 0], row_B)
        start_B1 = jnp.zeros((1, 1), jnp.int32) if slots.start_B is None else slots.start_B[:, None]
        is_new_BS = (place_S >= start_B1) & (place_S < slots.end_B[:, None])
        if slots.start_B is None:
            aligned = jnp.pad(new_BHTP, ((0, 0), (0, 0), (0, max(self.places - count, 0)), (0, 0)))[:, :, : self.places]
        else:
            source_BS = jnp.clip(place_S - start_B1, 0, count - 1)
            aligned = jnp.take_along_axis(new_BHTP, source_BS[:, None, :, None], axis=2)
        return jnp.where(is_new_BS[:, None, :, None], aligned, old_BHSP)

    def _closed(self, state: ChunkAttentionState, slots: Slots) -> ChunkAttentionState:
        """In lanes whose chunk ends the open chunk becomes the one before."""
        if not (self.cached and slots.may_close):
            return state
        frequencies = geometric(self.head_dim, self.rotary_base)
        turned = rotate(jnp.swapaxes(state.k, 1, 2), -slots.end_B[:, None], frequencies)
        closed = slots.closed_B[:, None, None, None]
        return dataclasses.replace(
            state,
            past_k=jnp.where(closed, jnp.swapaxes(turned, 1, 2), state.past_k),
            past_v=jnp.where(closed, state.v, state.past_v),
            past_count=jnp.where(slots.closed_B, slots.end_B, state.past_count),
        )
