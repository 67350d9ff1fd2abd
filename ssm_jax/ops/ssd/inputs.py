"""What every implementation of SSD is given, and the step size, which is computed per token and head before the recurrence."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Inputs(NamedTuple):
    """The arguments of one call after normalisation. Optional arrays stay None, so that nothing is computed for them.

    ``state_BHNP`` has the type that everything is computed in. ``reset_BL`` is False at absent tokens. ``lengths_B`` is None
    when every token is present.
    """

    x_BLHP: Array
    dt_BLH: Array
    A_H: Array
    B_BLGN: Array
    C_BLGN: Array
    D_H: Array | None
    dt_bias_H: Array | None
    state_BHNP: Array
    reset_BL: Array | None
    lengths_B: Array | None


def step_size(inputs: Inputs, *, softplus: bool, limit: tuple[float, float]) -> Array:
    """clip(softplus(dt + dt_bias), *limit), and exactly 0 at absent tokens, whatever the limit: there nothing happens."""
    dt = inputs.dt_BLH.astype(inputs.state_BHNP.dtype)
    if inputs.dt_bias_H is not None:
        dt = dt + inputs.dt_bias_H
    if softplus:
        dt = jax.nn.softplus(dt)
    if not softplus or limit != (0.0, math.inf):
        dt = jnp.clip(dt, *limit)
    if inputs.lengths_B is not None:
        present = jnp.arange(dt.shape[1]) < inputs.lengths_B[:, None]
        dt = jnp.where(present[..., None], dt, 0)
    return dt
