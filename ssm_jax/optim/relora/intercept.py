"""The low-rank path added to a Linen model that knows nothing of it.

    y = module(x) + scale * (x A) B      for every nn.Dense, nn.DenseGeneral and nn.Einsum with adapters beside its kernel

The adapters travel in ``params``, where ``nn.scan`` slices them with everything else. A weight that is used by other means cannot
be reached so: for it W + scale A B is formed, which costs an array of its size and the gradient of one.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ssm_jax.errors import ConfigError
from ssm_jax.ops.products import dot_general
from ssm_jax.optim.relora.spec import A, B, Kernel, Spec
from ssm_jax.optim.relora.trees import flat, materialise
from ssm_jax.typing import Params

MODULES = (nn.Dense, nn.DenseGeneral, nn.Einsum)
"""What is intercepted, subclasses included."""
_Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A model whose ``apply`` takes the combined tree, kernels and adapters; ``config`` and all else is the model's own."""

    model: nn.Module
    spec: Spec
    dropout: float = 0.0
    _by_hand: dict[Any, tuple[str, ...]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """``model.apply``. Before the first call of each kind the model is traced once, to see which weights it uses by hand."""
        by_hand = self.by_hand(variables, *args, method=method, **kwargs)
        params = materialise(variables["params"], self.spec, lambda leaf: leaf.path in by_hand)
        with interception(self.spec, self.dropout):
            return self.model.apply({**variables, "params": params}, *args, method=method, **kwargs)

    def by_hand(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> tuple[str, ...]:
        """Paths of the kernels that no interception reaches in this call: ``apply`` materialises them.

        Among them are those that the call does not use at all, which costs nothing.
        """
        kind = _kind(method, args, kwargs)
        if kind not in self._by_hand:
            reached: set[str] = set()

            def call(variables: Any) -> Any:
                with interception(self.spec, self.dropout, lambda path, axes: reached.add(path)):
                    return self.model.apply(variables, *args, method=method, **kwargs)

            jax.eval_shape(call, variables)
            self._by_hand[kind] = tuple(leaf.path for leaf in self.spec.leaves if leaf.path not in reached)
        return self._by_hand[kind]

    def readout(self, params: Params) -> Float[Array, "D V"]:
        """``LanguageModel.readout`` of the combined tree, should its matrix have a low-rank path too."""
        matrix: Array = self.model.readout(materialise(params, self.spec))
        return matrix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "model"), name)


def wrap(model: nn.Module, spec: Spec, dropout: float = 0.0) -> Wrapped:
    """``wrap(model, spec).apply({"params": combine(trainable, frozen)}, ...)``: the model with its low-rank paths.

    ``dropout``: rate on the adapters' input, in calls with ``rngs={"dropout": key}``.

    Raises:
        ConfigError: a rate outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ConfigError(f"The dropout of the adapters' input is {dropout}; it must be at least 0 and below 1.")
    return Wrapped(model, spec, dropout)


@contextlib.contextmanager
def interception(
    spec: Spec, dropout: float = 0.0, report: Callable[[str, _Axes], object] = lambda path, axes: None
) -> Iterator[None]:
    """Within it every model is applied with the low-rank paths that its ``params`` hold."""

    done: list[Any] = []

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, MODULES) or context.method_name != "__call__":
            return call(*args, **kwargs)
        before = len(done)
        y = call(*args, **kwargs)
        by_parent = module.scope in done[before:]  # a subclass that calls its parent is intercepted twice
        del done[before:]
        if by_parent or not module.has_variable("params", "kernel" + A):
            return y
        done.append(module.scope)
        path = "/".join((*module.path, "kernel"))
        x = args[0] if args else kwargs["inputs"]
        equation = _equation(module, args, kwargs)
        axes = _axes(module, x, equation)
        a: Array = module.get_variable("params", "kernel" + A)
        b: Array = module.get_variable("params", "kernel" + B)
        _require_axes(path, module.get_variable("params", "kernel").shape, a.shape, b.shape, axes)
        report(path, axes)
        if dropout and module.has_rng("dropout"):
            kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), jnp.zeros_like(x))
        return y + _low_rank(module, x, a, b, equation, spec.scale).astype(y.dtype)

    with nn.intercept_methods(intercept):
        yield


def kernels(model: nn.Module, *args: Any, select: str = "", **kwargs: Any) -> tuple[Kernel, ...]:
    """Every kernel that interception reaches in ``model.init(key, *args, **kwargs)`` and whose path ``select`` finds.

    Axes that the stored kernel has in front of those that the module sees are those of a stack (``nn.scan``, ``nn.vmap``).
    """
    found: dict[str, _Axes] = {}

    def note(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        module = context.module
        if isinstance(module, MODULES) and context.method_name == "__call__":
            x = args[0] if args else kwargs["inputs"]
            found["/".join((*module.path, "kernel"))] = _axes(module, x, _equation(module, args, kwargs))
        return y

    with nn.intercept_methods(note):
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    leaves = flat(variables["params"])
    made = []
    for path, axes in found.items():
        if path in leaves and re.search(select, path):
            stack = leaves[path].ndim - sum(map(len, axes))
            batch, inputs, outputs = (tuple(axis + stack for axis in group) for group in axes)
            made.append(Kernel(f"^{re.escape(path)}$", (*range(stack), *batch), inputs, outputs))
    return tuple(made)


def _kind(method: Any, args: tuple, kwargs: dict) -> Any:
    """What two calls have in common that trace alike: the method, and all arguments that are no arrays."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    return method, treedef, tuple(None if hasattr(leaf, "shape") else leaf for leaf in leaves)


