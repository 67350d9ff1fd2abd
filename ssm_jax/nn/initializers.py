"""Initialisers that the published recipes use and Flax does not name."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jaxtyping import Array, Float

from ssm_jax.typing import Key

torch_linear: Initializer = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
"""Uniform(+-1/sqrt(fan_in)), the default of ``torch.nn.Linear``."""


kaiming_normal: Initializer = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "normal")
"""N(0, 1 / (3 fan_in)), ``torch.nn.init.kaiming_normal_`` with a = sqrt(5)."""


def scaled_torch_linear(scale: float) -> Initializer:
    """``torch_linear`` times ``scale``; output projections use 1/sqrt(residual branches)."""
    return nn.initializers.variance_scaling(scale * scale / 3.0, "fan_in", "uniform")


def xavier_uniform(gain: float) -> Initializer:
    """Uniform(+-gain sqrt(6 / (fan_in + fan_out))), as ``torch.nn.init.xavier_uniform_``."""
    return nn.initializers.variance_scaling(gain * gain, "fan_avg", "uniform")


def uniform(bound: float) -> Initializer:
    """Uniform(-bound, bound)."""

    def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def orthogonal(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Q of the QR factors of a Gaussian matrix; drawn in float32, because there is no QR of bfloat16."""
    return nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


def constant_or_uniform(bound: float, kind: str) -> Initializer:
    """Mamba's ``dt_init``: Uniform(-bound, bound) for "random", the bound itself for "constant"."""
    return uniform(bound) if kind == "random" else nn.initializers.constant(bound)


def inverse_softplus_log_uniform(low: float, high: float, floor: float) -> Initializer:
    """softplus^-1 of step sizes drawn log-uniformly in [low, high] clamped below at ``floor`` (Mamba, section 3.6)."""

    def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        log_dt = jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high))
        dt = jnp.maximum(jnp.exp(log_dt), floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init


def s4d_real(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "E N"]:
    """log(1..N) for every channel: A = -(1..N), the S4D-real initialisation of Mamba-1."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape).astype(dtype)


def log_uniform_of(low: float, high: float) -> Initializer:
    """log(a), a ~ Uniform(low, high): Mamba-2's A_log."""

    def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high)).astype(dtype)

    return init


class DSSModes(NamedTuple):
    """Initialisers of a diagonal state space. readout: (Lambda_real, Lambda_imag) -> initialiser of C's two parts."""

    rate: Initializer
    frequency: Initializer
    readout: Callable[[Array, Array], Initializer]
    skip: Initializer


def dss_modes(kind: str, memory: int, log_frequency: bool) -> DSSModes:
    """How the modes of ``ops.dss`` begin: exp(Lambda_real) is the rate, exp(Lambda_imag) (or Lambda_imag) the frequency.

    "reference": everything N(0, 1), as in the gated state-space paper: the slowest of 512 modes lasts for tens of tokens, and
    with so many modes of unit size the output is large.
    "slow": time constants log-uniform from 1 to ``memory`` tokens and frequencies from one turn in ``memory`` tokens to half a turn
    per token, so that every scale has its modes (as S4D's initialisations); C such that each mode adds 1/N to the variance of
    the output of white noise, sum_l |K_l|^2 = 1:  std = sqrt((1 - exp(-2 rate)) / N) / |(exp(lambda) - 1) / lambda|; D = 1.
    """
    if kind == "reference":
        normal = nn.initializers.normal(1.0)
        return DSSModes(normal, normal, lambda real, imag: normal, normal)

    def rate(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return -jax.random.uniform(key, shape, dtype, 0.0, math.log(memory))

    def frequency(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        log = jax.random.uniform(key, shape, dtype, math.log(2 * math.pi / memory), math.log(math.pi))
        return log if log_frequency else jnp.exp(log)

    def readout(real: Array, imag: Array) -> Initializer:
        real, imag = real.astype(jnp.float32), imag.astype(jnp.float32)
        rate, turn = jnp.exp(real), jnp.exp(imag) if log_frequency else imag
        hold = jnp.abs((jnp.exp(jax.lax.complex(-rate, turn)) - 1) / jax.lax.complex(-rate, turn))
        std = jnp.sqrt(-jnp.expm1(-2 * rate) / real.shape[-1]) / hold

        def init(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
            return (std * jax.random.normal(key, shape)).astype(dtype)

        return init

    return DSSModes(rate, frequency, readout, nn.initializers.ones)
