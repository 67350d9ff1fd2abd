"""The block of a transformer: a mixer and a perceptron, each with its norm and its residual connection."""

from flax import linen as nn

from ssm_jax.typing import Activations, Positions, PyTree


class TransformerBlock(nn.Module):
    """h <- a h + dropout(mixer(norm(h))), then h <- a h + dropout(mlp(mlp_norm(h))). The stream keeps its own dtype.

    Attributes:
        post_norm: h <- norm(a h + dropout(mixer(h))) instead, and so for the perceptron.
        parallel: the perceptron reads what the mixer reads, h <- h + dropout(mixer(norm(h))) + dropout(mlp(mlp_norm(h))).
        residual_scale: a; DeepNorm's is (2 layers)^(1/4) (Wang et al. 2022, arXiv:2203.00555).
    """

    norm: nn.Module
    mixer: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    dropout: float = 0.0
    post_norm: bool = False
    parallel: bool = False
    residual_scale: float = 1.0

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> PyTree:
        """Zeros: the mixer's state before any token."""
        return self.mixer.init_state(batch_size, capacity)

    @nn.compact
    def __call__(
        self, h_BLD: Activations, state: PyTree, positions: Positions | None, deterministic: bool = True
    ) -> tuple[Activations, PyTree]:
        def enter(norm: nn.Module, h_BLD: Activations) -> Activations:
            return h_BLD if self.post_norm else norm(h_BLD)

        def leave(norm: nn.Module, h_BLD: Activations, branch_BLD: Activations) -> Activations:
            branch_BLD = nn.Dropout(self.dropout)(branch_BLD, deterministic=deterministic)
            scaled_BLD = h_BLD if self.residual_scale == 1 else self.residual_scale * h_BLD
            added_BLD = scaled_BLD + branch_BLD.astype(h_BLD.dtype)
            return norm(added_BLD).astype(h_BLD.dtype) if self.post_norm else added_BLD

        mixed_BLD, state = self.mixer(enter(self.norm, h_BLD), state, positions)
        after_BLD = leave(self.norm, h_BLD, mixed_BLD)
        read_BLD = h_BLD if self.parallel else after_BLD
        return leave(self.mlp_norm, after_BLD, self.mlp(enter(self.mlp_norm, read_BLD))), state
