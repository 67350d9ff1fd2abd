"""DenseMamba (He et al. 2024, arXiv:2403.00818): Mamba whose layers also read out the hidden states of the layers below.

A layer, with u = norm(x), A = -exp(A_log), | between parts of one product, and its own hidden state h_t [E, N]:

    s | z = u W_in,  s = silu(conv(s)),  r | B | C = s W_x,  dt = softplus(r W_dt + b)
    h_t = exp(dt_t A) h_{t-1} + dt_t s_t B_t
    y_t = h_t C_t + D s_t + G(u_t) * sum over the m layers below of h_t^i P_i C_t
    x <- x + (y * silu(z)) W_out

G(u) = silu(silu(u W_1) W_2) has a number per channel of the sum, or one per entry of C, or there is none; P_i is a matrix or the
identity. No layer hands on more than its own h, so that the cache is Mamba's.

Nobody has published weights. Parameter names are those of Mamba in ``transformers``, and DenseSSM's for the gate.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from ssm_jax.interop.torch.configs import DenseMambaConfig
from ssm_jax.interop.torch.dense_retnet import Select
from ssm_jax.interop.torch.lm import Decoded, RecurrentLM, States, torch_linear
from ssm_jax.interop.torch.norms import RMSNorm, at_least_float32
from ssm_jax.interop.torch.steps import Steps


class DenseMambaMixer(nn.Module):
    """A layer without its norm and its residual sum."""

    def __init__(self, config: DenseMambaConfig) -> None:
        super().__init__()
        D, E, N, rank = config.hidden_size, config.inner_size, config.state_size, config.step_rank
        m = config.dense_block_layers
        self.config, self.gate = config, config.h_select if m else "none"
        self.in_proj = nn.Linear(D, 2 * E, bias=config.use_bias)
        self.conv1d = nn.Conv1d(E, E, config.conv_kernel, groups=E, bias=config.use_conv_bias)
        self.x_proj = nn.Linear(E, rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, D, bias=config.use_bias)
        if self.gate != "none":
            self.h_select = Select(D, D // config.intermediate_h_select_scale, E if self.gate == "channel" else N)
        linear = config.source_projection == "linear"
        self.h_source = nn.ModuleList(nn.Linear(N, N, bias=False) if linear else nn.Identity() for _ in range(m))

    def forward(
        self, u: Tensor, below: list[Tensor], present: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, L, D], h of every token [B, L, E, N], and the state after the last.

        Args:
            below: h of the layers below, the nearest first.
            present: [B, L], the tokens of each row before its padding; None where there is none.
            state: [B, E, K - 1 + N] of float32 at least: the last K - 1 inputs of the convolution, and h.
        """
        s, z = self.in_proj(u).chunk(2, dim=-1)
        s, window = self._convolve(s, present, state)
        rank, N = self.dt_proj.in_features, self.A_log.shape[1]
        r, B, C = self.x_proj(s).split([rank, N, N], dim=-1)
        dt = F.softplus(at_least_float32(F.linear(r, self.dt_proj.weight)) + at_least_float32(self.dt_proj.bias))
        if present is not None:
            dt = dt * present[..., None]  # with a step of 0, h stays as it is
        decay = torch.exp(dt[..., None] * -at_least_float32(self.A_log).exp())
        h = scan(decay, (dt * s)[..., None] * B[:, :, None], None if state is None else state[..., -N:])
        y = read(h, C) + at_least_float32(self.D) * s + self._read_below(u, below, C)
        return self.out_proj(y.to(u.dtype) * F.silu(z)), h, torch.cat([window, h[:, -1]], dim=-1)

    def _convolve(self, s: Tensor, present: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """silu(conv(s)) [B, L, E], and the K - 1 inputs up to the last token [B, E, K - 1]."""
        before, length = self.conv1d.kernel_size[0] - 1, s.shape[1]
        s = s.mT
        window = s.new_zeros(*s.shape[:2], before) if state is None else state[..., :before]
        inputs = torch.cat([window.to(s.dtype), s], dim=-1)
        if present is None:
            last = inputs[..., length:]
        else:
            columns = present.sum(1, keepdim=True) + torch.arange(before, device=s.device)
            last = inputs.gather(2, columns[:, None].expand(-1, s.shape[1], -1))
        return F.silu(self.conv1d(inputs)).mT, at_least_float32(last)

    def _read_below(self, u: Tensor, below: list[Tensor], C: Tensor) -> Tensor | float:
        """What the layers below add to y [B, L, E]; 0 for the first layer."""
        if not below:
            return 0.0
        gate = F.silu(self.h_select(u)) if self.gate != "none" else 1.0
        if self.gate == "state":
            C, gate = C * gate, 1.0
        # h (P C): for one vector per token, not for every channel of h.
        return gate * sum(read(h, source(C)) for h, source in zip(below, self.h_source, strict=False))

    def init_weights(self) -> None:
        """As Mamba: rates from 1 to N, and step sizes between time_step_min and time_step_max, uniform in their logarithms."""
        config, rank = self.config, self.dt_proj.in_features
        initialization.copy_(self.A_log, torch.arange(1.0, self.A_log.shape[1] + 1).log().expand_as(self.A_log))
        initialization.ones_(self.D)
        bound = config.time_step_scale * rank**-0.5
        lowest = bound if config.time_step_init_scheme == "constant" else -bound
        initialization.uniform_(self.dt_proj.weight, lowest, bound)
        ends = torch.tensor([config.time_step_min, config.time_step_max]).log()
        dt = torch.exp(ends[0] + torch.rand(len(self.D)) * (ends[1] - ends[0])).clamp(min=config.time_step_floor)
        initialization.copy_(self.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))
        torch_linear(self.out_proj, config.num_hidden_layers**-0.5)


