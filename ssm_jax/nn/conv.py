"""Causal depthwise convolution with parameters."""

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from ssm_jax.nn.initializers import uniform
from ssm_jax.ops import causal_conv
from ssm_jax.typing import Lengths, Reset


class CausalConv(nn.Module):
    """y[t] = silu(sum_j kernel[j] * x[t-K+1+j] + bias), per channel; ``kernel[K-1]`` multiplies the current token.

    Initialised as torch's Conv1d: kernel and bias uniform(+-1/sqrt(K)).
    """

    taps: int
    use_bias: bool = True
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        window: Float[Array, "B window D"] | None,
        reset: Reset | None,
        lengths: Lengths | None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B window D"]]:
        init = uniform(self.taps**-0.5)
        kernel_KD = self.param("kernel", init, (self.taps, x_BLD.shape[-1]), self.param_dtype)
        bias_D = self.param("bias", init, (x_BLD.shape[-1],), self.param_dtype) if self.use_bias else None
        return causal_conv(x_BLD, kernel_KD, bias_D, window, reset, lengths=lengths, activation="silu")
