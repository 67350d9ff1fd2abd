"""Which kernels get a low-rank path, and how their axes are read. Static and hashable: it is a constant of compiled programs."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from ssm_jax.config import suggest
from ssm_jax.errors import ConfigError
from ssm_jax.optim.partition import paths
from ssm_jax.optim.relora.constants import ALPHA, RANK
from ssm_jax.typing import Params

A, B = ":a", ":b"
"""What follows a kernel's own name in the names of its factors, which lie beside it."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How the kernels are laid out whose path ``pattern`` finds (``re.search``).

    batch: axes that are stacked, each entry a kernel of its own (layers). inputs, outputs: the axes that are summed with the
    input's, and those that the output has; outputs None is all the rest. It fits a leaf that has exactly these axes; where nothing
    is declared a leaf with more than two is not guessed at.
    """

    pattern: str
    batch: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] | None = None

    def axes(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
        """(batch, inputs, outputs) of a leaf with ``ndim`` axes; None where it does not fit."""
        rest = tuple(axis for axis in range(ndim) if axis not in (*self.batch, *self.inputs))
        outputs = rest if self.outputs is None else self.outputs
        every = sorted((*self.batch, *self.inputs, *outputs))
        return (self.batch, self.inputs, outputs) if every == list(range(ndim)) and self.inputs and outputs else None


Select = str | Kernel | Sequence[str | Kernel] | Callable[[str, Any], Kernel | bool | None]
"""Patterns of paths, or a function (path, leaf) -> a Kernel, or whether to take it. A bare pattern, and True, stand for kernels
[inputs, outputs]; a bare pattern finds only leaves named ``kernel``."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A kernel with a low-rank path: W + scale * A B, with A [*batch, *inputs, rank] and B [*batch, rank, *outputs]."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def a_path(self) -> str:
        return self.path + A

    @property
    def b_path(self) -> str:
        return self.path + B

    @property
    def batch_axes(self) -> int:
        """How many leading axes of A and of B are stacked."""
        return len(self.batch)

    @property
    def width_in(self) -> int:
        return math.prod(self.shape[axis] for axis in self.inputs)

    @property
    def width_out(self) -> int:
        return math.prod(self.shape[axis] for axis in self.outputs)

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """Of A."""
        return (*(self.shape[axis] for axis in (*self.batch, *self.inputs)), rank)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """Of B."""
        return (*(self.shape[i] for i in self.batch), rank, *(self.shape[i] for i in self.outputs))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What ``plan`` decided."""

    leaves: tuple[Leaf, ...]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def adapters(self) -> dict[str, Leaf]:
        """Path of every factor -> the kernel it belongs to."""
        return {path: leaf for leaf in self.leaves for path in (leaf.a_path, leaf.b_path)}

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint's description: plain lists, numbers and strings."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "kernels": {
                leaf.path: {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in dataclasses.asdict(leaf).items()
                    if name != "path"
                }
                for leaf in self.leaves
            },
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Spec":
        """The inverse of ``to_dict``."""

        def leaf(path: str, fields: Mapping[str, Any]) -> Leaf:
            shape, batch, inputs, outputs = (tuple(fields[name]) for name in ("shape", "batch", "inputs", "outputs"))
            return Leaf(path, shape, fields["dtype"], batch, inputs, outputs)

        leaves = tuple(leaf(path, fields) for path, fields in content["kernels"].items())
        return cls(leaves, int(content["rank"]), float(content["alpha"]))

    def require_same(self, stored: "Spec") -> None:
        """Raises ConfigError unless ``stored``, of the state that is gone on from, is this one; the message says what differs."""
        for name in ("rank", "alpha"):
            ours, theirs = getattr(self, name), getattr(stored, name)
            if ours != theirs:
                raise ConfigError(
                    f"ReLoRA's {name} is {ours}, and the stored adapters have {theirs}: set it to {theirs}, or export the merged "
                    "parameters and start anew from them."
                )
        here, there = ({leaf.path: leaf for leaf in spec.leaves} for spec in (self, stored))
        for path in sorted({*here, *there}):
            if here.get(path) != there.get(path):
                where = "now" if path not in there else "in the stored state" if path not in here else "in another form"
                raise ConfigError(
                    f"Kernel {path} has a low-rank path only {where}; keep the selection that the state was stored with."
                    if path not in here or path not in there
                    else f"Kernel {path} is {here[path]} here and {there[path]} in the stored state; use the same model."
                )


def plan(params: Params, select: Select, rank: int = RANK, alpha: float = ALPHA) -> Spec:
    """The kernels of ``params`` (arrays or shapes) that ``select`` takes.

    Raises:
        ConfigError: a pattern or a selection that matches nothing, axes that cannot be told, rank above a kernel's width,
            parameters that have adapters already.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"ReLoRA's rank is {rank!r}; it must be an integer of at least 1.")
    if not 0 < alpha < math.inf:
        raise ConfigError(f"ReLoRA's alpha is {alpha}; it must be above 0.")
    leaves = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    wrapped = next((path for path in leaves if path.endswith((A, B))), None)
    if wrapped is not None:
        raise ConfigError(f"The parameters have an adapter already ({wrapped}); export them first.")
    chosen = _by_function(leaves, select) if callable(select) else _by_patterns(leaves, select)
    if not chosen:
        raise ConfigError("ReLoRA's selection takes no kernel; widen it.")
    found = [_leaf(path, leaves[path], chosen[path]) for path in leaves if path in chosen]
    for leaf in found:
        if rank > min(leaf.width_in, leaf.width_out):
            raise ConfigError(
                f"ReLoRA's rank is {rank}, above the width of {leaf.path}, which maps {leaf.width_in} numbers to {leaf.width_out}; "
                f"lower it to at most {min(leaf.width_in, leaf.width_out)}, or leave that kernel out of the selection."
            )
    return Spec(tuple(found), rank, float(alpha))


