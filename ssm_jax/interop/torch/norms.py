"""RMSNorm."""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times ``weight``; computed in float32 at least, returned in the type of x."""
    wide = at_least_float32(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(wide.dtype)).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """``rms_norm`` with a weight of its own."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)
