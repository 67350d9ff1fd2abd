"""Diagonal state space with fixed modes (DSS): a convolution whose kernel is a sum of decaying exponentials.

Gupta, Gu & Berant 2022, arXiv:2203.14343, in the "exp" form without a normaliser, as in gated state spaces (Mehta et al. 2022,
arXiv:2206.13947). The modes are shared by all channels and do not depend on the token, so that besides the recurrence there is a
convolution; ``reference`` is the recurrence, ``xla`` takes both.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.ops import dispatch
from ssm_jax.ops.dss import xla
from ssm_jax.ops.dss.inputs import Inputs
from ssm_jax.ops.dss.powers import Modes, powers, zero_order_hold
from ssm_jax.ops.dss.reference import reference
from ssm_jax.ops.resets import clear
from ssm_jax.typing import Lengths, Reset

dispatch.register("dss", "reference", lambda inputs, chunk_size: reference(inputs))
dispatch.register("dss", "xla", xla.forward)


def dss(
    s_BLH: Float[Array, "B L H"],
    rate_N: Float[Array, "N"],
    frequency_N: Float[Array, "N"],
    c_H2N: Float[Array, "H 2 N"],
    D_H: Float[Array, "H"],
    state: Float[Array, "B H 2 N"] | None = None,
    reset: Reset | None = None,
    *,
    kernel_TH: Float[Array, "T H"] | None = None,
    lengths: Lengths | None = None,
    log_frequency: bool = False,
    exact_phase: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B L H"], Float[Array, "B H 2 N"]]:
    """Runs the diagonal state space over axis 1.

        X_t = exp(lambda) X_{t-1} + s_t,   lambda_n = -rate_n + i frequency_n          (every channel has all N modes)
        y_t = Re(sum_n c_n X_t) + D s_t = sum_{j <= t} K_{t-j} s_j + D s_t,   K_t = Re(sum_n c_n exp(lambda_n t))

    Three forms, equal but for rounding: one token is a step of the recurrence; a call of one chunk (``chunk_size`` at least L) is
    the convolution, by FFT; else chunks of ``chunk_size`` tokens are convolved and the state carried between them.

    Args:
        rate_N: above 0. frequency_N: in radians per token, or its logarithm with ``log_frequency``.
        c_H2N: real and imaginary parts of c.
        state: X before the first token, its real and imaginary parts; None is zeros, and costs nothing.
        reset: True at the first token of a document: there X_t = s_t. None is one document per row.
        kernel_TH: ``convolution_kernel`` of at least one chunk, when it is known already.
        lengths: present tokens per row; later ones leave the state alone and their outputs mean nothing.
        exact_phase: reduce frequency * t to one turn in float64. Else it is float32, as in the original, which loses 1e-3 of the
            kernel at t = 1,000 for modes that last so long.
        implementation: None for the best one of the platform, or a name.
        chunk_size: default 256 tokens where there are documents or unequal rows, else 4,096. Speed and memory only.

    Returns:
        y in s's dtype, and X after the last present token. Everything between is float32 (float64 for float64 s).

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
    """
    wide = jnp.promote_types(s_BLH.dtype, jnp.float32)
    length = s_BLH.shape[1]
    if reset is not None:
        if lengths is not None:
            reset = reset & (jnp.arange(length) < lengths[:, None])
        state = None if state is None else clear(state, reset[:, 0])
    modes = Modes(rate_N.astype(wide), frequency_N.astype(wide), log_frequency, exact_phase)
    inputs = Inputs(
        s_BLH.astype(wide),
        modes,
        c_H2N.astype(wide),
        D_H.astype(wide),
        None if state is None else state.astype(wide),
        reset,
        lengths,
        None if kernel_TH is None else kernel_TH.astype(wide),
    )
    chunk_size = chunk_size or default_chunk_size(reset is not None or lengths is not None)
    y, state = dispatch.call("dss", implementation, inputs, chunk_size=chunk_size)
    return y.astype(s_BLH.dtype), state


def default_chunk_size(documents: bool) -> int:
    """Tokens per chunk, with documents or unequal rows and without: each document of a chunk costs an FFT of the whole chunk."""
    return 256 if documents else 4096


def convolution_kernel(
    rate_N: Float[Array, "N"],
    frequency_N: Float[Array, "N"],
    c_H2N: Float[Array, "H 2 N"],
    length: int,
    *,
    log_frequency: bool = False,
    exact_phase: bool = False,
) -> Float[Array, "T H"]:
    """K_t = Re(sum_n c_n exp(lambda_n t)), t = 0 .. length - 1; it depends on parameters alone."""
    wide = jnp.promote_types(rate_N.dtype, jnp.float32)
    modes = Modes(rate_N.astype(wide), frequency_N.astype(wide), log_frequency, exact_phase)
    return xla.kernel(powers(modes, length), c_H2N.astype(wide))


__all__ = ["convolution_kernel", "default_chunk_size", "dss", "zero_order_hold"]
