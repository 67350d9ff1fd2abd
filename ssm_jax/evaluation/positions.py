"""Losses by the position in a window, beside those of the same targets in short windows."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer

from ssm_jax.evaluation.intervals import estimate, finite_or_none, relative

LINEAR_BINS = 64


def by_position(
    longest: Float64[np.ndarray, "n C"],
    shortest: Float64[np.ndarray, "n C"],
    windows: int,
    reference: int,
    units: Integer[np.ndarray, "n"],
) -> dict[str, Any]:
    """Losses by the position of the input token in a window of the longest length C, and beside each the same targets' loss at
    the shortest length, ``reference``, which takes the text's own ups and downs out of the comparison.

    linear: at most 64 bins of equal width (the largest power of two that divides C). powers: [0, 1), [1, 2), [2, 4), ...
    Each bin [from, below) has loss, se, reference_loss, relative_perplexity (of loss to reference_loss) and relative_interval.
    """
    length = longest.shape[1]
    width = length // math.gcd(length, LINEAR_BINS)
    doubling = [0, *(2**i for i in range(length.bit_length()) if 2**i < length), length]

    def rows(edges: Sequence[int]) -> list[dict[str, Any]]:
        long, short = (np.add.reduceat(sums, edges[:-1], axis=1) for sums in (longest, shortest))
        return [
            _bin(low, below, long[:, i], short[:, i], windows, units)
            for i, (low, below) in enumerate(itertools.pairwise(edges))
        ]

    linear = rows(range(0, length + 1, width))
    return {"length": length, "reference": reference, "linear": linear, "powers": rows(doubling)}


def _bin(
    low: int, below: int, long: np.ndarray, short: np.ndarray, windows: int, units: np.ndarray
) -> dict[str, float | int | list[float] | None]:
    counts = np.full(len(long), float(windows * (below - low)))
    loss, reference = estimate(long, counts, units), estimate(short, counts, units)
    with np.errstate(invalid="ignore"):
        difference = estimate(long - short, counts, units)
    return {
        "from": low,
        "below": below,
        "loss": finite_or_none(loss.mean),
        "se": finite_or_none(loss.error),
        "reference_loss": finite_or_none(reference.mean),
        **relative(difference),
    }
