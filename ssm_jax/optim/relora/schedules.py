"""Learning rates with a tooth at every merge. A schedule is a function of the number of updates done before.

For a plain integer it computes in Python's double precision, as the originals do; for a traced one in JAX's float type.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ssm_jax.config import suggest
from ssm_jax.errors import ConfigError
from ssm_jax.optim.relora.constants import FLOOR, REWARMUP_STEPS, TOOTH_FLOOR

Step = jax.Array | int
Schedule = Callable[[Step], Any]
Name = Literal["jagged_cosine", "cyclic_cosine", "linear"]


def jagged_cosine(
    peak: float,
    total: Step,
    cycle: int,
    warmup: int = 0,
    rewarmup: int = REWARMUP_STEPS[1],
    floor: float = FLOOR,
    offset: int = 0,
    variant: Literal["v4", "v1"] = "v4",
    compat: Literal["reference"] | None = None,
) -> Schedule:
    """A cosine over the whole run, that starts from 0 again after every merge.

        f(q) = m + (1 - m) (1 + cos(pi q)) / 2,   u = t + offset,   k = floor(u / C),   p = u mod C
        t < W:            t / W
        p < R, not k = 0: p / R * f((k C + R - W) / (N - W))
        otherwise:        f((u - W) / (N - W))

    times ``peak``; N total, C cycle, W warmup, R rewarmup, m floor. ``offset``: the first merge comes that many updates earlier.
    Past the end of the cosine the rate stays at its floor.

    Args:
        total: may be traced; then nothing about it is checked.
        variant: "v4" of the paper's last version; "v1" of its first, whose tooth rises to f((k C) / (N - W)), above the cosine.
        compat: "reference" skips the first restart under an offset, and lets the rate rise again past the end, as the original.

    Raises:
        ConfigError: a cycle that does not divide the run, an offset and warm-up longer than a cycle, a floor outside (0, 1].
    """
    _check(total, cycle, warmup, rewarmup, floor, offset, strict=variant == "v1")

    def schedule(t: Step) -> Any:
        where, cos, least = _functions(t, total)

        def f(q: Any) -> Any:
            return floor + (1.0 - floor) * (0.5 * (1.0 + cos(math.pi * (q if compat else least(q, 1.0)))))

        u = t + offset
        k, p, span = u // cycle, u % cycle, _at_least_1(total - warmup)
        aim = f(_real(k * cycle) / span) if variant == "v1" else f(_real(k * cycle + rewarmup - warmup) / span)
        restarted = (t >= cycle if compat else k >= 1) if variant == "v4" else (k >= 0)
        tooth = where((p < rewarmup) & restarted, _real(p) / max(1, rewarmup) * aim, f(_real(u - warmup) / span))
        return peak * where(t < warmup, _real(t) / max(1, warmup), tooth)

    return schedule


def jagged(
    inner: Schedule, cycle: int, rewarmup: int = REWARMUP_STEPS[1], anneal: int = 1, floor: float = TOOTH_FLOOR
) -> Schedule:
    """``inner`` times a tooth: 1 before step C - anneal; from then on, with p = t mod C,

        g = p / R for p < R,  (C - p) / anneal for p > C - anneal,  1 between;   tooth = floor + (1 - floor) g

    Raises:
        ConfigError: a re-warm-up and an annealing that do not fit into a cycle.
    """
    if cycle < 1 or rewarmup < 0 or anneal < 0 or rewarmup + anneal > cycle:
        raise ConfigError(
            f"A cycle of {cycle} updates has no room for a re-warm-up of {rewarmup} and an annealing of {anneal}; lengthen it."
        )

    def schedule(t: Step) -> Any:
        where, _, _ = _functions(t)
        p = _real(t % cycle)
        falling = where(p > cycle - anneal, (cycle - p) / max(1, anneal), 1.0)
        tooth = where(p < rewarmup, p / max(1, rewarmup), falling)
        return inner(t) * where(t < cycle - anneal, 1.0, floor + (1.0 - floor) * tooth)

    return schedule


def restarts(inner: Schedule, cycle: int | None, rewarmup: int = REWARMUP_STEPS[1], *, first: bool = False) -> Schedule:
    """``inner``, with the tooth of ``jagged_cosine`` after every merge: with k = floor(t / C) and p = t mod C

        p < R, not k = 0: p / R * inner(k C + R),   otherwise: inner(t)

    ``cycle`` None: there are no merges. ``first``: the first cycle begins with a tooth too.
    """

    def schedule(t: Step) -> Any:
        where, _, _ = _functions(t)
        p = t if cycle is None else t % cycle
        restarted = (p < rewarmup) & (first | (t > p))
        return where(restarted, _real(p) / max(1, rewarmup) * inner(t - p + rewarmup), inner(t))

    return schedule


def cyclic_cosine(
    peak: float, total: Step, cycle: int, warmup: int = 0, floor: float = FLOOR, offset: int = 0
) -> Schedule:
    """A whole cosine in every cycle: with p = t mod C, p / W for p < W, else f((p - W) / (C - W)); the factor is 1e-7 at the first
    two steps of each later cycle.

    Raises:
        ConfigError: as ``jagged_cosine``; any offset.
    """
    _refuse_offset("cyclic_cosine", offset)
    _check(total, cycle, warmup, 0, floor, 0)

    def schedule(t: Step) -> Any:
        where, cos, _ = _functions(t)
        p = _real(t % cycle)
        progress = (p - warmup) / _at_least_1(cycle - warmup)
        decayed = floor + (1.0 - floor) * (0.5 * (1.0 + cos(math.pi * progress)))
        factor = where(p < warmup, p / max(1, warmup), decayed)
        return peak * where((p < 2) & (t >= cycle), 1e-7, factor)

    return schedule


def linear(peak: float, total: Step, warmup: int = 0, offset: int = 0) -> Schedule:
    """t / W for t < W, else (N - t) / (N - W) down to 0; no tooth.

    Raises:
        ConfigError: any offset.
    """
    _refuse_offset("linear", offset)

    def schedule(t: Step) -> Any:
        where, _, _ = _functions(t, total)
        left = _real(total - t) / _at_least_1(total - warmup)
        return peak * where(t < warmup, _real(t) / max(1, warmup), where(left > 0, left, 0.0))

    return schedule


_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "jagged_cosine": jagged_cosine,
    "cyclic_cosine": cyclic_cosine,
    "linear": linear,
}


def by_name(name: str, **settings: Any) -> Schedule:
    """The schedule of that name.

    Raises:
        ConfigError: an unknown name, and what the schedule itself refuses.
    """
    if name not in _SCHEDULES:
        raise ConfigError(f"Schedule {name!r} is unknown; {suggest(name, list(_SCHEDULES))}")
    return _SCHEDULES[name](**settings)


def _functions(*values: Step) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(where, cos, minimum) for plain numbers or for arrays."""
    if all(isinstance(value, int) for value in values):
        return lambda condition, x, y: x if condition else y, math.cos, min
    return jnp.where, jnp.cos, jnp.minimum


