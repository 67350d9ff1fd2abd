"""First-order diagonal linear recurrence, real or complex: h_t = a_t * h_{t-1} + b_t.

The backward pass is the same recurrence in the other direction,

    g_t = dh_t + a_{t+1} * g_{t+1},   db_t = g_t,   da_t = g_t * h_{t-1},   dh_0 = a_1 * g_1,

so that an implementation is a forward function only, and ``h`` and ``a`` are all that is kept for it. Decays are only ever
multiplied: dividing by a cumulative product, or exponentiating the difference of large sums, loses every digit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from ssm_jax.ops import dispatch
from ssm_jax.ops.linear_recurrence.xla import reference, xla
from ssm_jax.ops.resets import clear
from ssm_jax.typing import Reset


def linear_recurrence(
    a: Inexact[Array, "#B L *#rest"],
    b: Inexact[Array, "B L *rest"],
    state: Inexact[Array, "B *rest"] | None = None,
    reset: Reset | None = None,
    *,
    reverse: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Inexact[Array, "B L *rest"], Inexact[Array, "B *rest"]]:
    """Runs h_t = a_t * h_{t-1} + b_t over axis 1, from h_0 = ``state`` (zeros if None).

    Axes of ``a`` may have size 1 where ``b`` has more, but for the length; such an ``a`` is never copied.

    ``reverse`` runs from the last token to the first: h_t = a_t * h_{t+1} + b_t. Where ``reset`` is True, h_t = b_t: the first
    token of a document, in the direction of the recurrence.

    Returns:
        h in the inputs' dtype, and the h that was computed last, in float32 (complex64). Everything between is float32 too.

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
    """
    if implementation is not None:
        dispatch.lookup("linear_recurrence", implementation)
    dtype = jnp.result_type(a, b)
    wide = jnp.promote_types(dtype, jnp.float32)
    a, b = a.astype(wide), b.astype(wide)
    state = jnp.zeros(b.shape[:1] + b.shape[2:], wide) if state is None else state.astype(wide)
    if reset is not None:
        state = clear(state, reset[:, -1 if reverse else 0])
        a = jnp.where(lax.expand_dims(reset, range(2, a.ndim)), 0, a)
    if implementation == "reference":
        h = reference(a, b, state, reverse=reverse)
    elif b.shape[1] == 1:
        h = a * state[:, None] + b
    else:
        h = _differentiable(reverse, implementation, chunk_size, a, b, state)
    return h.astype(dtype), h[:, 0 if reverse else -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(
    reverse: bool, implementation: str | None, chunk_size: int | None, a: Array, b: Array, state: Array
) -> Array:
    return dispatch.call("linear_recurrence", implementation, a, b, state, reverse=reverse, chunk_size=chunk_size)


def _forward(
    reverse: bool, implementation: str | None, chunk_size: int | None, a: Array, b: Array, state: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    h = _differentiable(reverse, implementation, chunk_size, a, b, state)
    return h, (a, h, state)


def _backward(
    reverse: bool,
    implementation: str | None,
    chunk_size: int | None,
    residuals: tuple[Array, Array, Array],
    dh: Array,
) -> tuple[Array, Array, Array]:
    a, h, state = residuals
    if reverse:
        a_next = jnp.concatenate([jnp.zeros_like(a[:, :1]), a[:, :-1]], axis=1)
        h_previous = jnp.concatenate([h[:, 1:], state[:, None]], axis=1)
    else:
        a_next = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
        h_previous = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
    g = _differentiable(not reverse, implementation, chunk_size, a_next, dh, jnp.zeros_like(state))
    first = -1 if reverse else 0
    return _sum_to(g * h_previous, a.shape), g, a[:, first] * g[:, first]


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an array of this shape that was broadcast to that of ``x``."""
    spread = tuple(axis for axis, size in enumerate(shape) if size != x.shape[axis])
    return jnp.sum(x, axis=spread, keepdims=True) if spread else x


_differentiable.defvjp(_forward, _backward)

dispatch.register("linear_recurrence", "reference", reference)
dispatch.register("linear_recurrence", "xla", xla)
dispatch.register_lazy("linear_recurrence", "pallas", "ssm_jax.ops.linear_recurrence.pallas:pallas")
