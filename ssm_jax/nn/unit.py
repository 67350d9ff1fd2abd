"""Several layers of different kinds as the one unit that is stacked and scanned."""

from flax import linen as nn

from ssm_jax.typing import Activations, Positions, PyTree


class Unit(nn.Module):
    """The members one after another; the state is the tuple of theirs."""

    members: tuple[nn.Module, ...]

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> PyTree:
        """Each member's state before any token."""
        return tuple(member.init_state(batch_size, capacity) for member in self.members)

    @nn.compact
    def __call__(
        self, h_BLD: Activations, state: PyTree, positions: Positions | None, deterministic: bool = True
    ) -> tuple[Activations, PyTree]:
        states = []
        for member, old in zip(self.members, state or (None,) * len(self.members), strict=True):
            h_BLD, new = member(h_BLD, old, positions, deterministic)
            states.append(new)
        return h_BLD, tuple(states)