def _equation(module: nn.Module, args: tuple, kwargs: dict) -> tuple[str, str, str] | None:
    """Letters of input, kernel and output of an Einsum; None for the others."""
    if not isinstance(module, nn.Einsum):
        return None
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    text = str(module.einsum_str if given is None else given).replace(" ", "")
    operands, out = text.split("->")
    lhs, rhs = operands.split(",")
    return lhs, rhs, out


def _axes(module: Any, x: Array, equation: tuple[str, str, str] | None) -> _Axes:
    """(batch, inputs, outputs) of the kernel as the module sees it."""
    if equation is not None:
        lhs, rhs, out = equation
        batch = tuple(i for i, c in enumerate(rhs) if c in lhs and c in out)
        inputs = tuple(i for i, c in enumerate(rhs) if c in lhs and c not in out)
        return batch, inputs, tuple(i for i, c in enumerate(rhs) if c not in lhs and c in out)
    if isinstance(module, nn.Dense):
        return (), (0,), (1,)
    stacked, summed, made = (len(_tuple(value)) for value in (module.batch_dims, module.axis, module.features))
    first, second = stacked + summed, stacked + summed + made
    return tuple(range(stacked)), tuple(range(stacked, first)), tuple(range(first, second))


def _low_rank(
    module: Any,
    x: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    equation: tuple[str, str, str] | None,
    scale: float,
) -> Float[Array, "..."]:
    """scale (x A) B, in the type that the module computes in."""
    x, a, b = nn.dtypes.promote_dtype(x, a, b, dtype=module.dtype)
    if equation is not None:
        lhs, rhs, out = equation
        batch, inputs, outputs = ("".join(rhs[i] for i in axes) for axes in _axes(module, x, equation))
        new = next(letter for letter in "rstuvwxyzRSTUVWXYZ" if letter not in lhs + rhs + out)
        kept = "".join(letter for letter in lhs if letter not in inputs)
        hidden = jnp.einsum(f"{lhs},{batch}{inputs}{new}->{kept}{new}", x, a, precision=module.precision)
        return jnp.einsum(f"{kept}{new},{batch}{new}{outputs}->{out}", scale * hidden, b, precision=module.precision)
    axis, stacked = ((-1,), ()) if isinstance(module, nn.Dense) else (_tuple(module.axis), _tuple(module.batch_dims))
    summed = tuple(i % x.ndim for i in axis)
    count = len(stacked)
    first = (
        (summed, tuple(range(count, count + len(summed)))),
        (tuple(i % x.ndim for i in stacked), tuple(range(count))),
    )
    hidden = dot_general(x, a, first, precision=module.precision)
    second = (((hidden.ndim - 1,), (count,)), (tuple(range(count)), tuple(range(count))))
    return dot_general(scale * hidden, b, second, precision=module.precision)


def _require_axes(path: str, kernel: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], axes: _Axes) -> None:
    batch, inputs, outputs = (tuple(kernel[i] for i in group) for group in axes)
    if a[:-1] != (*batch, *inputs) or b != (*batch, a[-1], *outputs):
        raise ConfigError(
            f"The adapters of {path} have shapes {a} and {b}, but its module sums over axes {axes[1]} of {kernel}; "
            "declare these as inputs, in the selection (relora.kernels(model, inputs) finds out)."
        )


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
