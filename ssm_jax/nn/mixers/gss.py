"""The gated state-space mixer (Mehta, Gupta, Cutkosky & Neyshabur 2022, arXiv:2206.13947, figure 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.state import DSSState
from ssm_jax.ops import convolution_kernel, dss, zero_order_hold
from ssm_jax.ops.gelu import gated_gelu, gelu
from ssm_jax.ops.products import dot_general
from ssm_jax.typing import Activations, Params, Positions


class GatedStateSpace(nn.Module):
    """A diagonal state space at a fraction of the width, whose output gates the full width.

        u = gelu(x W_u),   v = gelu(x W_v),   s = LayerNorm(v),   y = DSS(s)
        out = ((y W_g) * u) W_o + b_o

    DSS: ``ops.dss`` with lambda_n = -exp(Lambda_real_n) + i exp(Lambda_imag_n) and c = C (exp(lambda) - 1) / lambda, the zero-order
    hold with step 1. It is float32 whatever ``dtype`` is; gelu is exact (erf).

    Attributes:
        d_inner: F, width of u. d_dss: H, width of v. n_modes: N, shared by all channels.
        imag_exp: whether Lambda_imag is the frequency's logarithm, or the frequency.
        modes_init, memory: see ``initializers.dss_modes``.
        accurate: phases reduced in float64, and exp(lambda) - 1 without cancellation. For modes that last for thousands of
            tokens; the original's float32 formulas differ there.
        chunk_size: speed and memory only.
    """

    d_inner: int
    d_dss: int
    n_modes: int
    imag_exp: bool = True
    modes_init: str = "reference"
    memory: int = 4096
    accurate: bool = False
    chunk_size: int | None = None
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> DSSState:
        """Zeros: the state before any token, the same for every ``capacity``."""
        return DSSState(ssm=jnp.zeros((batch_size, self.d_dss, 2, self.n_modes), jnp.float32))

    @nn.compact
    def __call__(
        self, x_BLD: Activations, state: DSSState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, DSSState]:
        def linear(features: int, name: str, bias: bool = False) -> nn.Dense:
            kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general": dot_general}
            return nn.Dense(
                features,
                use_bias=bias,
                kernel_init=initializers.torch_linear,
                bias_init=initializers.uniform(self.d_inner**-0.5),
                name=name,
                **kinds,
            )

        u_BLF = linear(self.d_inner, "u_proj")(x_BLD)  # its gelu is taken with the gate
        v_BLH = gelu(linear(self.d_dss, "v_proj")(x_BLD))
        y_BLH, state = self._state_space(v_BLH, state, positions)
        gate_BLF = linear(self.d_inner, "gate_proj")(y_BLH.astype(self.dtype))
        return linear(x_BLD.shape[-1], "out_proj", bias=True)(gated_gelu(gate_BLF, u_BLF)), state

    def _state_space(
        self, v_BLH: Activations, state: DSSState | None, positions: Positions | None
    ) -> tuple[Activations, DSSState]:
        norm = nn.LayerNorm(
            self.norm_eps, use_fast_variance=False, dtype=jnp.float32, param_dtype=self.param_dtype, name="dss_norm"
        )
        modes, channels, stored = (self.n_modes,), (self.d_dss, self.n_modes), self.param_dtype
        draw = initializers.dss_modes(self.modes_init, self.memory, self.imag_exp)
        Lambda_real_N = self.param("Lambda_real", draw.rate, modes, stored)
        Lambda_imag_N = self.param("Lambda_imag", draw.frequency, modes, stored)
        draw_C = draw.readout(Lambda_real_N, Lambda_imag_N)
        C_real_HN = self.param("C_real", draw_C, channels, stored)
        C_imag_HN = self.param("C_imag", draw_C, channels, stored)
        D_H = self.param("D", draw.skip, (self.d_dss,), stored)
        derived = self.variables["params"]
        c_H2N = derived.get("coefficients")
        if c_H2N is None:
            c_H2N = zero_order_hold(
                Lambda_real_N,
                Lambda_imag_N,
                C_real_HN,
                C_imag_HN,
                log_frequency=self.imag_exp,
                accurate=self.accurate,
            )
        y_BLH, ssm = dss(
            norm(v_BLH),
            jnp.exp(Lambda_real_N.astype(jnp.float32)),
            Lambda_imag_N,
            c_H2N,
            D_H,
            state.ssm if state else None,
            positions_lib.resets(positions),
            kernel_TH=derived.get("kernel"),
            lengths=positions_lib.lengths(positions),
            log_frequency=self.imag_exp,
            exact_phase=self.accurate,
            chunk_size=self.chunk_size,
        )
        return y_BLH, DSSState(ssm=ssm)


def derive(layers: Params, *, imag_exp: bool, accurate: bool, length: int | None) -> Params:
    """The stacked parameters of a mixer with what follows from them alone, so that it is computed once and used many times.

    ``coefficients`` [n, H, 2, N] are c; ``kernel`` [n, length, H] is the convolution's, left out where ``length`` is None. Whoever
    differentiates with respect to the result must pull the gradient back through this function.
    """
    names = ("Lambda_real", "Lambda_imag", "C_real", "C_imag")

    def of_layer(*arrays: Array) -> Params:
        real_N, imag_N, C_real_HN, C_imag_HN = arrays
        c_H2N = zero_order_hold(real_N, imag_N, C_real_HN, C_imag_HN, log_frequency=imag_exp, accurate=accurate)
        made = {"coefficients": c_H2N}
        if length is not None:
            rate_N = jnp.exp(real_N.astype(jnp.float32))
            made["kernel"] = convolution_kernel(
                rate_N, imag_N, c_H2N, length, log_frequency=imag_exp, exact_phase=accurate
            )
        return made

    return {**layers, **jax.vmap(of_layer)(*(layers[name] for name in names))}
