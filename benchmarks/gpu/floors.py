"""The least time that an op can take on a machine, from what it must move and compute: what measured times are held against.

A pass (forward, or forward and backward) is a sequence of walks over its arrays; a walk cannot be faster than its bytes at the
copy bandwidth, its exponentials in the units that make them (16 a cycle and multiprocessor), or its matrix products at their
measured rate. Inputs are read and outputs written once, in bfloat16; what is kept between the passes is left out.
"""

from typing import NamedTuple

HALF, SINGLE = 2, 4
EXPONENTIALS_PER_CYCLE = 16


class Machine(NamedTuple):
    """Per second: bytes read and written by a copy, operations of a bfloat16 matrix product, exponentials."""

    bandwidth: float
    matmul: float
    exponentials: float


# Measured on one of them, and 132 multiprocessors at 1.98 GHz: for the places where no GPU is.
H200 = Machine(4.3e12, 790e12, 132 * EXPONENTIALS_PER_CYCLE * 1.98e9)


class Walk(NamedTuple):
    """What one walk over the arrays must do at least."""

    bytes: float
    exponentials: float = 0.0
    flops: float = 0.0

    def milliseconds(self, machine: Machine) -> dict[str, float]:
        """By what bounds it."""
        return {
            "memory": 1e3 * self.bytes / machine.bandwidth,
            "exponentials": 1e3 * self.exponentials / machine.exponentials,
            "matmul": 1e3 * self.flops / machine.matmul,
        }


def floor(walks: tuple[Walk, ...], machine: Machine) -> tuple[float, str]:
    """Milliseconds of a pass, and what bounds its longest walk."""
    times = [walk.milliseconds(machine) for walk in walks]
    longest = max(times, key=lambda time: max(time.values()))
    return sum(max(time.values()) for time in times), max(longest, key=lambda bound: longest[bound])


def selective_scan(batch: int, length: int, channels: int, entries: int) -> dict[str, tuple[Walk, ...]]:
    """Forward x, dt, B, C to y, one exponential per state entry; backward these and dy to dx, d(dt), dB, dC, with two."""
    rows, maps = batch * length * channels * HALF, batch * length * entries * HALF
    steps = batch * length * channels * entries
    forward = Walk(3 * rows + 2 * maps, steps)
    return {"forward": (forward,), "forward+backward": (forward, Walk(5 * rows + 4 * maps, 2 * steps))}


def scan_step(batch: int, channels: int, entries: int) -> dict[str, tuple[Walk, ...]]:
    """One token: the float32 states are read and written, A is read."""
    states, A = batch * channels * entries * SINGLE, channels * entries * SINGLE
    rows, maps = batch * channels * HALF, batch * entries * HALF
    return {"step": (Walk(2 * states + A + 3 * rows + 2 * maps, batch * channels * entries),)}


def retention(batch: int, length: int, heads: int, keys: int, values: int) -> dict[str, tuple[Walk, ...]]:
    """Forward q, k, v to y; backward these and dy to dq, dk, dv. Products of the chunkwise form in chunks of 64, of scores only the
    triangle, and states not computed again."""
    tokens, chunk, product = batch * length * heads, 64, keys * values
    forward = Walk(tokens * (2 * keys + 2 * values) * HALF, 0.0, tokens * (chunk * (keys + values) + 4 * product))
    scores = chunk * (3 * keys + 2 * values)
    backward = Walk(tokens * (4 * keys + 3 * values) * HALF, 0.0, tokens * (scores + 8 * product))
    return {"forward": (forward,), "forward+backward": (forward, backward)}
