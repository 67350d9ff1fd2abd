"""The language-model shell: embed, stack, final norm, head. Families differ only in the layer they stack."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ssm_jax.models import registry
from ssm_jax.models.inputs import check_inputs, check_length, check_restart, check_start
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.block import scan_layers
from ssm_jax.nn.dense import enter, leave
from ssm_jax.nn.state import LMState, stack_layers
from ssm_jax.typing import Activations, Params, Positions, PyTree, Tokens

_float32_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class LanguageModel(nn.Module):
    """``logits, state = model.apply(variables, tokens, state=state, positions=positions)`` for every family.

    The same call is training, prefill, chunked prefill, truncated back-propagation, endless evaluation and one-token
    decoding: the state that comes out goes on exactly where the tokens stopped.

    Attributes:
        config: the family's frozen dataclass.
        unroll: layers per iteration of the layer scan; a speed knob.
    """

    config: Any
    unroll: int = 1

    def setup(self) -> None:
        config, family = self.config, registry.family_of(self.config)
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        table: dict[str, Any] = {
            "dtype": jnp.float32 if config.residual_in_fp32 else dtype,
            "param_dtype": param_dtype,
            "embedding_init": nn.initializers.normal(family.embedding_std(config)),
        }
        self.embed = nn.Embed(config.padded_vocab_size, config.d_model, **table)
        limit = family.context_limit(config)
        if limit is not None and family.learned_positions:
            self.embed_position = nn.Embed(limit, config.d_model, **table)
        self.norm_embed = family.embedding_norm(config)
        self.layers = family.layer(config)
        self.norm_f = family.final_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Dense(
                config.padded_vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=family.head_init,
                dot_general=_float32_dot,
            )

    def __call__(
        self,
        tokens: Tokens,
        state: LMState | None = None,
        positions: Positions | None = None,
        logits: Literal["all", "last", "none"] = "all",
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B _ V"] | None, LMState]:
        """Next-token logits and the state after the last present token.

        Args:
            tokens: int32 [B, L], every one a row of the (padded) table, absent ones too.
            state: what a former call returned, or None for a fresh start.
            positions: int32 [B, L]; 0 starts a document (nothing before it has any influence), -1 marks an absent
                token (a suffix of its row). None continues from the state.
            logits: "all" gives float32 [B, L, V]; "last" those of each row's last present token, [B, 1, V]; "none" gives
                None.
            deterministic: False turns dropout on, where a family has any (needs ``rngs={"dropout": key}``).

        Raises:
            ValueError: wrong shapes or types, a state of another number of lanes; outside ``jit``, where values can be read, also
                a token outside the table, a document longer than the model's context or the state's capacity, a row that begins
                neither at 0 nor where its state stands, a gap in positions, and a -1 that is not at the end of its row. Inside
                ``jit`` the former two give NaN, the others are undefined.
        """
        features_BLD, state = self.features(tokens, state, positions, deterministic)
        if logits == "none":
            return None, state
        if logits == "last":
            features_BLD = positions_lib.last_present(features_BLD, positions)
        return self._logits(features_BLD), state

    def features(
        self,
        tokens: Tokens,
        state: LMState | None = None,
        positions: Positions | None = None,
        deterministic: bool = True,
    ) -> tuple[Activations, LMState]:
        """Final hidden states [B, L, D], after the last norm, and the state. ``method="features"``."""
        family = registry.family_of(self.config)
        check_inputs(tokens, positions, self.config.padded_vocab_size)
        check_start(tokens, positions, state)
        check_length(tokens, positions, state, family.context_limit(self.config))
        check_restart(tokens, positions, state, family.chunked)
        h_BLD, position_B = self._embedded(tokens, state, positions)
        if family.chunked:
            h_BLD, chunked_state = self.layers(h_BLD, state, positions, deterministic)
            return self._finished(h_BLD), chunked_state
        h_BLD, layer_states = scan_layers(
            self.layers,
            h_BLD,
            state.layers if state else None,
            positions,
            deterministic,
            n_layers=family.repeats(self.config),
            remat=self.config.remat,
            unroll=self.unroll,
        )
        return self._finished(h_BLD), LMState(layers=layer_states, position=position_B)

    @nn.nowrap  # the layer made here is no part of this module
    def features_of_layers(self, tokens: Tokens, state: LMState, layers: PyTree) -> tuple[Activations, LMState]:
        """``features`` with the parameters, and the state, of each repetition of the layer held apart. For decoding.

        ``layers``: a tuple; where they are a ``ChunkedStack``, what belongs to no layer, and the tuple.
        """
        family = registry.family_of(self.config)
        layer: Any = family.layer(self.config)
        h_BLD, position_B = self._embedded(tokens, state, None)
        if family.chunked:
            outside, apart = layers
            h_BLD, chunked_state = layer.step_apart(outside, apart, h_BLD, state)
            return self._normed(h_BLD), chunked_state
        states = []
        stream = enter(layer, h_BLD)
        for params, layer_state in zip(layers, state.layers, strict=True):
            stream, layer_state = layer.apply({"params": params}, stream, layer_state, None)
            states.append(layer_state)
        return self._normed(leave(stream)), LMState(layers=tuple(states), position=position_B)

    def _embedded(
        self, tokens: Tokens, state: LMState | None, positions: Positions | None
    ) -> tuple[Activations, Int[Array, "B"]]:
        """The stream that enters the first layer, and the position after the last token. Beyond table or context is NaN."""
        family, (batch, length) = registry.family_of(self.config), tokens.shape
        rows = self.config.padded_vocab_size
        known = (tokens >= 0) & (tokens < rows)
        h_BLD = self.embed(jnp.where(known, tokens, rows))
        scale = family.embedding_scale(self.config)
        if scale != 1:
            h_BLD = h_BLD * scale
        if self.norm_embed is not None:
            h_BLD = self.norm_embed(h_BLD).astype(h_BLD.dtype)
        start_B = state.position if state else jnp.zeros((batch,), jnp.int32)
        limit = family.context_limit(self.config)
        if limit is not None:
            place_BL = positions_lib.resolve(start_B, length, positions)
            h_BLD = jnp.where((place_BL < limit)[..., None], h_BLD, jnp.nan)
            if family.learned_positions:
                h_BLD = h_BLD + self.embed_position(jnp.maximum(place_BL, 0))
        return h_BLD, positions_lib.next_positions(start_B, length, positions)

    def _finished(self, h_BLD: Activations) -> Activations:
        """The final norm; when parameters are made, the head's too."""
        features_BLD = self._normed(h_BLD)
        if self.is_initializing() and not self.config.tie_embeddings:
            self.head(features_BLD[:, :1])
        return features_BLD

    def _normed(self, h_BLD: Activations) -> Activations:
        return h_BLD.astype(self.config.dtype) if self.norm_f is None else self.norm_f(h_BLD)

    def _logits(self, features_BLD: Float[Array, "B _ D"]) -> Float[Array, "B _ V"]:
        if not self.config.tie_embeddings:
            return self.head(features_BLD)
        embedding_VD = self.embed.embedding.astype(features_BLD.dtype)
        return jnp.einsum("bld,vd->blv", features_BLD, embedding_VD, preferred_element_type=jnp.float32)

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> LMState:
        """The state before any token: zeros, of a size that does not depend on how much will be read.

        Args:
            capacity: tokens of the longest document that will be read, where layers attend: they keep that many keys and values.
                None makes room for all that the model can reach. Recurrent layers have room for everything.

        Raises:
            ValueError: a capacity below 1.
        """
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1, or None.")
        family = registry.family_of(self.config)
        if family.chunked:
            state: LMState = family.layer(self.config).init_state(batch_size)
            return state
        layer = family.layer(self.config).init_state(batch_size, capacity)
        return LMState(
            layers=stack_layers(layer, family.repeats(self.config)), position=jnp.zeros((batch_size,), jnp.int32)
        )

    @nn.nowrap
    def readout(self, params: Params) -> Float[Array, "D V"]:
        """The matrix W of ``logits = features @ W``, in the parameters' dtype."""
        if self.config.tie_embeddings:
            return params["embed"]["embedding"].T
        return params["head"]["kernel"]