def scan(decay: Tensor, added: Tensor, h: Tensor | None) -> Tensor:
    """h_t = decay_t * h_{t-1} + added_t for every t [B, L, E, N], from h [B, E, N] or from 0."""
    steps = []
    for a, b in zip(decay.unbind(1), added.unbind(1), strict=True):
        h = b if h is None else a * h + b
        steps.append(h)
    return torch.stack(steps, dim=1)


def read(h: Tensor, C: Tensor) -> Tensor:
    """h_t C_t [B, L, E] for h [B, L, E, N] and C [B, L, N]."""
    return (h @ C.to(h.dtype)[..., None]).squeeze(-1)


class DenseMambaLayer(nn.Module):
    """Norm, mixer, residual sum."""

    def __init__(self, config: DenseMambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = DenseMambaMixer(config)

    def forward(
        self, x: Tensor, below: list[Tensor], present: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h, state = self.mixer(self.norm(x).to(self.norm.weight.dtype), below, present, state)
        return x + y, h, state


class DenseMambaModel(nn.Module):
    """Embedding, layers, and the norm after them."""

    def __init__(self, config: DenseMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DenseMambaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, tokens: Tensor, present: Tensor | None, states: States, keep: bool) -> Decoded:
        """In pieces, through all layers each: what is kept of every token, h, is N times as large as what goes between layers."""
        size = self.config.recurrent_chunk_size
        pieces = []
        for start in range(0, tokens.shape[1], size):
            columns = slice(start, start + size)
            there = None if present is None else present[:, columns]
            pieces.append(self._piece(tokens[:, columns], there, states, keep))
            states = pieces[-1].states
        features = torch.cat([piece.features for piece in pieces], dim=1)
        residuals = [torch.cat(parts, dim=1) for parts in zip(*(piece.residuals for piece in pieces), strict=True)]
        return Decoded(features, residuals, pieces[-1].states)

    def _piece(self, tokens: Tensor, present: Tensor | None, states: States, keep: bool) -> Decoded:
        x = self.embeddings(tokens)
        if self.config.residual_in_fp32:
            x = at_least_float32(x)
        residuals: list[Tensor] = []
        after: list[Tensor] = []
        below: list[Tensor] = []
        for layer, state in zip(self.layers, states, strict=True):
            residuals += [x] if keep else []
            x, h, state = layer(x, below, present, state)
            after.append(state)
            below = [h, *below][: self.config.dense_block_layers]
        return Decoded(self.norm_f(x).to(self.norm_f.weight.dtype), residuals, after)


class DenseMambaForCausalLM(RecurrentLM):
    """The language model; see the file."""

    config_class = DenseMambaConfig
    base_model_prefix = "backbone"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: DenseMambaConfig) -> None:
        super().__init__(config)
        self.backbone = DenseMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embeddings = value

    def decode(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        if steps.present is None:
            return self.backbone(tokens, None, states, keep)
        # The convolution takes the tokens before: so those of a row go to its front, and what was computed goes back.
        order = steps.present.long().argsort(dim=1, descending=True, stable=True)
        decoded = self.backbone(tokens.gather(1, order), steps.present.gather(1, order), states, keep)
        rows, back = torch.arange(len(order), device=order.device)[:, None], order.argsort(dim=1)
        residuals = [x[rows, back] for x in decoded.residuals]
        return Decoded(decoded.features[rows, back], residuals, decoded.states)

    def readout(self, features: Tensor) -> Tensor:
        return self.lm_head(features)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own for matrices; the rest as Mamba."""
        if isinstance(module, nn.Linear):
            torch_linear(module)
        elif isinstance(module, DenseMambaMixer):
            module.init_weights()
        else:
            super()._init_weights(module)
