"""Causal depthwise convolution with a few taps: y_t = activation(bias + sum_j kernel_j * x_{t-K+1+j}).

It is a recurrence whose state is the window of the last K-1 inputs. A tap that reaches across a document start reads zero.
``reference`` is the sequential oracle, ``xla`` runs everywhere. A kernel registers a forward under "causal_conv" and a backward
under "causal_conv_backward"; both see the same ``Inputs``, and nothing else is kept between them: the forward pass is cheaper to
run again than its K shifted copies are to store.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.ops import dispatch, triton_call
from ssm_jax.ops.causal_conv import xla
from ssm_jax.ops.causal_conv.inputs import Inputs
from ssm_jax.ops.causal_conv.reference import reference
from ssm_jax.typing import Lengths, Reset

dispatch.register("causal_conv", "reference", reference)
dispatch.register("causal_conv", "xla", xla.forward)
dispatch.register("causal_conv_backward", "xla", xla.backward)
for _op, _function in (("causal_conv", "forward"), ("causal_conv_backward", "backward")):
    if _reason := triton_call.missing():
        dispatch.register_unavailable(_op, "triton", _reason)
    else:
        dispatch.register_lazy(_op, "triton", f"ssm_jax.ops.causal_conv.triton:{_function}")


def causal_conv(
    x_BLD: Float[Array, "B L D"],
    kernel_KD: Float[Array, "K D"],
    bias_D: Float[Array, "D"] | None = None,
    state: Float[Array, "B K-1 D"] | None = None,
    reset: Reset | None = None,
    *,
    lengths: Lengths | None = None,
    activation: Literal["silu"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B K-1 D"]]:
    """Convolves each channel with its own taps; ``kernel_KD[K-1]`` multiplies the current token.

    Args:
        state: the window: the last K-1 inputs before the call, oldest first. None: zeros.
        reset: True marks the first token of a document; taps that reach further back read zero.
        lengths: tokens per row; those after are absent, leave the window untouched, and have undefined outputs.
        activation: "silu" multiplies the result by its sigmoid.
        implementation: None for the best one of the platform, or a name.

    Returns:
        y in x's dtype, computed in float32, and the new window in float32: the last K-1 present inputs, with zeros instead of
        inputs of an earlier document than the last one's.

    Raises:
        ImplementationError: ``implementation`` is named and cannot run here.
    """
    batch, _, width = x_BLD.shape
    wide = jnp.promote_types(x_BLD.dtype, jnp.float32)
    if bias_D is None:
        bias_D = jnp.zeros((width,), wide)
    if state is None:
        state = jnp.zeros((batch, kernel_KD.shape[0] - 1, width), wide)
    inputs = Inputs(x_BLD, kernel_KD, bias_D, state.astype(wide), reset, lengths)
    if implementation == "reference":
        return reference(inputs, activation=activation)
    return _differentiable(activation, implementation, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(activation: str | None, implementation: str | None, inputs: Inputs) -> tuple[Array, Array]:
    return dispatch.call("causal_conv", implementation, inputs, activation=activation)


def _forward(activation: str | None, implementation: str | None, inputs: Inputs) -> tuple[tuple[Array, Array], Inputs]:
    return _differentiable(activation, implementation, inputs), inputs


def _backward(
    activation: str | None, implementation: str | None, inputs: Inputs, cotangents: tuple[Array, Array]
) -> tuple[Inputs]:
    gradients = dispatch.call("causal_conv_backward", implementation, inputs, *cotangents, activation=activation)
    return (Inputs._make((*gradients, None, None)),)


_differentiable.defvjp(_forward, _backward)
