"""Plain PyTorch in place of CUDA kernels, with the arguments and layouts of the originals: what tests the PyTorch side on a CPU."""

from typing import Any

import torch
from torch import Tensor


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: None,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:
    """mamba_ssm's, token by token: u, delta [B, D, L], A [D, N], B, C [B, N, L]."""
    assert z is None
    assert delta_softplus
    step = torch.nn.functional.softplus(delta.float() + delta_bias[:, None])
    h, outputs = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        fed = (step[:, :, t] * u[:, :, t].float())[..., None] * B[:, None, :, t].float()
        h = torch.exp(step[:, :, t, None] * A) * h + fed
        outputs.append(torch.einsum("ben,bn->be", h, C[:, :, t].float()))
    return (torch.stack(outputs, 2) + D[:, None] * u.float()).to(u.dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: None,
    dt_bias: Tensor,
    softplus: bool,
) -> Tensor:
    """mamba_ssm's, one token: state [B, D, N], written in place; x, dt [B, D]."""
    assert z is None
    assert softplus
    step = torch.nn.functional.softplus(dt.float() + dt_bias)
    fed = (step * x.float())[..., None] * B[:, None].float()
    state.copy_(torch.exp(step[..., None] * A) * state + fed)
    return (torch.einsum("ben,bn->be", state, C.float()) + D * x.float()).to(x.dtype)


def retention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, None]:
    """flash-linear-attention's chunk_retention and fused_chunk_retention: [B, L, H, N] thrice, one decay per head."""
    length, heads = q.shape[1:3]
    decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = torch.where(distance >= 0, torch.exp(distance.clamp(min=0) * decay[:, None, None]), 0.0)
    scores = torch.einsum("blhn,bmhn->bhlm", q.float(), k.float()) * scale * mask
    return torch.einsum("bhlm,bmhp->blhp", scores, v.float()).to(v.dtype), None


chunk_retention = fused_chunk_retention = retention
FUNCTIONS: dict[str, Any] = {
    "selective_scan_fn": selective_scan_fn,
    "selective_state_update": selective_state_update,
    "chunk_retention": chunk_retention,
    "fused_chunk_retention": fused_chunk_retention,
}
