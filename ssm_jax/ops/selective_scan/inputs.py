"""What every implementation of the selective scan is given, and the position-wise mathematics around the recurrence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Inputs(NamedTuple):
    """The arguments of one call after normalisation. Optional arrays stay None, so that nothing is computed for them.

    ``reset`` is False at absent tokens. ``lengths`` is None when every token is present.
    """

    x_BLE: Array
    dt_BLE: Array
    A_NE: Array
    B_BLN: Array
    C_BLN: Array
    D_E: Array | None
    z_BLE: Array | None
    dt_bias_E: Array | None
    state_BNE: Array
    reset_BL: Array | None
    lengths_B: Array | None


def step_size(dt: Array, dt_bias: Array | None, present: Array | None, *, softplus: bool) -> Array:
    """softplus(dt + dt_bias), and exactly 0 at absent tokens: there the state decays by exp(0) = 1 and receives 0."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = jax.nn.softplus(dt)
    return dt if present is None else jnp.where(present, dt, 0.0)


def skip_and_gate(y: Array, x: Array, D: Array | None, z: Array | None) -> Array:
    """(y + D x) * silu(z)."""
    if D is not None:
        y = y + D * x
    return y if z is None else y * jax.nn.silu(z)
