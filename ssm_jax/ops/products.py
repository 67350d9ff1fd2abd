"""Products of activations with weights, in the form that compiles well everywhere."""

import math
from typing import Any

from jax import Array, lax


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    **how: Any,
) -> Array:
    """``lax.dot_general`` with batch and length as one axis: [B, L, D] times [D, ...] is done as [B * L, D] times [D, ...].

    It changes the gradient of the weights, a sum over batch and length: over two axes XLA:CPU copies its operands first, and takes
    1.5 times as long for a gated state-space layer (no difference was found for Mamba's). Where the last axes of ``lhs`` are not
    summed with the first of ``rhs``, it is ``lax.dot_general``.
    """
    (lhs_summed, rhs_summed), batched = dimension_numbers
    count = len(lhs_summed)
    kept = lhs.ndim - count
    plain = (
        kept > 1
        and batched == ((), ())
        and tuple(lhs_summed) == tuple(range(kept, lhs.ndim))
        and tuple(rhs_summed) == tuple(range(count))
    )
    if plain:
        rows = lhs.reshape(math.prod(lhs.shape[:kept]), *lhs.shape[kept:])
        numbers = ((tuple(range(1, 1 + count)), tuple(rhs_summed)), ((), ()))
        product = lax.dot_general(rows, rhs, numbers, precision, preferred_element_type, **how)
        return product.reshape(*lhs.shape[:kept], *product.shape[1:])
    return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **how)
