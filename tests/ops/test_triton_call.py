"""What is refused before a Triton kernel is launched; none is, so that Triton need not be installed."""

import jax
import jax.numpy as jnp
import pytest

from ssm_jax.errors import ImplementationError
from ssm_jax.ops import triton_call


@pytest.mark.parametrize("grid", [(1, 65_536, 1), (1, 1, 65_536), (2**31, 1, 1)])
def test_a_grid_beyond_what_gpus_launch(grid: tuple[int, ...]) -> None:
    with pytest.raises(ImplementationError, match=r"smaller batches or implementation='xla'"):
        triton_call.call(None, [], [jax.ShapeDtypeStruct((1,), jnp.float32)], grid=grid, num_warps=1)
