"""What a function keeps between its forward and its backward pass."""

from collections.abc import Callable
from typing import Any

import jax


def kept(function: Callable[..., Any], *inputs: jax.Array) -> list[tuple[int, ...]]:
    """Shapes of the arrays that ``jax.vjp`` holds, each counted once; the largest first."""
    _, pullback = jax.vjp(function, *inputs)
    held = {id(leaf): leaf.shape for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)}
    return sorted(held.values(), key=lambda shape: (-len(shape), shape))
