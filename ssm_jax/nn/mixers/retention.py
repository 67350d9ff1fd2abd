"""Multi-scale retention (Sun et al. 2023, arXiv:2307.08621, section 2.3), and the gated unit of DenseRetNet on the same core."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.dense import Fusion, Shallow
from ssm_jax.nn.norm import RMSNorm
from ssm_jax.nn.rotary import Frequencies, geometric, geometric_to_end, rotate
from ssm_jax.nn.state import RetentionState
from ssm_jax.ops import retention
from ssm_jax.ops.products import dot_general
from ssm_jax.ops.retention import Memory
from ssm_jax.ops.silu import gated_silu, silu
from ssm_jax.typing import Activations, Positions

DecayRule = Literal["powers", "log_spaced"]
Features = tuple[Float[Array, "B L H N"], Float[Array, "B L H P"]]


def log_decays(rule: DecayRule, heads: int) -> np.ndarray:
    """log gamma of every head, float64. "powers": gamma_h = 1 - 2^(-5-h), as published; "log_spaced": 1 - gamma spaced evenly on a
    logarithmic scale from 1/32 to 1/512 (syncdoth's use_lm_decay)."""
    if rule == "powers":
        return np.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))))
    return np.asarray(np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads))))


class Retention(nn.Module):
    """Projections -> rotation -> retention -> norm per head -> gate -> projection.

        q, k, v = f(u W_q), f(u W_k) / sqrt(N), f(u W_v), f = silu or nothing;   [k, v fused with those of the layers below]
        y = RMSNorm_P(retention(rotate(q), rotate(k), v));   out = (silu(u W_g) * y) W_out

    Attributes:
        heads: H. key_dim, value_dim: N and P, per head.
        decay: see ``log_decays``.
        activated: whether q, k and v go through silu.
        norm_scale: whether the norm over a head's values has a scale [P], which the heads share.
        epsilon: of the norms.
        rotary: "interleaved" pairs and frequencies that end at 1e-4 exactly, as published; "halves" with the usual ones (fla).
        gate_bottlenecks: of the gates of k and v in ``fused``; None for no gates. source_matrices: see ``Fusion``.
        score_normaliser, score_scale: see ``ops.retention``.
        projection_init, out_init, gate_init: initialisers of q, k, v, g; of the output; of what ``fused`` adds.
    """

    heads: int
    key_dim: int
    value_dim: int
    decay: DecayRule = "powers"
    activated: bool = False
    norm_scale: bool = False
    epsilon: float = 1e-6
    rotary: Literal["interleaved", "halves"] = "interleaved"
    gate_bottlenecks: tuple[int, int] | None = None
    source_matrices: bool = False
    score_normaliser: Literal["abs_sum", "sum_abs"] | None = None
    score_scale: bool = True
    projection_init: Initializer = initializers.torch_linear
    value_init: Initializer | None = None
    out_init: Initializer = initializers.torch_linear
    gate_init: Initializer = initializers.torch_linear
    chunk_size: int | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> RetentionState:
        """An empty memory: the state before any token."""
        kv = jnp.zeros((batch_size, self.heads, self.key_dim, self.value_dim), jnp.float32)
        return RetentionState(kv=kv, position=jnp.zeros((batch_size,), jnp.int32))

    @nn.nowrap
    def features_like(self, x_BLD: Activations) -> Features:
        """Zeros in the shape of k and v."""
        k, v = (
            jnp.zeros((*x_BLD.shape[:2], self.heads, width), self.dtype) for width in (self.key_dim, self.value_dim)
        )
        return k, v

    def __call__(
        self, x_BLD: Activations, state: RetentionState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, RetentionState]:
        """Without other layers' features."""
        out_BLD, state, _ = self._mix(x_BLD, state, positions, None)
        return out_BLD, state

    def fused(
        self, x_BLD: Activations, state: RetentionState | None, positions: Positions | None, shallow: Shallow
    ) -> tuple[Activations, RetentionState, Features]:
        """With the keys and values of the layers below; the third result is this layer's own, before fusion."""
        return self._mix(x_BLD, state, positions, shallow)

    @nn.compact
    def _mix(
        self, x_BLD: Activations, state: RetentionState | None, positions: Positions | None, shallow: Shallow | None
    ) -> tuple[Activations, RetentionState, Features]:
        batch, length, d_model = x_BLD.shape
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(width: int, name: str, init: Initializer) -> Array:
            shape = (self.heads, width)
            return nn.DenseGeneral(
                shape, use_bias=False, kernel_init=init, dot_general=dot_general, name=name, **kinds
            )(x_BLD)

        def activate(x: Array) -> Array:
            return silu(x) if self.activated else x

        value_init = self.value_init or self.projection_init
        q = activate(project(self.key_dim, "q_proj", self.projection_init))
        k = activate(project(self.key_dim, "k_proj", self.projection_init)) * self.key_dim**-0.5
        v = activate(project(self.value_dim, "v_proj", value_init))
        gate = project(self.value_dim, "g_proj", self.projection_init)
        features = (k, v)
        if shallow is not None and shallow.sources:
            k, v = self._fuse(k, v, x_BLD, shallow)

        start_B = state.position if state else jnp.zeros((batch,), jnp.int32)
        position_BL = jnp.maximum(positions_lib.resolve(start_B, length, positions), 0)
        interleaved = self.rotary == "interleaved"
        q, k = (rotate(x, position_BL, self._frequencies(), interleaved=interleaved) for x in (q, k))
        y_BLHP, memory = retention(
            q,
            k,
            v,
            log_decays(self.decay, self.heads),
            Memory(state.kv, state.position) if state else None,
            positions_lib.resets(positions),
            lengths=positions_lib.lengths(positions),
            score_normaliser=self.score_normaliser,
            score_scale=self.score_scale,
            chunk_size=self.chunk_size,
        )
        norm = RMSNorm(self.epsilon, use_scale=self.norm_scale, name="head_norm", **kinds)
        gated = gated_silu(norm(y_BLHP), gate)
        out_BLD = nn.DenseGeneral(
            d_model,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=self.out_init,
            dot_general=dot_general,
            name="out_proj",
            **kinds,
        )(gated)
        return out_BLD, RetentionState(kv=memory.kv_BHNP, position=memory.tokens_B), features

    def _fuse(self, k: Array, v: Array, x_BLD: Activations, shallow: Shallow) -> Features:
        bottlenecks = self.gate_bottlenecks or (None, None)

        def fusion(bottleneck: int | None, name: str) -> Fusion:
            return Fusion(
                bottleneck,
                self.source_matrices,
                self.epsilon,
                self.gate_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        keys, values = zip(*shallow.sources, strict=True)
        k = fusion(bottlenecks[0], "k_fusion")(k, x_BLD, keys, shallow.first)
        v = fusion(bottlenecks[1], "v_fusion")(v, x_BLD, values, shallow.first)
        return k, v

    @nn.nowrap
    def _frequencies(self) -> Frequencies:
        make = geometric_to_end if self.rotary == "interleaved" else geometric
        return make(self.key_dim, 10_000.0)
