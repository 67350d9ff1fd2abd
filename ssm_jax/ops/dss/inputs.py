"""What every implementation of the diagonal state-space op reads; everything float32 (or float64)."""

from typing import NamedTuple

from jaxtyping import Array, Float

from ssm_jax.ops.dss.powers import Modes
from ssm_jax.typing import Lengths, Reset


class Inputs(NamedTuple):
    """c: real and imaginary parts. state: X, None for zeros. kernel: the first K, None to compute them."""

    s_BLH: Float[Array, "B L H"]
    modes: Modes
    c_H2N: Float[Array, "H 2 N"]
    D_H: Float[Array, "H"]
    state: Float[Array, "B H 2 N"] | None
    reset: Reset | None
    lengths: Lengths | None
    kernel_TH: Float[Array, "T H"] | None
