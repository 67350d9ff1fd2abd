"""What a function holds in memory, read from its jaxpr: the arrays of every equation, inner scans and branches included."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr):
                yield from _equations(parameter.jaxpr)
            elif isinstance(parameter, Jaxpr):
                yield from _equations(parameter)


def array_sizes(function: Callable[..., Any], *args: Any) -> list[tuple[int, str, str]]:
    """(elements, shape and dtype, primitive) of every array that ``function(*args)`` computes, largest first.

    Pass ``jax.grad`` of a function to see its forward and backward passes. ``args`` may be ``jax.ShapeDtypeStruct``.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    arrays = {
        (math.prod(variable.aval.shape), variable.aval.str_short(), equation.primitive.name)
        for equation in _equations(jaxpr.jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "shape")
    }
    return sorted(arrays, reverse=True)
