"""The pre-norm transformer block."""

from flax import linen as nn

from ssm_jax.typing import Activations, Positions, PyTree


class TransformerBlock(nn.Module):
    """h += dropout(mixer(norm(h))), then h += dropout(mlp(mlp_norm(h))). The stream keeps its own dtype."""

    norm: nn.Module
    mixer: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    dropout: float = 0.0

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> PyTree:
        """Zeros: the mixer's state before any token."""
        return self.mixer.init_state(batch_size, capacity)

    @nn.compact
    def __call__(
        self, h_BLD: Activations, state: PyTree, positions: Positions | None, deterministic: bool = True
    ) -> tuple[Activations, PyTree]:
        def add(h_BLD: Activations, branch_BLD: Activations) -> Activations:
            branch_BLD = nn.Dropout(self.dropout)(branch_BLD, deterministic=deterministic)
            return h_BLD + branch_BLD.astype(h_BLD.dtype)

        mixed_BLD, state = self.mixer(self.norm(h_BLD), state, positions)
        h_BLD = add(h_BLD, mixed_BLD)
        return add(h_BLD, self.mlp(self.mlp_norm(h_BLD))), state
