"""BakaLLM's layer: attention, perceptron and step side by side, each behind a gate, and a recurrent mixer after them."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from ssm_jax.nn import initializers
from ssm_jax.nn.mixers.chunk_attention import Cache, ChunkAttention
from ssm_jax.nn.slots import Slots
from ssm_jax.nn.state import ChunkAttentionState, ChunkLayerState
from ssm_jax.nn.step_forward import StepForward
from ssm_jax.ops.products import dot_general
from ssm_jax.typing import Activations

GATES: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
}
"""By name; the slope of "leaky_relu" below zero is 0.01."""
GateInput = Literal["input", "output", "difference"]
"""What a branch's gate reads: what the branch read, n, what it gave, y, or y - n."""


class ChunkLayer(nn.Module):
    """n = norm(h);  h <- h + gate(mixer(n)) + gate(mlp(n)) + gate(step(n));  h <- h + mamba(mamba_norm(h)).

    gate(y) = y * activation(W u), with a matrix W for each branch; u: see ``gate_reads``.

    Attributes:
        mixer: attention within chunks. mlp: the perceptron.
        step: None for none. gate: a key of ``GATES``, None for none. gate_reads: see ``GateInput``.
        mamba: any mixer ``(x, state, positions) -> (y, state)``, after its own norm; None for none. A chunk begins with a fresh
            state, as published. With ``mamba_carried`` it goes on from the chunk before, at positions that begin again: for mixers
            that do not turn anything by them.
        cache: whether attention reads its own layer's cache ("same"), that of the layer below ("below", nothing in the first
            layer), or none.
    """

    norm: nn.Module
    mixer: ChunkAttention
    mlp: nn.Module
    step: StepForward | None = None
    gate: str | None = None
    gate_reads: GateInput = "input"
    mamba_norm: nn.Module | None = None
    mamba: nn.Module | None = None
    mamba_carried: bool = False
    cache: Literal["same", "below"] | None = "same"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, width: int) -> ChunkLayerState:
        """Zeros: the state before any token."""
        return ChunkLayerState(
            attention=self.mixer.init_state(batch_size),
            mixer=None if self.mamba is None else self.mamba.init_state(batch_size),
            window=None if self.step is None else self.step.init_state(batch_size, width),
        )

    @nn.compact
    def __call__(
        self,
        h_BTD: Activations,
        state: ChunkLayerState,
        slots: Slots,
        below: Cache | None = None,
        step_kernel: Float[Array, "K D E"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Activations, ChunkLayerState, Cache | None]:
        """The third result is this layer's cache as it was before the call, for the layer above."""
        n_BTD = self.norm(h_BTD)
        own = cache_of(state.attention)
        read = {"same": own, "below": below, None: None}[self.cache]
        mixed, attention = self.mixer(n_BTD, state.attention, slots, read)
        branches = {"mixer": mixed, "mlp": self.mlp(n_BTD)}
        window = state.window
        if self.step is not None:
            branches["step"], window = self.step(n_BTD, state.window, slots, step_kernel)
        dropout = nn.Dropout(self.dropout)
        added = sum(
            (self._gated(name, y_BTD, n_BTD).astype(h_BTD.dtype) for name, y_BTD in branches.items()),
            jnp.zeros((), h_BTD.dtype),
        )
        h_BTD = h_BTD + dropout(added, deterministic=deterministic)
        mixer = state.mixer
        if self.mamba is not None and self.mamba_norm is not None:
            places = slots.place_BT
            if self.mamba_carried:  # place 0 would begin anew
                places = jnp.where(slots.fresh_B[:, None] | (places < 0), places, places + 1)
            y_BTD, mixer = self.mamba(self.mamba_norm(h_BTD), state.mixer, places)
            h_BTD = h_BTD + dropout(y_BTD.astype(h_BTD.dtype), deterministic=deterministic)
        return h_BTD, ChunkLayerState(attention, mixer, window), own

    def _gated(self, name: str, y_BTD: Activations, n_BTD: Activations) -> Activations:
        if self.gate is None:
            return y_BTD
        u_BTD = {"input": n_BTD, "output": y_BTD, "difference": y_BTD - n_BTD}[self.gate_reads]
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general": dot_general}
        project = nn.Dense(
            n_BTD.shape[-1], use_bias=False, kernel_init=initializers.torch_linear, name=f"{name}_gate", **kinds
        )
        return y_BTD * GATES[self.gate](project(u_BTD))


def cache_of(state: ChunkAttentionState) -> Cache | None:
    """The chunk before, None where it is not kept."""
    return None if state.past_k is None else Cache(state.past_k, state.past_v, state.past_count)


def no_cache(state: ChunkAttentionState) -> Cache:
    """What the first layer finds below it: a cache in which nothing is."""
    return Cache(jnp.zeros_like(state.past_k), jnp.zeros_like(state.past_v), jnp.zeros_like(state.past_count))
