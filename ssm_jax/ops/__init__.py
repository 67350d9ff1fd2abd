"""Pure functions of arrays: the mathematics of the library, each with an oracle and an implementation per platform.

``y, state = op(inputs..., state=None, reset=None, *, lengths=None, implementation=None, chunk_size=None)``: any length,
float32 states in and out, exact resets at document starts. ``explain(op)`` says what would run where.
"""

from ssm_jax.ops.causal_conv import causal_conv
from ssm_jax.ops.cross_entropy import cross_entropy, linear_cross_entropy, linear_token_nll
from ssm_jax.ops.dispatch import explain, implementations
from ssm_jax.ops.distillation import linear_distillation
from ssm_jax.ops.dss import convolution_kernel, dss, zero_order_hold
from ssm_jax.ops.linear_recurrence import linear_recurrence
from ssm_jax.ops.long_convolution import long_convolution
from ssm_jax.ops.retention import retention
from ssm_jax.ops.selective_scan import selective_scan
from ssm_jax.ops.ssd import ssd

__all__ = [
    "causal_conv",
    "convolution_kernel",
    "cross_entropy",
    "dss",
    "explain",
    "implementations",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_recurrence",
    "linear_token_nll",
    "long_convolution",
    "retention",
    "selective_scan",
    "ssd",
    "zero_order_hold",
]