def _real(value: Step) -> Any:
    """Whole numbers of 32 bits would be divided in float32 whatever JAX's float type is."""
    return value if isinstance(value, int) else value.astype(float)


def _at_least_1(value: Step) -> Step:
    return max(1, value) if isinstance(value, int) else jnp.maximum(1, value)


def _check(
    total: Step, cycle: int, warmup: int, rewarmup: int, floor: float, offset: int, strict: bool = False
) -> None:
    if not isinstance(cycle, int) or cycle < 1:
        raise ConfigError(f"The cycle is {cycle}; it must be the number of updates between merges, at least 1.")
    if not isinstance(rewarmup, int) or not 0 <= rewarmup <= cycle:
        raise ConfigError(
            f"The re-warm-up, rewarmup, is {rewarmup} updates; it must lie between 0 and the cycle, {cycle}."
        )
    if warmup < 0 or offset < 0 or offset + warmup > cycle:
        raise ConfigError(
            f"Offset {offset} and warm-up {warmup} must not be negative, nor together exceed the cycle, {cycle}."
        )
    if not 0 < floor <= 1:
        raise ConfigError(f"The floor is {floor} of the peak; it must be above 0 and at most 1.")
    if not isinstance(total, int):
        return
    if total < 1 or total % cycle:
        nearest = max(cycle, round(total / cycle) * cycle)
        raise ConfigError(
            f"The cycle, {cycle}, does not divide the {total} updates with adapters; set them to {nearest} or change the cycle."
        )
    if offset + warmup > total or (strict and offset + warmup == total):
        raise ConfigError(f"The warm-up, {warmup}, is longer than the run, {total}; shorten it.")


def _refuse_offset(name: str, offset: int) -> None:
    if offset:
        raise ConfigError(
            f"The offset is {offset}, and schedule {name!r} knows none; leave it out, or use 'jagged_cosine'."
        )
