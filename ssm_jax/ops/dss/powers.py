"""exp(lambda_n t) for t = 0, 1, 2, ...: the table that kernels, summaries of chunks and read-outs are products with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_BLOCK = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rate_N", "frequency_N"),
    meta_fields=("log_frequency", "exact_phase"),
)
@dataclasses.dataclass(frozen=True)
class Modes:
    """lambda_n = -rate_n + i frequency_n.

    log_frequency: whether ``frequency_N`` holds the frequency's logarithm. exact_phase: see ``exponentials``.
    """

    rate_N: Array
    frequency_N: Array
    log_frequency: bool = False
    exact_phase: bool = False


def powers(modes: Modes, count: int) -> Float[Array, "T 2 N"]:
    """Real and imaginary part of exp(lambda_n t), t = 0 .. count - 1.

    With t = 64 q + r the table is the product of one over q and one over r: 64 times fewer exponentials, sines and cosines, and
    smaller phases, for one more rounding.
    """
    fine = exponentials(modes, jnp.arange(min(_BLOCK, count)))
    if count <= _BLOCK:
        return fine
    coarse = exponentials(modes, jnp.arange(-(-count // _BLOCK)) * _BLOCK)
    (a, b), (c, d) = (coarse[:, None, 0], coarse[:, None, 1]), (fine[None, :, 0], fine[None, :, 1])
    table = jnp.stack([a * c - b * d, a * d + b * c], axis=-2)
    return table.reshape(-1, *table.shape[2:])[:count]


def exponentials(modes: Modes, t: Int[Array, "*times"]) -> Float[Array, "*times 2 N"]:
    """Real and imaginary part of exp(lambda_n t) at any integers t.

    The phase frequency * t in float32 is off by 6e-8 of itself: 0.04 rad at t = 65,536 and frequency 10. With ``exact_phase`` it
    is reduced to one turn in float64, which costs little because the tables are small, and is right to 1e-6 rad at any t.
    """
    steps = t.astype(modes.rate_N.dtype)[..., None]
    if modes.exact_phase:
        cos, sin = _cos_sin(modes.log_frequency, modes.frequency_N, t)
    else:
        phase = (jnp.exp(modes.frequency_N) if modes.log_frequency else modes.frequency_N) * steps
        cos, sin = jnp.cos(phase), jnp.sin(phase)
    decay = jnp.exp(-modes.rate_N * steps)
    return jnp.stack([decay * cos, decay * sin], axis=-2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cos_sin(log_frequency: bool, frequency: Array, t: Array) -> tuple[Array, Array]:
    with jax.enable_x64(True):
        wide = lax.convert_element_type(frequency, jnp.float64)
        wide = jnp.exp(wide) if log_frequency else wide
        turns = wide * lax.convert_element_type(t, jnp.float64)[..., None] / (2 * np.pi)
        fraction = lax.convert_element_type(turns - jnp.round(turns), frequency.dtype)
    angle = fraction * np.asarray(2 * np.pi, frequency.dtype)
    return jnp.cos(angle), jnp.sin(angle)


@_cos_sin.defjvp
def _cos_sin_jvp(
    log_frequency: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (frequency, t), (d_frequency, _) = primals, tangents
    cos, sin = _cos_sin(log_frequency, frequency, t)
    d_angle = t.astype(frequency.dtype)[..., None] * d_frequency
    d_angle = d_angle * jnp.exp(frequency) if log_frequency else d_angle
    return (cos, sin), (-sin * d_angle, cos * d_angle)


def zero_order_hold(
    Lambda_real_N: Float[Array, "N"],
    Lambda_imag_N: Float[Array, "N"],
    C_real_HN: Float[Array, "H N"],
    C_imag_HN: Float[Array, "H N"],
    *,
    log_frequency: bool = True,
    accurate: bool = False,
) -> Float[Array, "H 2 N"]:
    """c = C (exp(lambda) - 1) / lambda, lambda = -exp(Lambda_real) + i exp(Lambda_imag) (or i Lambda_imag): step 1, input map 1.

    ``accurate``: exp(lambda) - 1 without cancellation. As in the original, that is the plain difference else, which has lost 1e-3
    of itself where |lambda| is 1e-5.
    """
    wide = jnp.promote_types(Lambda_real_N.dtype, jnp.float32)
    real, imag, C_real, C_imag = (x.astype(wide) for x in (Lambda_real_N, Lambda_imag_N, C_real_HN, C_imag_HN))
    rate, frequency = jnp.exp(real), jnp.exp(imag) if log_frequency else imag
    decay = jnp.exp(-rate)
    if accurate:
        growth_re = jnp.expm1(-rate) * jnp.cos(frequency) - 2 * jnp.square(jnp.sin(frequency / 2))
    else:
        growth_re = decay * jnp.cos(frequency) - 1
    growth_im = decay * jnp.sin(frequency)
    size = jnp.square(rate) + jnp.square(frequency)
    hold_re = (-growth_re * rate + growth_im * frequency) / size
    hold_im = (-growth_im * rate - growth_re * frequency) / size
    return jnp.stack([C_real * hold_re - C_imag * hold_im, C_real * hold_im + C_imag * hold_re], axis=-2)
