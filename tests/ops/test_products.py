"""Products with weights against lax.dot_general, which they rearrange."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ssm_jax.ops.products import dot_general
from tests.conformance.compare import assert_close
from tests.conformance.residuals import kept

NUMBERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "one axis in, one out": ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
    "one axis in, two out": ((2, 3, 4), (4, 5, 6), (((2,), (0,)), ((), ()))),
    "two axes in, one out": ((2, 3, 4, 5), (4, 5, 6), (((2, 3), (0, 1)), ((), ()))),
    "rows only": ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
    "not the last axis": ((2, 4, 3), (4, 5), (((1,), (0,)), ((), ()))),
    "not the first of the weights": ((2, 3, 4), (5, 4), (((2,), (1,)), ((), ()))),
    "axes in another order": ((2, 3, 4, 5), (5, 4, 6), (((2, 3), (1, 0)), ((), ()))),
    "a batch of weights": ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_values_and_gradients_are_those_of_dot_general(case: str) -> None:
    left, right, numbers = NUMBERS[case]
    rng = np.random.default_rng(0)
    operands = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (left, right))
    weights = jnp.asarray(rng.normal(size=lax.dot_general(*operands, numbers).shape), jnp.float32)

    def both(product: Any) -> Any:
        return jax.value_and_grad(lambda operands: jnp.sum(product(*operands, numbers) * weights))(operands)

    jax.tree.map(lambda x, y: assert_close(x, y, 2e-5), both(dot_general), both(lax.dot_general))
    assert dot_general(*operands, numbers).shape == weights.shape


@pytest.mark.parametrize("case", ["two axes in, one out", "a batch of weights"])
def test_types_and_precision_are_passed_on(case: str) -> None:
    left, right, numbers = NUMBERS[case]
    operands = (jnp.ones(left, jnp.bfloat16), jnp.ones(right, jnp.bfloat16))

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return dot_general(left, right, numbers, lax.Precision.HIGHEST, jnp.float32)

    assert product(*operands).dtype == jnp.float32
    assert "HIGHEST" in str(jax.make_jaxpr(product)(*operands))


def test_kept_are_the_operands_as_they_came() -> None:
    left, right, numbers = NUMBERS["two axes in, one out"]
    x, w = jnp.ones(left), jnp.ones(right)
    assert kept(lambda x, w: dot_general(x, w, numbers), x, w) == [(2, 3, 4, 5), (4, 5, 6)]
