"""Means of losses with their standard errors, over units that may be of unequal size."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy ships no types


class Estimate(NamedTuple):
    """A mean, its standard error, and half the width of its 95 % interval; the latter two are NaN where there is one unit."""

    mean: float
    error: float
    half: float


def estimate(sums: Float[np.ndarray, "n"], counts: Float[np.ndarray, "n"], units: Integer[np.ndarray, "n"]) -> Estimate:
    """The mean of all targets, and its error as the k independent ``units`` show it.

        m = sum_u s_u / sum_u c_u        error^2 = k / (k - 1) * sum_u (s_u - m c_u)^2 / (sum_u c_u)^2
        half = t(0.975, k - 1) * error

    With units of one size this is the standard error of the mean of their means. For a paired difference give the sums of the
    differences.

    Args:
        sums: of the losses of each part. counts: its targets, above 0. units: the number of the unit it belongs to, from 0.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so and is shown as such
        s, c = np.bincount(units, sums), np.bincount(units, counts)
        k, total = len(s), float(c.sum())
        mean = float(s.sum()) / total
        if k < 2:
            return Estimate(mean, float("nan"), float("nan"))
        error = float(np.sqrt(k / (k - 1) * np.square(s - mean * c).sum())) / total
    return Estimate(mean, error, float(stdtrit(k - 1, 0.975)) * error)


def relative(difference: Estimate) -> dict[str, Any]:
    """``relative_perplexity`` and ``relative_interval`` of a difference of losses."""
    low, high = exp_or_none(difference.mean - difference.half), exp_or_none(difference.mean + difference.half)
    interval = None if low is None or high is None else [low, high]
    return {"relative_perplexity": exp_or_none(difference.mean), "relative_interval": interval}


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def exp_or_none(value: float) -> float | None:
    """exp, kept within what a float holds; None of what is not finite."""
    return math.exp(min(value, 700.0)) if math.isfinite(value) else None
