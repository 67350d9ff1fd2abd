"""Tensor maps: which leaves of our parameter tree make up which tensor of a published format.

    {"layers.{i}.in_proj.weight": (linear("layers/mixer/in_proj/kernel"), linear("layers/mixer/B_proj/kernel"))}

reads: rows of the published tensor of layer i are first those of slice i of our ``in_proj`` kernel, then those of
``B_proj``; both are stored (out, in). (GPT-2 stores (in, out), and there columns stand side by side; in GPT-NeoX rows of the
leaves take turns, head by head.) A name without ``{i}``
is not stacked. Where layers of several kinds take turns, each kind is a stack of its own: slice i of the one that ``{i:2+1}`` names
is layer 2 i + 1. The one map serves both directions. An entry without parts, or whose leaves the model does not have (an absent
bias), stands for a tensor that does not exist.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ssm_jax.errors import LayoutError
from ssm_jax.interop.tensor import Tensor, aligned_empty
from ssm_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of a published tensor, and the leaf (a path with slashes) that it is a rearrangement of.

    to_torch: leaf (one layer's slice) -> block. from_torch: (block, the leaf's shape) -> leaf.
    axis: along which the blocks of one tensor stand, the same for all of them.
    by_head: whether a block's first axis is one of heads, which the published tensor has merged with the second.
    """

    leaf: str
    to_torch: Callable[[Any], Any]
    from_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    axis: int = 0
    by_head: bool = False


TensorMap = Mapping[str, tuple[Part, ...]]


def linear(leaf: str, inputs: int = 1) -> Part:
    """A kernel [*in, *out] of ours with ``inputs`` input axes; (prod(out), prod(in)) in torch."""

    def to_torch(w: Any) -> Any:
        return w.reshape(math.prod(w.shape[:inputs]), -1).T

    return Part(leaf, to_torch, lambda block, shape: block.T.reshape(shape))


def conv1d(leaf: str, inputs: int = 1, leading: tuple[int, ...] = ()) -> Part:
    """A kernel [*in, *out] of ours with ``inputs`` input axes; (*leading, prod(in), prod(out)) in GPT-2's Conv1D."""

    def to_torch(w: Any) -> Any:
        return w.reshape(*leading, math.prod(w.shape[:inputs]), -1)

    return Part(leaf, to_torch, lambda block, shape: block.reshape(shape), axis=-1)


def depthwise(leaf: str) -> Part:
    """A causal depthwise kernel [K, C] of ours; (C, 1, K) in torch."""
    return Part(leaf, lambda w: w.T[:, None, :], lambda block, shape: block.reshape(shape[::-1]).T)


def vector(leaf: str) -> Part:
    """A bias or scale of any shape; flat in torch."""
    return Part(leaf, lambda w: w.reshape(-1), lambda block, shape: block.reshape(shape))


def head_linear(leaf: str) -> Part:
    """A kernel [in, H, P] of ours; (H, P, in) in torch, where it shares each head's rows with its neighbours."""
    return Part(
        leaf, lambda w: w.transpose(1, 2, 0), lambda block, shape: block.transpose(2, 0, 1), axis=1, by_head=True
    )


def head_vector(leaf: str) -> Part:
    """The bias [H, P] that goes with ``head_linear``."""
    return Part(leaf, lambda w: w, lambda block, shape: block, axis=1, by_head=True)


def same(leaf: str) -> Part:
    """A tensor with the same axes in both."""
    return Part(leaf, lambda w: w, lambda block, shape: block)


class _Slice(int):
    """The number of a stack's slice, which ``{i:a+b}`` turns into that of its layer, a i + b."""

    def __format__(self, spec: str) -> str:
        step, first = spec.split("+") if spec else (1, 0)
        return str(int(step) * int(self) + int(first))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A map entry that this model has: the published names in layer order, and each part with its shapes."""

    names: list[str]
    stacked: bool
    parts: list[tuple[Part, tuple[int, ...], tuple[int, ...]]]  # part, leaf shape of one layer, block shape

    @property
    def axis(self) -> int:
        return self.parts[0][0].axis

    @property
    def joined(self) -> tuple[int, ...]:
        """The shape of the blocks side by side."""
        whole = list(self.parts[0][2])
        whole[self.axis] = sum(block[self.axis] for *_, block in self.parts)
        return tuple(whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the published tensor."""
        whole = self.joined
        return (whole[0] * whole[1], *whole[2:]) if self.parts[0][0].by_head else whole

    def blocks(self, array: np.ndarray) -> list[np.ndarray]:
        """The parts of a published tensor."""
        ends = np.cumsum([block[self.axis] for *_, block in self.parts])
        return np.split(array.reshape(self.joined), ends[:-1], self.axis)


