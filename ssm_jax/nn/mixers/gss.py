"""The gated state-space mixer (Mehta, Gupta, Cutkosky & Neyshabur 2022, arXiv:2206.13947, figure 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.state import DSSState
from ssm_jax.ops import convolution_kernel, dss
from ssm_jax.typing import Activations, Params, Positions

COEFFICIENTS, KERNEL = "coefficients", "kernel"
"""Names of what follows from the parameters alone; see ``derive``."""


class GatedStateSpace(nn.Module):
    """A diagonal state space at a fraction of the width, whose output gates the full width.

        u = gelu(x W_u),   v = gelu(x W_v),   s = LayerNorm(v),   y = DSS(s)
        out = ((y W_g) * u) W_o + b_o

    DSS: ``ops.dss`` with lambda_n = -exp(Lambda_real_n) + i exp(Lambda_imag_n) and c = C (exp(lambda) - 1) / lambda, the zero-order
    hold with step 1. It is float32 whatever ``dtype`` is; gelu is exact (erf).

    Attributes:
        d_inner: F, width of u. d_dss: H, width of v. n_modes: N, shared by all channels.
        imag_exp: whether Lambda_imag is the frequency's logarithm, or the frequency.
        init: "reference" draws all of Lambda, C, D from N(0, 1), as the original; "slow" spreads the time constants log-uniformly up to
            ``memory`` tokens, with C of such a size that y has the variance of s.
        accurate: phases reduced in float64, and exp(lambda) - 1 without cancellation. For modes that last for thousands of
            tokens; the original's float32 formulas differ there.
        chunk_size: speed and memory only.
    """

    d_inner: int
    d_dss: int
    n_modes: int
    imag_exp: bool = True
    init: str = "reference"
    memory: int = 4096
    accurate: bool = False
    chunk_size: int | None = None
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int) -> DSSState:
        """Zeros: the state before any token."""
        return DSSState(ssm=jnp.zeros((batch_size, self.d_dss, 2, self.n_modes), jnp.float32))

    @nn.compact
    def __call__(
        self, x_BLD: Activations, state: DSSState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, DSSState]:
        def linear(features: int, name: str, bias: bool = False) -> nn.Dense:
            kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            fan_in = self.d_inner if bias else 1
            return nn.Dense(
                features,
                use_bias=bias,
                kernel_init=initializers.torch_linear,
                bias_init=initializers.uniform(fan_in**-0.5),
                name=name,
                **kinds,
            )

        u_BLF = nn.gelu(linear(self.d_inner, "u_proj")(x_BLD), approximate=False)
        v_BLH = nn.gelu(linear(self.d_dss, "v_proj")(x_BLD), approximate=False)
        y_BLH, state = self._state_space(v_BLH, state, positions)
        gate_BLF = linear(self.d_inner, "gate_proj")(y_BLH.astype(self.dtype))
        return linear(x_BLD.shape[-1], "out_proj", bias=True)(gate_BLF * u_BLF), state

    def _state_space(
        self, v_BLH: Activations, state: DSSState | None, positions: Positions | None
    ) -> tuple[Activations, DSSState]:
        norm = nn.LayerNorm(
            self.norm_eps, use_fast_variance=False, dtype=jnp.float32, param_dtype=self.param_dtype, name="dss_norm"
        )
        draw = initializers.dss(self.init, self.memory, self.imag_exp)
        modes, channels = (self.n_modes,), (self.d_dss, self.n_modes)
        raw = {
            "Lambda_real": self.param("Lambda_real", draw["Lambda_real"], modes, self.param_dtype),
            "Lambda_imag": self.param("Lambda_imag", draw["Lambda_imag"], modes, self.param_dtype),
        }
        C_scale = initializers.dss_scale(self.init, raw, self.imag_exp)
        raw["C_real"] = self.param("C_real", initializers.scaled_normal(C_scale), channels, self.param_dtype)
        raw["C_imag"] = self.param("C_imag", initializers.scaled_normal(C_scale), channels, self.param_dtype)
        D_H = self.param("D", draw["D"], (self.d_dss,), self.param_dtype)
        return self.run(norm(v_BLH), raw, D_H, state, positions)
