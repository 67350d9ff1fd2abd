"""Dense hidden connections: a layer reads out its hidden state together with those of the layers below it (arXiv:2403.00818).

    h'_t = h_t + gate(x_t) * sum_{i=1..m} proj_i(h_t of layer l-i),   gate(x) = silu(W_2 silu(W_1 x))

The idea is one, and what is fused depends on the mixer: retention fuses keys and values before their outer product, Mamba reads
out several states with one C. Both say what they hand upward (``features``) and take what came (``shallow``). Fused values are
never handed on and never carried to the next token, so that decoding needs no other cache.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from ssm_jax.nn import initializers
from ssm_jax.nn.norm import RMSNorm
from ssm_jax.ops.products import dot_general
from ssm_jax.ops.silu import gated_silu, silu
from ssm_jax.typing import Activations, Positions, PyTree


class Shallow(NamedTuple):
    """What a layer finds from below.

    sources: the features of the m layers below, the nearest first; zeros where there are less than m. first: whether there is none.
    """

    sources: tuple[PyTree, ...]
    first: Bool[Array, ""]


class Stream(NamedTuple):
    """What goes from layer to layer: the residual stream, and the features of the last m layers."""

    h_BLD: Activations
    shallow: Shallow


class DenseMixer(Protocol):
    """A mixer with a second way to be called."""

    def init_state(self, batch_size: int, capacity: int | None = None) -> PyTree:
        """As every mixer's."""

    def features_like(self, x_BLD: Activations) -> PyTree:
        """Zeros in the shapes of the features of a call with ``x_BLD``; as sources they add nothing."""

    def fused(
        self, x_BLD: Activations, state: PyTree, positions: Positions | None, shallow: Shallow
    ) -> tuple[Activations, PyTree, PyTree]:
        """The output, the state and the features of this layer."""


class DenseBlock(nn.Module):
    """h + dropout(mixer(norm(h), features of the ``sources`` layers below)). ``mixer`` is a DenseMixer."""

    norm: nn.Module
    mixer: nn.Module
    sources: int
    dropout: float = 0.0

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> PyTree:
        """Zeros: the mixer's state before any token."""
        return self.mixer.init_state(batch_size, capacity)

    @nn.compact
    def __call__(
        self, stream: Stream, state: PyTree, positions: Positions | None, deterministic: bool = True
    ) -> tuple[Stream, PyTree]:
        h_BLD, shallow = stream
        out_BLD, state, features = self.mixer.fused(self.norm(h_BLD), state, positions, shallow)
        out_BLD = nn.Dropout(self.dropout)(out_BLD, deterministic=deterministic)
        sources = (features, *shallow.sources)[: self.sources]
        return Stream(h_BLD + out_BLD.astype(h_BLD.dtype), Shallow(sources, jnp.zeros_like(shallow.first))), state


def enter(layer: nn.Module, h_BLD: Activations) -> PyTree:
    """What the first of a stack of layers takes: the residual stream, and for a DenseBlock that nothing lies below it."""
    if not isinstance(layer, DenseBlock):
        return h_BLD
    nothing = layer.mixer.features_like(h_BLD)
    return Stream(h_BLD, Shallow((nothing,) * layer.sources, jnp.asarray(True)))


def leave(stream: PyTree) -> Activations:
    """The residual stream after the last layer."""
    return stream.h_BLD if isinstance(stream, Stream) else stream


class Gate(nn.Module):
    """silu(W_2 silu(W_1 x)), of any shape per token; W_1 projects to ``bottleneck`` features.

    With ``activated`` False the last silu is left to the caller.
    """

    shape: tuple[int, ...]
    bottleneck: int
    kernel_init: Initializer = initializers.torch_linear
    activated: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Activations) -> jax.Array:
        kinds: dict[str, Any] = {
            "use_bias": False,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "dot_general": dot_general,
        }
        hidden = silu(nn.Dense(self.bottleneck, name="down", **kinds)(x_BLD))
        up = nn.DenseGeneral(self.shape, name="up", **kinds)(hidden)
        return silu(up) if self.activated else up


class Fusion(nn.Module):
    """norm(x + gate(u) * sum_i proj_i(x_i)) for values [B, L, H, P]; x itself where nothing lies below.

    Attributes:
        bottleneck: of the gate; None for no gate.
        linear: whether each source goes through a matrix of its own, over all heads; else it is taken as it is.
        epsilon: of the RMSNorm over all heads of the sum; None for no norm.
    """

    bottleneck: int | None
    linear: bool
    epsilon: float | None
    kernel_init: Initializer = initializers.torch_linear
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLHP: Float[Array, "B L H P"],
        u_BLD: Activations,
        sources: tuple[Float[Array, "B L H P"], ...],
        first: Bool[Array, ""],
    ) -> Float[Array, "B L H P"]:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = x_BLHP.shape[-2:]
        if self.linear:
            sources = tuple(
                nn.DenseGeneral(
                    shape,
                    axis=(-2, -1),
                    use_bias=False,
                    kernel_init=self.kernel_init,
                    dot_general=dot_general,
                    name=f"source_{i}",
                    **kinds,
                )(source)
                for i, source in enumerate(sources)
            )
        added = sum(sources[1:], sources[0])
        if self.bottleneck is not None:
            gate = Gate(shape, self.bottleneck, self.kernel_init, activated=False, name="gate", **kinds)
            added = gated_silu(added, gate(u_BLD))
        fused = x_BLHP + added
        if self.epsilon is not None:
            fused = RMSNorm(self.epsilon, axes=2, name="norm", **kinds)(fused)
        return jnp.where(first, x_BLHP, fused)
