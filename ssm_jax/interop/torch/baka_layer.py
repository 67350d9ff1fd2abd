"""A layer of Baka; see ``baka`` for what it computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_jax.interop.torch.baka_mamba import Mamba
from ssm_jax.interop.torch.chunk_slots import ChunkSlots, pick
from ssm_jax.interop.torch.configs import BakaConfig
from ssm_jax.interop.torch.norms import RMSNorm, at_least_float32
from ssm_jax.interop.torch.rel_pos import rotate

GATES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu, "sigmoid": torch.sigmoid}


def make_norm(config: BakaConfig) -> nn.Module:
    """Of the width of the model."""
    kind = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.dim_model, config.norm_eps)


class Rotation(nn.Module):
    """Angles per place, base^(-2 j / P). They follow from the config; the buffer is here because the original stores it."""

    freqs: Tensor

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base
        self.register_buffer("freqs", self.angles().float())

    def angles(self) -> Tensor:
        """[P / 2], float64."""
        return self.base ** -(torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """x [B, H, T, P] turned by the angles of the places [B, T]; computed in float32 at least."""
        wide = at_least_float32(x)
        phases = (place[:, None, :, None] * self.angles().to(x.device)).repeat_interleave(2, dim=-1)
        return rotate(wide, phases.cos().to(wide.dtype), phases.sin().to(wide.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Softmax attention with scores q . k / sqrt(P)."""

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        D, A, self.heads = config.dim_model, config.dim_attn, config.n_heads
        self.q = nn.Linear(D, A, bias=False)
        self.k = nn.Linear(D, A, bias=False)
        self.v = nn.Linear(D, D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.rot = Rotation(A // self.heads, config.rope_base)

    def forward(self, n: Tensor, slots: ChunkSlots, past: Tensor | None, there: Tensor | None) -> tuple[Tensor, Tensor]:
        """y, and this chunk's keys and values [B, T, A + D].

        ``past``: those of the slots just before the chunk [B, S, A + D], of which ``there`` says where there are any.
        """
        q, k, v = self.q(n), self.k(n), self.v(n)
        own, T = torch.cat([k, v], dim=-1), n.shape[1]
        place = torch.arange(T, device=n.device)[None]
        # Absent slots see themselves: a softmax over nothing is no number.
        visible = (place <= place.mT) & (slots.present[:, None] | (place == place.mT))
        key_place = place
        if past is not None and there is not None:
            S = past.shape[1]
            past_k, past_v = past.to(k.dtype).split([k.shape[-1], v.shape[-1]], dim=-1)
            k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
            visible = torch.cat([(there > 0)[:, None].expand(-1, T, -1), visible], dim=-1)
            key_place = torch.cat([torch.arange(-S, 0, device=n.device)[None], place], dim=1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k = self.rot(q, place), self.rot(k, key_place)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        return self.o(y.transpose(1, 2).flatten(2)), own


class GatedMLP(nn.Module):
    """The perceptron; its activation is float32 at least."""

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        self.config = config
        self.fc_gate = nn.Linear(config.dim_model, config.dim_ff, bias=False)
        self.fc_up = nn.Linear(config.dim_model, config.dim_ff, bias=False)
        self.fc_down = nn.Linear(config.dim_ff, config.dim_model, bias=False)

    def forward(self, n: Tensor) -> tuple[Tensor, None]:
        gate = at_least_float32(self.fc_gate(n))
        if self.config.act_fn == "silu":
            gate = F.silu(gate)
        else:
            gate = 1 / (1 + (gate / self.config.elephant_width).abs() ** self.config.elephant_power)
        return self.fc_down(self.fc_up(n) * gate.to(n.dtype)), None


class StepForward(nn.Module):
    """The matrix W_s, of one layer or of all."""

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        self.config = config
        self.step = nn.Linear(4 * config.dim_model, config.dim_model, bias=False)

    def forward(self, n: Tensor, slots: ChunkSlots, window: Tensor | None) -> tuple[Tensor, Tensor]:
        """y, and the last three inputs of the chunk [B, 3, D]; ``window``: those before it."""
        n = torch.where(slots.present[..., None], n, 0)
        before = n.new_zeros(len(n), 3, n.shape[-1]) if window is None else window.to(n.dtype)
        inputs, T = torch.cat([before, n], dim=1), n.shape[1]
        y = self.step(torch.cat([inputs[:, tap : tap + T] for tap in range(4)], dim=-1))
        slot = torch.arange(T, device=n.device)[None]
        reached = slot - self.config.n_rmt_tokens * slots.first >= 3
        if self.config.step_reach == "xl":
            reached = reached | ~slots.first
        if self.config.step == "step4":
            reached = reached & ((slots.length - 1 - slot) % 4 == 0)
        last = (slots.length + torch.arange(3, device=n.device)).clamp(max=T + 2)
        return torch.where(reached[..., None], y, 0), pick(inputs, last)


class Gated(nn.Module):
    """The gate of a branch, and the branch unless all layers share it."""

    def __init__(self, config: BakaConfig, base: nn.Module | None) -> None:
        super().__init__()
        self.activation, self.reads, self.base = GATES[config.gate], config.gate_input, base
        self.fc_gate = nn.Linear(config.dim_model, config.dim_model, bias=False)

    def gate(self, n: Tensor, y: Tensor) -> Tensor:
        """``y`` times the gate."""
        return y * self.activation(self.fc_gate({"x": n, "y": y, "y-x": y - n}[self.reads]))


class BakaLayer(nn.Module):
    """Branches side by side, and Mamba after them."""

    def __init__(self, config: BakaConfig, with_mamba: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        own_step = config.step != "none" and not config.step_shared
        branches: dict[str, nn.Module | None] = {
            "attn": Attention(config),
            "mlp": GatedMLP(config),
            "step_forward": StepForward(config) if own_step else None,
        }
        if config.gate != "none":
            gated = (name for name in branches if name != "step_forward" or config.step != "none")
            branches |= {name: Gated(config, branches[name]) for name in tuple(gated)}
        self.norm_in = make_norm(config)
        self.attn, self.mlp, self.step_forward = branches.values()
        self.norm_mamba = make_norm(config) if with_mamba else None
        self.mamba = Mamba(config) if with_mamba else None

    def forward(
        self,
        x: Tensor,
        slots: ChunkSlots,
        past: Tensor | None,
        there: Tensor | None,
        window: Tensor | None,
        mamba_state: Tensor | None,
        shared_step: StepForward | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The residual stream after the layer, and what it would carry if the chunk is closed; see ``baka.state_shapes``."""
        n = self.norm_in(x.to(self.norm_in.weight.dtype))
        attended, kv = run(self.attn, n, slots, past, there)
        added = attended + run(self.mlp, n)[0]
        carried = {"kv": kv}
        if self.step_forward is not None or shared_step is not None:
            stepped, carried["window"] = run(self.step_forward, n, slots, window, base=shared_step)
            added = added + stepped
        x = x + self.dropout(added)
        if self.mamba is not None and self.norm_mamba is not None:
            u = self.norm_mamba(x.to(self.norm_mamba.weight.dtype))
            y, carried["mamba"] = self.mamba(u, slots, mamba_state)
            x = x + self.dropout(y)
        return x, carried


def run(branch: nn.Module | None, n: Tensor, *others: Any, base: nn.Module | None = None) -> tuple[Tensor, Any]:
    """What a branch adds, its gate applied, and what it carries. ``base``: what computes it, where that is not its own."""
    computing = base or (branch.base if isinstance(branch, Gated) else branch)
    assert computing is not None
    y, carried = computing(n, *others)
    return (branch.gate(n, y) if isinstance(branch, Gated) else y), carried
