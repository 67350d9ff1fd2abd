"""Recurrent state: explicit pytrees whose every leaf has known logical axes.

A mixer state is a frozen dataclass with a class attribute ``AXES`` that names the axes of each field. A field may hold
another state; its axes are then prefixed. States carry no context: their size does not depend on how much was read.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from ssm_jax.typing import PyTree

S = TypeVar("S")
Axes = tuple[str, ...]


@struct.dataclass
class MambaState:
    """State of a Mamba-1 layer, float32.

    conv: the last K-1 inputs of the convolution, oldest first, [B, K-1, E].
    ssm: h, [B, N, E], channels on the fast axis.
    """

    conv: Any
    ssm: Any
    AXES: ClassVar[dict[str, Axes]] = {"conv": ("batch", "window", "inner"), "ssm": ("batch", "state", "inner")}


@struct.dataclass
class Mamba2State:
    """State of a Mamba-2 layer, float32.

    conv_x, conv_B, conv_C: the last K-1 inputs of the convolutions, oldest first, [B, K-1, E] and [B, K-1, G*N].
    ssm: key x value memory, [B, H, N, P].
    """

    conv_x: Any
    conv_B: Any
    conv_C: Any
    ssm: Any
    AXES: ClassVar[dict[str, Axes]] = {
        "conv_x": ("batch", "window", "inner"),
        "conv_B": ("batch", "window", "group_state"),
        "conv_C": ("batch", "window", "group_state"),
        "ssm": ("batch", "heads", "state", "head_dim"),
    }


@struct.dataclass
class DSSState:
    """State of a diagonal state space, float32.

    ssm: X, real and imaginary parts, [B, H, 2, N].
    """

    ssm: Any
    AXES: ClassVar[dict[str, Axes]] = {"ssm": ("batch", "inner", "parts", "state")}


@struct.dataclass
class AttentionState:
    """State of an attention layer over blocks of W tokens, float32.

    k, v: keys (rotated, if they are) and values by their place in the block, [B, G, S, P], S <= W; see ``nn.key_cache``.
    position: of the next token in its document, int32 [B].
    block: W, no leaf.
    """

    k: Any
    v: Any
    position: Any
    block: int = struct.field(pytree_node=False)
    AXES: ClassVar[dict[str, Axes]] = {
        "k": ("batch", "heads", "places", "head_dim"),
        "v": ("batch", "heads", "places", "head_dim"),
        "position": ("batch",),
    }

    @property
    def capacity(self) -> int | None:
        """Tokens of a document that there is room for: S where blocks are longer, else None, for as many as there may be."""
        places = self.k.shape[-2]
        return places if places < self.block else None


@struct.dataclass
class RetentionState:
    """State of a retention layer.

    kv: the decayed sum of keys times values, not normalised, float32 [B, H, N, P].
    position: number of tokens read of the current document, int32 [B].
    """

    kv: Any
    position: Any
    AXES: ClassVar[dict[str, Axes]] = {"kv": ("batch", "heads", "state", "head_dim"), "position": ("batch",)}


@struct.dataclass
class ChunkAttentionState:
    """State of attention within a chunk and to the one before, float32; what is not kept is None.

    k, v: of the open chunk, keys turned by their place, [B, H, S, P] and [B, H, S, Q]; beyond the last slot meaningless.
    past_k, past_v: of the chunk before, keys turned by their place less that chunk's length. past_count: its slots, int32 [B].
    """

    k: Any
    v: Any
    past_k: Any
    past_v: Any
    past_count: Any
    AXES: ClassVar[dict[str, Axes]] = {
        "k": ("batch", "heads", "places", "head_dim"),
        "v": ("batch", "heads", "places", "head_dim"),
        "past_k": ("batch", "heads", "places", "head_dim"),
        "past_v": ("batch", "heads", "places", "head_dim"),
        "past_count": ("batch",),
    }


@struct.dataclass
class ChunkLayerState:
    """State of a layer that works in chunks; what it does not have is None.

    attention: of its attention. mixer: of the mixer that follows. window: the last three inputs of its step, float32 [B, 3, D].
    """

    attention: Any
    mixer: Any
    window: Any
    AXES: ClassVar[dict[str, Axes]] = {"attention": (), "mixer": (), "window": ("batch", "window", "embed_state")}


@struct.dataclass
class LMState:
    """State of a language model.

    layers: the mixer states, stacked: every leaf has a leading layer axis.
    position: number of tokens read of the current document, int32 [B].
    """

    layers: Any
    position: Any
    AXES: ClassVar[dict[str, Axes]] = {"layers": ("layers",), "position": ("batch",)}


@struct.dataclass
class ChunkedState(LMState):
    """State of a language model that reads chunk by chunk.

    memory: what the last closed chunk wrote, float32 [B, R, D]; None for no memory.
    head: the first R outputs of the open chunk, where those will be its memory, else None.
    """

    memory: Any = None
    head: Any = None
    AXES: ClassVar[dict[str, Axes]] = {
        **LMState.AXES,
        "memory": ("batch", "memory", "embed_state"),
        "head": ("batch", "memory", "embed_state"),
    }


def logical_axes(state: S) -> S:
    """The state with every leaf replaced by the tuple of its logical axis names."""

    def walk(node: Any, prefix: Axes) -> Any:
        if node is None:
            return None
        if hasattr(node, "AXES"):
            return node.replace(**{name: walk(getattr(node, name), prefix + axes) for name, axes in node.AXES.items()})
        if isinstance(node, dict):
            return {key: walk(item, prefix) for key, item in node.items()}
        if isinstance(node, (tuple, list)):
            return type(node)(walk(item, prefix) for item in node)
        return prefix

    return walk(state, ())


def capacity(state: PyTree) -> int | None:
    """Tokens of a document that every layer of a state has room for; None where there is no end to them."""
    layers = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, AttentionState))
    limits = [layer.capacity for layer in layers if isinstance(layer, AttentionState)]
    return min((limit for limit in limits if limit is not None), default=None)


def take_lanes(state: S, lanes: Sequence[int] | Int[Array, "lanes"]) -> S:
    """Picks, repeats, reorders or drops batch lanes: lane ``i`` of the result is lane ``lanes[i]`` of ``state``.

    Raises:
        IndexError: a lane that the state does not have (traced lanes are not checked).
    """
    index = jnp.asarray(lanes, dtype=jnp.int32)

    def take(axis: int, leaf: Any) -> Array:
        count = leaf.shape[axis]
        if (
            not isinstance(index, jax.core.Tracer)
            and index.size
            and not (-count <= index.min() and index.max() < count)
        ):
            raise IndexError(f"take_lanes: lanes {index.tolist()} of a state with {count} lane(s)")
        return jnp.take(leaf, index, axis=axis)

    return map_lanes(take, state)


def map_lanes(function: Callable[..., Any], state: S, *others: S) -> S:
    """``function(axis, leaf, ...)`` for every leaf of states of one structure, ``axis`` being that of the batch lanes."""

    def apply(axes: Axes, *leaves: Any) -> Any:
        return function(axes.index("batch"), *leaves)

    return jax.tree.map(apply, logical_axes(state), state, *others, is_leaf=_is_axes)


def clear_lanes(state: S, which_B: Bool[Array, "B"]) -> S:
    """The state with zeros in the marked lanes; by selection, so that a lane that broke is usable again."""

    def clear_leaf(axes: Axes, leaf: Array) -> Array:
        lane = axes.index("batch")
        return jnp.where(
            which_B.reshape(*[1] * lane, -1, *[1] * (leaf.ndim - lane - 1)), jnp.zeros((), leaf.dtype), leaf
        )

    return jax.tree.map(clear_leaf, logical_axes(state), state, is_leaf=lambda node: _is_axes(node))


def stack_layers(state: PyTree, n_layers: int) -> PyTree:
    """Repeats a single layer's state along a new leading layer axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n_layers, *leaf.shape)), state)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)