def to_tensors(tensor_map: TensorMap, params: Params) -> dict[str, Tensor]:
    """The published tensors of a parameter tree, each made when loaded. Raises LayoutError on a leaf without a place."""
    leaves = _flatten(params)

    def tensor(entry: _Entry, i: int) -> Tensor:
        def load() -> np.ndarray:
            arrays = [leaves[part.leaf][i] if entry.stacked else leaves[part.leaf] for part, *_ in entry.parts]
            blocks = [part.to_torch(np.asarray(a)) for (part, *_), a in zip(entry.parts, arrays, strict=True)]
            whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, entry.axis)
            return whole.reshape(entry.shape)

        return Tensor(entry.shape, np.dtype(leaves[entry.parts[0][0].leaf].dtype), load)

    entries = _entries(tensor_map, leaves)
    return {name: tensor(entry, i) for entry in entries for i, name in enumerate(entry.names)}


def to_params(
    tensor_map: TensorMap,
    tensors: Mapping[str, Tensor],
    abstract: Params,
    place: Callable[[str, np.ndarray], jax.Array],
) -> Params:
    """The parameter tree of the published tensors; at most one entry's leaves are on the host at a time.

    Args:
        abstract: the tree's shapes and dtypes; values are cast to them.
        place: (path, host array) -> device array; called once per leaf, as soon as it is complete.

    Raises:
        LayoutError: tensors that are missing, left over or of another shape; nothing has been loaded then.
    """
    leaves = _flatten(abstract)
    entries = _entries(tensor_map, leaves)
    _check(entries, tensors)
    placed = {}
    for entry in entries:
        buffers = {
            part.leaf: aligned_empty(leaves[part.leaf].shape, leaves[part.leaf].dtype) for part, *_ in entry.parts
        }
        for i, name in enumerate(entry.names):
            slot = i if entry.stacked else ...
            for (part, shape, _), block in zip(entry.parts, entry.blocks(tensors[name].load()), strict=True):
                buffers[part.leaf][slot] = part.from_torch(block, shape)
        for leaf in list(buffers):
            # Transfers are asynchronous and hold the host array until they are done.
            placed[leaf] = jax.block_until_ready(place(leaf, buffers.pop(leaf)))
    return traverse_util.unflatten_dict({path: placed[path] for path in leaves}, sep="/")


def published_shapes(tensor_map: TensorMap, params: Params) -> dict[str, tuple[int, ...]]:
    """Shape by published name, layers folded into ``{i}`` (``{i:a+b}`` for some of them), of a tree of arrays or of shapes."""
    leaves = _flatten(params)
    return {name: _entry(name, parts, leaves).shape for name, parts in _present(tensor_map, leaves)}


def _flatten(params: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")


def _present(tensor_map: TensorMap, leaves: Mapping[str, Any]) -> list[tuple[str, tuple[Part, ...]]]:
    present = [
        (name, parts) for name, parts in tensor_map.items() if parts and all(part.leaf in leaves for part in parts)
    ]
    homeless = set(leaves) - {part.leaf for _, parts in present for part in parts}
    if homeless:
        raise LayoutError(f"this layout has no tensor for the parameter {min(homeless)!r}; merge or remove it first.")
    return present


def _entries(tensor_map: TensorMap, leaves: Mapping[str, Any]) -> list[_Entry]:
    return [_entry(name, parts, leaves) for name, parts in _present(tensor_map, leaves)]


def _entry(template: str, parts: tuple[Part, ...], leaves: Mapping[str, Any]) -> _Entry:
    stacked = "{i" in template
    layers = leaves[parts[0].leaf].shape[0] if stacked else 1
    described = []
    for part in parts:
        shape = tuple(leaves[part.leaf].shape[1:] if stacked else leaves[part.leaf].shape)
        block = jax.eval_shape(part.to_torch, jax.ShapeDtypeStruct(shape, np.float32)).shape
        described.append((part, shape, tuple(block)))
    return _Entry([template.format(i=_Slice(i)) for i in range(layers)], stacked, described)


def _check(entries: list[_Entry], tensors: Mapping[str, Tensor]) -> None:
    expected = {name: entry.shape for entry in entries for name in entry.names}
    problems = [
        ("missing", [name for name in expected if name not in tensors]),
        ("left over", [name for name in tensors if name not in expected]),
        (
            "of another shape",
            [
                f"{name} {list(tensors[name].shape)} (expected {list(shape)})"
                for name, shape in expected.items()
                if name in tensors and tensors[name].shape != shape
            ],
        ),
        (
            "not of floating-point numbers",
            [f"{name} ({t.dtype})" for name, t in tensors.items() if not jnp.issubdtype(t.dtype, jnp.floating)],
        ),
    ]
    found = [f"{kind}: {_some(names)}" for kind, names in problems if names]
    if found:
        raise LayoutError(f"the weights do not fit the config: {'; '.join(found)}.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
