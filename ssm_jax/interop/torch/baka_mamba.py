"""Mamba within a chunk of Baka, by the parameter names of mamba_ssm."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from ssm_jax.interop.torch.chunk_slots import ChunkSlots
from ssm_jax.interop.torch.configs import BakaConfig
from ssm_jax.interop.torch.dense_mamba import read, scan
from ssm_jax.interop.torch.lm import torch_linear
from ssm_jax.interop.torch.norms import at_least_float32


class Mamba(nn.Module):
    """With s | z = u W_in, s = silu(conv(s)), r | B | C = s W_x, dt = softplus(r W_dt + b), A = -exp(A_log):

    h_t = exp(dt_t A) h_{t-1} + dt_t s_t B_t,  y_t = (h_t C_t + D s_t) * silu(z_t) W_out

    A slot that is absent leaves h and the inputs of the convolution as they are.
    """

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        D, N, rank = config.dim_model, config.d_state, config.step_rank
        E = config.expand * D
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E)
        self.x_proj = nn.Linear(E, rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, D, bias=False)

    def forward(self, u: Tensor, slots: ChunkSlots, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """y [B, T, D], and [B, E, K - 1 + N] after the chunk, the last inputs of the convolution and h; ``state``: before it."""
        present, before = slots.present[..., None], self.conv1d.kernel_size[0] - 1
        rank, N = self.dt_proj.in_features, self.A_log.shape[1]
        s, z = self.in_proj(u).chunk(2, dim=-1)
        s = torch.where(present, s, 0).mT
        window = s.new_zeros(*s.shape[:2], before) if state is None else state[..., :before].to(s.dtype)
        inputs = torch.cat([window, s], dim=-1)
        s = F.silu(self.conv1d(inputs)).mT
        r, B, C = self.x_proj(s).split([rank, N, N], dim=-1)
        dt = F.softplus(at_least_float32(F.linear(r, self.dt_proj.weight)) + at_least_float32(self.dt_proj.bias))
        dt = torch.where(present, dt, 0)  # with a step of 0, h stays as it is
        decay = torch.exp(dt[..., None] * -at_least_float32(self.A_log).exp())
        h = scan(decay, (dt * s)[..., None] * B[:, :, None], None if state is None else state[..., before:])
        y = read(h, C) + at_least_float32(self.D) * s
        columns = (slots.length + torch.arange(before, device=u.device)).clamp(max=inputs.shape[-1] - 1)
        last = inputs.gather(2, columns[:, None].expand(-1, s.shape[-1], -1))
        return self.out_proj(y.to(u.dtype) * F.silu(z)), torch.cat([at_least_float32(last), h[:, -1]], dim=-1)

    def init_weights(self) -> None:
        """As mamba_ssm: rates from 1 to N, and step sizes between 0.001 and 0.1, uniform in their logarithms."""
        rank = self.dt_proj.in_features
        initialization.copy_(self.A_log, torch.arange(1.0, self.A_log.shape[1] + 1).log().expand_as(self.A_log))
        initialization.ones_(self.D)
        initialization.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        ends = torch.tensor([1e-3, 0.1]).log()
        dt = torch.exp(ends[0] + torch.rand(len(self.D)) * (ends[1] - ends[0])).clamp(min=1e-4)
        initialization.copy_(self.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))
        torch_linear(self.out_proj)
