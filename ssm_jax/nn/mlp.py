"""The perceptron of a transformer block."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from ssm_jax.nn import initializers
from ssm_jax.ops.elephant import elephant, gated_elephant
from ssm_jax.ops.products import dot_general
from ssm_jax.ops.silu import gated_silu, silu
from ssm_jax.typing import Activations

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "elephant": elephant,
    "relu": jax.nn.relu,
    "silu": silu,
}
"""By name. "gelu" is x Phi(x), with the error function; "gelu_tanh" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)));
"elephant" is 1 / (1 + |x|^8)."""

Gate = Callable[[jax.Array, jax.Array], jax.Array]
GATES: dict[str, Gate] = {"silu": gated_silu, "elephant": gated_elephant}
"""(y, gate) -> y activation(gate), for activations whose product keeps nothing but these two for its backward pass."""


class MLP(nn.Module):
    """norm(activation(x W_up + b)) W_down + b.

    Attributes:
        width: of the layer between. activation: a key of ``ACTIVATIONS``.
        gated: norm((activation(x W_gate + b) * (x W_up + b))) W_down + b instead (Shazeer 2020, arXiv:2002.05202).
        gate: instead of the activation's, the function (y, gate) of a gated perceptron.
        norm: of the layer between; None for nothing.
        kernel_init, gate_init, out_init: initialisers of ``up_proj``, of ``gate_proj`` (None: the same) and of ``down_proj``.
    """

    width: int
    activation: str = "gelu"
    gated: bool = False
    gate: Gate | None = None
    bias: bool = True
    norm: nn.Module | None = None
    kernel_init: Initializer = initializers.torch_linear
    gate_init: Initializer | None = None
    out_init: Initializer = initializers.torch_linear
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Activations) -> Activations:
        kinds: dict[str, Any] = {
            "use_bias": self.bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "dot_general": dot_general,
        }
        hidden = nn.Dense(self.width, kernel_init=self.kernel_init, name="up_proj", **kinds)(x_BLD)
        if self.gated:
            init = self.gate_init or self.kernel_init
            gate = nn.Dense(self.width, kernel_init=init, name="gate_proj", **kinds)(x_BLD)
            gating = self.gate or GATES.get(self.activation)
            hidden = gating(hidden, gate) if gating else ACTIVATIONS[self.activation](gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return nn.Dense(x_BLD.shape[-1], kernel_init=self.out_init, name="down_proj", **kinds)(hidden)
