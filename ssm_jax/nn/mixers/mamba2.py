"""The Mamba-2 mixer (Dao & Gu 2024, arXiv:2405.21060, section 7)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.conv import CausalConv
from ssm_jax.nn.halves import halves
from ssm_jax.nn.norm import GatedRMSNorm
from ssm_jax.nn.state import Mamba2State
from ssm_jax.ops import ssd
from ssm_jax.typing import Activations, Positions


class Mamba2(nn.Module):
    """State-space duality mixer: one scalar decay per head, B and C shared by the heads of a group.

        z, x, B, C, dt = u W_in;  x, B, C = silu(conv(.));  dt = clip(softplus(dt + b))
        S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T;  y_t = C_t S_t + D x_t
        out = RMSNorm_groups(y * silu(z)) W_out

    The fused projection and convolution of the published checkpoints are separate here, so that each can be sharded.

    Attributes:
        d_inner: E = heads * headdim. d_state: N. d_conv: K. headdim: P. ngroups: G.
        dt_limit: bounds of the step size, applied in every mode (the originals forget them in one-token steps).
        chunk_size: speed knob; the result does not depend on it.
    """

    d_inner: int
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 64
    ngroups: int = 1
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_init_range: tuple[float, float] = (1.0, 16.0)
    out_init_scale: float = 1.0
    chunk_size: int | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def heads(self) -> int:
        return self.d_inner // self.headdim

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> Mamba2State:
        """Zeros: the state before any token, the same for every ``capacity``."""

        def window(width: int) -> jnp.ndarray:
            return jnp.zeros((batch_size, self.d_conv - 1, width), jnp.float32)

        keys = self.ngroups * self.d_state
        ssm = jnp.zeros((batch_size, self.heads, self.d_state, self.headdim), jnp.float32)
        return Mamba2State(conv_x=window(self.d_inner), conv_B=window(keys), conv_C=window(keys), ssm=ssm)

    @nn.compact
    def __call__(
        self, x_BLD: Activations, state: Mamba2State | None = None, positions: Positions | None = None
    ) -> tuple[Activations, Mamba2State]:
        reset, lengths = positions_lib.resets(positions), positions_lib.lengths(positions)
        batch, length, d_model = x_BLD.shape
        groups = (self.ngroups, self.d_state)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(features: int | tuple[int, ...], name: str) -> jnp.ndarray:
            init = initializers.torch_linear
            return nn.DenseGeneral(features, use_bias=self.bias, kernel_init=init, name=name, **kinds)(x_BLD)

        def convolve(u: jnp.ndarray, window: jnp.ndarray | None, name: str) -> tuple[jnp.ndarray, jnp.ndarray]:
            conv = CausalConv(self.d_conv, self.conv_bias, self.param_dtype, name=name)
            return conv(u.reshape(batch, length, -1), window, reset, lengths)

        z_BLE, x_BLE = halves(project((2, self.d_inner), "in_proj"))
        x_BLE, conv_x = convolve(x_BLE, state.conv_x if state else None, "conv_x")
        B, conv_B = convolve(project(groups, "B_proj"), state.conv_B if state else None, "conv_B")
        C, conv_C = convolve(project(groups, "C_proj"), state.conv_C if state else None, "conv_C")
        dt_BLH = project(self.heads, "dt_proj")

        dt_bias_init = initializers.inverse_softplus_log_uniform(self.dt_min, self.dt_max, self.dt_init_floor)
        dt_bias_H = self.param("dt_bias", dt_bias_init, (self.heads,), self.param_dtype)
        A_log_H = self.param("A_log", initializers.log_uniform_of(*self.A_init_range), (self.heads,), self.param_dtype)
        D_H = self.param("D", nn.initializers.ones, (self.heads,), self.param_dtype)

        y_BLHP, ssm = ssd(
            x_BLE.reshape(batch, length, self.heads, self.headdim),
            dt_BLH,
            -jnp.exp(A_log_H.astype(jnp.float32)),
            B.reshape(batch, length, *groups),
            C.reshape(batch, length, *groups),
            D_H,
            dt_bias_H,
            state.ssm if state else None,
            reset,
            dt_limit=self.dt_limit,
            lengths=lengths,
            chunk_size=self.chunk_size,
        )
        norm = GatedRMSNorm(self.ngroups, self.norm_eps, self.dtype, self.param_dtype, name="norm")
        v_BLE = norm(y_BLHP.reshape(batch, length, self.d_inner), z_BLE)
        out_init = initializers.scaled_torch_linear(self.out_init_scale)
        out = nn.Dense(d_model, use_bias=self.bias, kernel_init=out_init, name="out_proj", **kinds)(v_BLE)
        return out, Mamba2State(conv_x=conv_x, conv_B=conv_B, conv_C=conv_C, ssm=ssm)
