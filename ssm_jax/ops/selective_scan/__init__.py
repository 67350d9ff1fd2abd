"""Mamba's selective scan: a diagonal recurrence whose step size, input and output maps depend on the token.

Gu & Dao 2023, arXiv:2312.00752, section 3 and algorithm 2. ``reference`` is the sequential oracle, ``xla`` runs everywhere. A
kernel registers a forward under "selective_scan" and a backward under "selective_scan_backward"; both see the same ``Inputs``,
and the only thing kept between them, besides those, is the state that enters each chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.ops import dispatch, triton_call
from ssm_jax.ops.selective_scan import xla
from ssm_jax.ops.selective_scan.inputs import Inputs
from ssm_jax.ops.selective_scan.reference import reference
from ssm_jax.typing import Lengths, Reset

DEFAULT_CHUNK_SIZE = 32

dispatch.register("selective_scan", "reference", reference)
dispatch.register("selective_scan", "xla", xla.forward)
dispatch.register("selective_scan_backward", "xla", xla.backward)
dispatch.register_lazy("selective_scan", "pallas", "ssm_jax.ops.selective_scan.pallas:forward")
dispatch.register_lazy("selective_scan_backward", "pallas", "ssm_jax.ops.selective_scan.pallas:backward")
for _op, _function in (("selective_scan", "forward"), ("selective_scan_backward", "backward")):
    if _reason := triton_call.missing():
        dispatch.register_unavailable(_op, "triton", _reason)
    else:
        dispatch.register_lazy(_op, "triton", f"ssm_jax.ops.selective_scan.triton:{_function}")


def selective_scan(
    x_BLE: Float[Array, "B L E"],
    dt_BLE: Float[Array, "B L E"] | Float[Array, "B L R"],
    A_EN: Float[Array, "E N"],
    B_BLN: Float[Array, "B L N"],
    C_BLN: Float[Array, "B L N"],
    D_E: Float[Array, "E"] | None = None,
    z_BLE: Float[Array, "B L E"] | None = None,
    dt_bias_E: Float[Array, "E"] | None = None,
    state: Float[Array, "B N E"] | None = None,
    reset: Reset | None = None,
    *,
    dt_softplus: bool = True,
    dt_up_RE: Float[Array, "R E"] | None = None,
    lengths: Lengths | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B N E"]]:
    """Runs the selective scan over axis 1.

        dt_t = softplus(dt_t + dt_bias)
        h_t  = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t
        y_t  = (sum_n C_t h_t + D x_t) * silu(z_t)

    Gradients are reverse-mode; the reference has forward-mode ones too.

    Args:
        A_EN: negative rates, one per channel and state entry.
        D_E, z_BLE, dt_bias_E: left out where None.
        state: h before the first token; zeros if None. Channels are its last, fast axis.
        reset: True at the first token of a document: there h_t is its second term alone.
        dt_up_RE: step sizes of rank R: ``dt_BLE`` is [B, L, R], and dt its product with this matrix, which is computed again in the
            backward pass instead of kept.
        dt_softplus: whether ``dt_BLE + dt_bias_E`` goes through softplus, or is the step size itself.
        lengths: present tokens per row; later ones leave the state alone (dt_t = 0) and their outputs mean nothing.
        implementation: None for the best one of the platform, or a name.
        chunk_size: tokens between two states that are kept for the backward pass. A matter of speed and memory only.

    Returns:
        y in x's dtype, and the state after the last present token. Everything between is float32 (float64 for float64 x).

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
    """
    wide = jnp.promote_types(x_BLE.dtype, jnp.float32)
    batch, length, channels = x_BLE.shape
    if state is None:
        state = jnp.zeros((batch, A_EN.shape[1], channels), wide)
    if reset is not None and lengths is not None:
        reset = reset & (jnp.arange(length) < lengths[:, None])
    inputs = Inputs(
        x_BLE,
        dt_BLE,
        A_EN.astype(wide).T,
        B_BLN,
        C_BLN,
        None if D_E is None else D_E.astype(wide),
        z_BLE,
        None if dt_bias_E is None else dt_bias_E.astype(wide),
        state.astype(wide),
        reset,
        lengths,
    )
    chunk_size = min(chunk_size or DEFAULT_CHUNK_SIZE, length)
    if implementation == "reference":
        inputs = _at_full_rank(inputs, dt_up_RE)
        y, last_state, _ = reference(inputs, dt_softplus=dt_softplus, chunk_size=chunk_size)
        return y, last_state
    return _differentiable(dt_softplus, chunk_size, implementation, inputs, dt_up_RE)


def _at_full_rank(inputs: Inputs, dt_up_RE: Array | None) -> Inputs:
    return inputs if dt_up_RE is None else inputs._replace(dt_BLE=inputs.dt_BLE @ dt_up_RE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(
    dt_softplus: bool, chunk_size: int, implementation: str | None, inputs: Inputs, dt_up_RE: Array | None
) -> tuple[Array, Array]:
    return _forward(dt_softplus, chunk_size, implementation, inputs, dt_up_RE)[0]


def _forward(
    dt_softplus: bool, chunk_size: int, implementation: str | None, inputs: Inputs, dt_up_RE: Array | None
) -> tuple[tuple[Array, Array], tuple[Inputs, Array | None, Array]]:
    y, state, chunk_states = dispatch.call(
        "selective_scan",
        implementation,
        _at_full_rank(inputs, dt_up_RE),
        dt_softplus=dt_softplus,
        chunk_size=chunk_size,
    )
    return (y, state), (inputs, dt_up_RE, chunk_states)


def _backward(
    dt_softplus: bool,
    chunk_size: int,
    implementation: str | None,
    residuals: tuple[Inputs, Array | None, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Inputs, Array | None]:
    inputs, dt_up_RE, chunk_states = residuals
    gradients = dispatch.call(
        "selective_scan_backward",
        implementation,
        _at_full_rank(inputs, dt_up_RE),
        chunk_states,
        *cotangents,
        dt_softplus=dt_softplus,
        chunk_size=chunk_size,
    )
    if dt_up_RE is None:
        return gradients, None
    d_low, d_up = jax.vjp(jnp.matmul, inputs.dt_BLE, dt_up_RE)[1](gradients.dt_BLE)
    return gradients._replace(dt_BLE=d_low), d_up


_differentiable.defvjp(_forward, _backward)
