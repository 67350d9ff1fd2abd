"""Linear attention whose memory decays by one scalar per head and token: the core that SSD and retention share.

    S_t = exp(log_decay_t) S_{t-1} + gain_t k_t v_t^T        S: N x P per head, S_0 = ``state``
    y_t = q_t^T S_t

SSD is q = C, k = B, v = x, gain = dt, log_decay = dt A. Queries and keys belong to groups of heads.
"""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.typing import Reset


def default_chunk_size(keys: int, values: int) -> int:
    """A power of two near sqrt(N P): there the T scores and the N P / T state entries of a token and head are in balance."""
    return min(256, 2 ** math.ceil(math.log2(keys * values) / 2))


def linear_attention(
    q_BLGN: Float[Array, "B L G N"],
    k_BLGN: Float[Array, "B L G N"],
    v_BLHP: Float[Array, "B L H P"],
    gain_BLH: Float[Array, "B L H"] | None,
    log_decay: Float[Array, "B L H"] | Float[Array, "H"],
    state_BHNP: Float[Array, "B H N P"],
    reset_BL: Reset | None = None,
    *,
    scale_BLH: Float[Array, "B L H"] | None = None,
    skip_H: Float[Array, "H"] | None = None,
    chunk_size: int,
    implementation: str = "xla",
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H N P"]]:
    """y_BLHP in v's dtype, with ``scale`` and ``skip`` y_t = scale_t q_t^T S_t + skip v_t, and the last state_BHNP.

    Everything is computed in the state's dtype. Log decays are at most 0; one per head is a constant, which gets no gradient, nor
    does the scale. Head h uses group h // (H / G). At ``reset`` the decay is 0, exactly. The result does not depend on
    ``chunk_size``, the largest number of tokens in a chunk. The backward pass keeps the inputs alone, whatever the
    ``implementation``: "xla" or "triton".
    """
    arrays = (q_BLGN, k_BLGN, v_BLHP, gain_BLH, log_decay, state_BHNP, reset_BL, scale_BLH, skip_H)
    return _differentiable(chunk_size, implementation, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(chunk_size: int, implementation: str, arrays: tuple[Any, ...]) -> tuple[Array, Array]:
    return _module(implementation).forward(*arrays, chunk_size=chunk_size)


def _module(implementation: str) -> Any:
    return importlib.import_module(f"ssm_jax.ops.linear_attention.{implementation}")


def _forward(
    chunk_size: int, implementation: str, arrays: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    return _differentiable(chunk_size, implementation, arrays), arrays


def _backward(
    chunk_size: int, implementation: str, arrays: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[tuple[Any, ...]]:
    gradients = _module(implementation).backward(*arrays, *cotangents, chunk_size=chunk_size)
    d_q, d_k, d_v, d_gain, d_log_decay, d_state, d_skip = gradients
    _, _, _, gain, log_decay, _, _, scale, skip = arrays
    return (
        (
            d_q,
            d_k,
            d_v,
            None if gain is None else d_gain,
            jnp.zeros_like(log_decay) if log_decay.ndim == 1 else d_log_decay,
            d_state,
            None,
            None if scale is None else jnp.zeros_like(scale),
            None if skip is None else d_skip,
        ),
    )


_differentiable.defvjp(_forward, _backward)
