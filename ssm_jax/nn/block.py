"""The pre-norm residual block, and the scan over a stack of them."""

from typing import Any

import jax
from flax import linen as nn

from ssm_jax.nn.dense import enter, leave
from ssm_jax.typing import Activations, Positions, PyTree

REMAT_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a rematerialised layer keeps from its forward pass: nothing, or the results of its weight products."""


class Block(nn.Module):
    """h + dropout(mixer(norm(h))). The stream keeps its own dtype; norm and mixer compute in theirs."""

    norm: nn.Module
    mixer: nn.Module
    dropout: float = 0.0

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> PyTree:
        """Zeros: the mixer's state before any token."""
        return self.mixer.init_state(batch_size, capacity)

    @nn.compact
    def __call__(
        self, h_BLD: Activations, state: PyTree, positions: Positions | None, deterministic: bool = True
    ) -> tuple[Activations, PyTree]:
        out_BLD, state = self.mixer(self.norm(h_BLD), state, positions)
        out_BLD = nn.Dropout(self.dropout)(out_BLD, deterministic=deterministic)
        return h_BLD + out_BLD.astype(h_BLD.dtype), state


def scan_layers(
    layer: nn.Module,
    h_BLD: Activations,
    state: PyTree,
    positions: Positions | None,
    deterministic: bool,
    *,
    n_layers: int,
    remat: str = "none",
    unroll: int = 1,
) -> tuple[Activations, PyTree]:
    """Applies ``n_layers`` copies of ``layer`` one after another; parameters and states are stacked on axis 0.

    ``state`` is a stacked state or None. ``remat`` is "none" or a key of REMAT_POLICIES. ``unroll`` trades program size
    for speed and changes nothing else.
    """

    def body(module: nn.Module, stream: PyTree, layer_state: PyTree) -> tuple[PyTree, PyTree]:
        return module(stream, layer_state, positions, deterministic)

    if remat != "none":
        body = nn.remat(body, prevent_cse=False, policy=REMAT_POLICIES[remat])
    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=0,
        out_axes=0,
        length=n_layers,
        unroll=unroll,
    )
    stream, state = scan(layer, enter(layer, h_BLD), state)
    return leave(stream), state
