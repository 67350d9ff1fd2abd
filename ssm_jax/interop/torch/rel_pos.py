"""RetNet's rotation and decay, which all layers share."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization


class RelativePositions(nn.Module):
    """Angles theta_i of the rotation and logarithms of the decay rates gamma_h.

        theta = 10000^(-i / (d / 2 - 1)) for i = 0 .. d / 2 - 1, each for two neighbouring features
        gamma_h = 1 - 2^(-5 - h); in syncdoth's language models 1 - exp(points from log 1/32 to log 1/512)

    Both follow from the config, and are computed from it, in float64: in half precision, which a model may be cast to, an angle
    times a position of some thousands means nothing. The buffers are here because the originals store them.

    Args:
        width: d, keys of a head; even.
    """

    angle: Tensor
    decay: Tensor

    def __init__(self, heads: int, width: int, lm_decay: bool = False) -> None:
        super().__init__()
        self.heads, self.width, self.lm_decay = heads, width, lm_decay
        self.register_buffer("angle", torch.empty(width))
        self.register_buffer("decay", torch.empty(heads))
        self.fill()

    def fill(self) -> None:
        """Writes the buffers, but where a checkpoint has."""
        initialization.copy_(self.angle, self.angles().repeat_interleave(2).float())
        initialization.copy_(self.decay, self.log_decay().float())

    def angles(self) -> Tensor:
        """[d / 2], float64."""
        return 10000 ** -torch.linspace(0, 1, self.width // 2, dtype=torch.float64)

    def log_decay(self) -> Tensor:
        """[H], float64: log(gamma)."""
        if self.lm_decay:
            ends = math.log(1 / 32), math.log(1 / 512)
            return torch.log1p(-torch.exp(torch.linspace(*ends, self.heads, dtype=torch.float64)))
        return torch.log1p(-(2.0 ** -(5 + torch.arange(self.heads, dtype=torch.float64))))

    def rotation(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, L, d] in float64 at the positions [B, L]."""
        phases = (number[:, None, :, None] * self.angles().to(number.device)).repeat_interleave(2, dim=-1)
        return phases.cos(), phases.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of neighbouring features turned by its angle: (a, b) -> (a cos - b sin, b cos + a sin)."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin
