"""Comparisons that name the leaf and the size of the difference."""

from typing import Any

import jax
import numpy as np


def assert_close(got: Any, expected: Any, atol: float) -> None:
    """Largest absolute difference at most ``atol``; shapes equal; nothing non-finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    assert np.isfinite(expected).all(), "the expected value is not finite"
    difference = float(np.max(np.abs(got - expected), initial=0.0))
    assert difference <= atol, f"differs by {difference:.3g}, allowed {atol:.3g}"


def assert_trees_close(
    got: Any, expected: Any, atol: float, *, relative: bool = False, smallest_scale: float = 1e-30
) -> None:
    """Same structure, dtypes and, leaf by leaf, ``assert_close``.

    ``relative`` scales ``atol`` by the leaf's largest entry or by ``smallest_scale``, whichever is larger.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, expected_leaf), got_leaf in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert got_leaf.dtype == expected_leaf.dtype, jax.tree_util.keystr(path)
        largest = float(np.max(np.abs(np.asarray(expected_leaf, np.float64)), initial=0.0))
        try:
            assert_close(got_leaf, expected_leaf, atol * max(largest, smallest_scale) if relative else atol)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from None


def assert_states_close(got: Any, expected: Any, atol: float) -> None:
    """``assert_trees_close``, where a leaf with entries above 1 is compared relative to the largest.

    A state is a sum over the past that nothing normalises: retention's entries reach 30 in the tests' models, where 2e-5
    would be ten units in float32's last place.
    """
    assert_trees_close(got, expected, atol, relative=True, smallest_scale=1.0)


def assert_gradients_close(got: Any, expected: Any, atol: float, ineffective: tuple[str, ...] = ()) -> None:
    """``assert_trees_close``, relative; ``ineffective`` leaves (path ends) are rounding errors and only have to be small.

    They are at most 1e-6 of the largest entry of all leaves.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))

    def settled(path: Any, leaf: Any) -> Any:
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(ineffective):
            return leaf
        assert_close(leaf, np.zeros_like(leaf), 1e-6 * largest)
        return np.zeros_like(leaf)

    got, expected = (jax.tree_util.tree_map_with_path(settled, tree) for tree in (got, expected))
    assert_trees_close(got, expected, atol, relative=True)