def _by_function(leaves: Mapping[str, Any], select: Callable[[str, Any], Kernel | bool | None]) -> dict[str, Kernel]:
    chosen = {path: select(path, leaf) for path, leaf in leaves.items()}
    return {path: Kernel(path) if entry is True else entry for path, entry in chosen.items() if entry}


def _by_patterns(leaves: Mapping[str, Any], select: str | Kernel | Iterable[str | Kernel]) -> dict[str, Kernel]:
    chosen: dict[str, Kernel] = {}
    for entry in (select,) if isinstance(select, str | Kernel) else select:
        kernel = Kernel(entry) if isinstance(entry, str) else entry
        matched = [path for path in leaves if _finds(kernel.pattern, path)]
        if isinstance(entry, str):
            matched = [path for path in matched if path.split("/")[-1] == "kernel"]
        if not matched:
            kernels = [path for path in leaves if path.split("/")[-1] == "kernel"]
            raise ConfigError(
                f"ReLoRA's selection: {kernel.pattern!r} matches no kernel; {suggest(kernel.pattern, kernels)}"
            )
        for path in matched:
            if path not in chosen or kernel.axes(leaves[path].ndim) is not None:
                chosen[path] = kernel
    return chosen


def _finds(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise ConfigError(f"ReLoRA's selection: {pattern!r} is not a regular expression ({error}).") from error


def _leaf(path: str, leaf: Any, kernel: Kernel) -> Leaf:
    axes = kernel.axes(leaf.ndim)
    plain = not kernel.batch and kernel.inputs == (0,) and kernel.outputs is None
    if axes is None or (plain and leaf.ndim != 2):
        raise ConfigError(
            f"{path} has {leaf.ndim} axes, {tuple(leaf.shape)}; say which are stacked, inputs and outputs, as in relora.Kernel("
            f"{path!r}, batch=(0,), inputs=(1,), outputs=(2, 3)); relora.kernels(model, inputs) finds out."
        )
    return Leaf(path, tuple(leaf.shape), str(leaf.dtype), *axes)
