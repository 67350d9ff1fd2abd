"""The gated perceptron (Shazeer 2020, arXiv:2002.05202)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from ssm_jax.nn import initializers
from ssm_jax.nn.mlp import ACTIVATIONS
from ssm_jax.typing import Activations


class GatedMLP(nn.Module):
    """(activation(x W_gate) * x W_up) W_down.

    Attributes:
        width: of the layer between. activation: a key of ``ACTIVATIONS``. bias: whether the three products carry one.
        gate_init, kernel_init, out_init: initialisers of ``gate_proj``, ``up_proj`` and ``down_proj``.
    """

    width: int
    activation: str = "silu"
    bias: bool = False
    gate_init: Initializer = initializers.torch_linear
    kernel_init: Initializer = initializers.torch_linear
    out_init: Initializer = initializers.torch_linear
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Activations) -> Activations:
        kinds: dict[str, Any] = {"use_bias": self.bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = nn.Dense(self.width, kernel_init=self.gate_init, name="gate_proj", **kinds)(x_BLD)
        up = nn.Dense(self.width, kernel_init=self.kernel_init, name="up_proj", **kinds)(x_BLD)
        hidden = ACTIVATIONS[self.activation](gate) * up
        return nn.Dense(x_BLD.shape[-1], kernel_init=self.out_init, name="down_proj", **kinds)(hidden)
