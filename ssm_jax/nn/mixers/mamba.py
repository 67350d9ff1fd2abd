"""The Mamba-1 mixer (Gu & Dao 2023, arXiv:2312.00752, section 3.4)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.conv import CausalConv
from ssm_jax.nn.halves import halves
from ssm_jax.nn.state import MambaState
from ssm_jax.ops import selective_scan
from ssm_jax.typing import Activations, Positions


class Mamba(nn.Module):
    """Selective state-space mixer: in_proj -> causal conv -> selective scan, gated -> out_proj.

        [x, z] = u W_in;  x = silu(conv(x));  dt = softplus(x W_dt + b);  B, C = x W_B, x W_C
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t;  out = (y * silu(z)) W_out

    Attributes:
        d_inner: E, width of x and z.
        d_state: N. d_conv: K. dt_rank: R, rank of the step-size projection.
        bias, conv_bias: whether in/out projections and the convolution carry a bias.
        dt_min, dt_max, dt_init_floor, dt_init, dt_scale: initialisation of the step sizes.
        out_init_scale: factor on the output projection's initialisation, 1/sqrt(layers) in a language model.
        chunk_size: speed knob of the scan; the result does not depend on it.
    """

    d_inner: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_init: str = "random"
    dt_scale: float = 1.0
    out_init_scale: float = 1.0
    chunk_size: int | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> MambaState:
        """Zeros: the state before any token, the same for every ``capacity``."""
        return MambaState(
            conv=jnp.zeros((batch_size, self.d_conv - 1, self.d_inner), jnp.float32),
            ssm=jnp.zeros((batch_size, self.d_state, self.d_inner), jnp.float32),
        )

    @nn.compact
    def __call__(
        self, x_BLD: Activations, state: MambaState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, MambaState]:
        reset, lengths = positions_lib.resets(positions), positions_lib.lengths(positions)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        xz = nn.DenseGeneral(
            (2, self.d_inner), use_bias=self.bias, kernel_init=initializers.torch_linear, name="in_proj", **kinds
        )(x_BLD)
        x_BLE, z_BLE = halves(xz)
        conv = CausalConv(self.d_conv, self.conv_bias, self.param_dtype, name="conv")
        x_BLE, window = conv(x_BLE, state.conv if state else None, reset, lengths)

        def low_rank(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, kernel_init=initializers.torch_linear, name=name, **kinds)

        dt_BLR = low_rank(self.dt_rank, "dt_down")(x_BLE)
        B_BLN = low_rank(self.d_state, "B_proj")(x_BLE)
        C_BLN = low_rank(self.d_state, "C_proj")(x_BLE)
        dt_up_init = initializers.constant_or_uniform(self.dt_scale * self.dt_rank**-0.5, self.dt_init)
        dt_BLE = nn.Dense(self.d_inner, use_bias=False, kernel_init=dt_up_init, name="dt_up", **kinds)(dt_BLR)
        dt_bias_init = initializers.inverse_softplus_log_uniform(self.dt_min, self.dt_max, self.dt_init_floor)
        dt_bias_E = self.param("dt_bias", dt_bias_init, (self.d_inner,), self.param_dtype)
        A_log_EN = self.param("A_log", initializers.s4d_real, (self.d_inner, self.d_state), self.param_dtype)
        D_E = self.param("D", nn.initializers.ones, (self.d_inner,), self.param_dtype)

        y_BLE, ssm = selective_scan(
            x_BLE,
            dt_BLE,
            -jnp.exp(A_log_EN.astype(jnp.float32)),
            B_BLN,
            C_BLN,
            D_E,
            z_BLE,
            dt_bias_E,
            state.ssm if state else None,
            reset,
            lengths=lengths,
            chunk_size=self.chunk_size,
        )
        out_init = initializers.scaled_torch_linear(self.out_init_scale)
        out = nn.Dense(x_BLD.shape[-1], use_bias=self.bias, kernel_init=out_init, name="out_proj", **kinds)(y_BLE)
        return out, MambaState(conv=window, ssm=ssm)
