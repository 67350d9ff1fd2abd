"""Baka by the parameter names of Maykeye's BakaLLM: chunks with pauses and a recurrent memory.

Tokens are read in chunks of ``n_ctx``; see ``chunk_slots`` for what stands in one. A layer, with n = norm(x):

    x <- x + G(attn(n)) + G(mlp(n)) + G(step(n)),  then x <- x + Mamba(norm'(x)) in every so many layers
    G(y) = y * act(W_g u) with u = n, y or y - n; without gates G(y) = y
    mlp(n) = ((W_up n) * E(W_gate n)) W_down,  E(x) = 1 / (1 + |x / a|^d)
    attn: slot t reads the slots up to t and all of the chunk before; pairs of neighbours are turned by their places
    step(n)_t = W_s [n_{t-3}; n_{t-2}; n_{t-1}; n_t], 0 for t < 3

Memory is what stands in R slots after the last layer: the last of them, or the first.

The state is that at the start of the open chunk, and the embeddings of its tokens so far: every call computes its open chunk from
the start, so that a token costs up to a chunk.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization

from ssm_jax.interop.torch.baka_layer import BakaLayer, StepForward, make_norm
from ssm_jax.interop.torch.baka_mamba import Mamba
from ssm_jax.interop.torch.chunk_slots import ChunkSlots, pick
from ssm_jax.interop.torch.configs import BakaConfig
from ssm_jax.interop.torch.lm import Decoded, RecurrentLM, States, torch_linear
from ssm_jax.interop.torch.norms import at_least_float32
from ssm_jax.interop.torch.steps import Steps

State = dict[str, Tensor]


def state_shapes(config: BakaConfig) -> dict[str, tuple[int, ...]]:
    """What is carried, by name and without the rows of the batch; all zero before any token.

    open: embeddings of the open chunk's tokens. memory: what the chunk before wrote. there: 0 or 1, which of the slots before the
    open chunk have keys and values; the last one is just before it. Of layer i, i.kv: those keys and values. i.window: the last
    three inputs of its step. i.mamba: see ``Mamba``.
    """
    D, S = config.dim_model, config.places
    shapes: dict[str, tuple[int, ...]] = {}
    if config.chunk_boundary == "stream":
        shapes["open"] = (config.n_ctx, D)
    if config.n_rmt_tokens:
        shapes["memory"] = (config.n_rmt_tokens, D)
    if config.xl_layer != "none":
        shapes["there"] = (S,)
    for i in range(config.n_layers):
        if config.xl_layer != "none":
            shapes[f"{i}.kv"] = (S, config.dim_attn + D)
        if config.step != "none" and config.step_reach == "xl":
            shapes[f"{i}.window"] = (3, D)
        if config.mamba_carry and has_mamba(config, i):
            shapes[f"{i}.mamba"] = (config.expand * D, config.d_conv - 1 + config.d_state)
    return shapes


def has_mamba(config: BakaConfig, i: int) -> bool:
    """Whether layer i has one."""
    return bool(config.mamba_each_nth_layer) and i % config.mamba_each_nth_layer == 0


class Pause(nn.Module):
    """The vector of all pauses."""

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        self.pause_emb = nn.Parameter(torch.empty(config.dim_model))


class Memory(nn.Module):
    """What a row's first chunk writes with."""

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        self.rmt_tokens = nn.Parameter(torch.empty(config.n_rmt_tokens, config.dim_model))


class BakaModel(nn.Module):
    """Everything between embedding and final norm."""

    def __init__(self, config: BakaConfig) -> None:
        super().__init__()
        self.config = config
        self.pause = Pause(config) if config.n_pauses else None
        self.rmt = Memory(config) if config.n_rmt_tokens else None
        shared = config.step != "none" and config.step_shared
        self.step_forward = StepForward(config) if shared else None
        self.layers = nn.ModuleList(BakaLayer(config, has_mamba(config, i)) for i in range(config.n_layers))

    def forward(self, x: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        """``x``: embeddings [B, L, D]."""
        config, shapes = self.config, state_shapes(self.config)
        rows, length, D = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        fresh = not states or states[0] is None
        state = (
            {name: x.new_zeros(rows, *shape, dtype=wide) for name, shape in shapes.items()}
            if fresh
            else dict(zip(shapes, (x for x in states if x is not None), strict=True))
        )
        before = steps.before.expand(rows, 1)
        filled = before % config.n_ctx if "open" in state else torch.zeros_like(before)
        total = filled + steps.read[:, -1:]
        # The open chunk's tokens and then the new ones, without gaps; absent ones go to the last column, which nothing reads.
        columns = length + (config.n_ctx - 1 if "open" in state and not fresh else 0)
        size = min(config.n_ctx, columns)
        count = -(-columns // size)
        index = filled + steps.read - 1
        index = index.expand(rows, length) if steps.present is None else torch.where(steps.present, index, count * size)
        tokens = x.new_zeros(rows, count * size + 1, D)
        if "open" in state and not fresh:
            opened = state["open"].to(x.dtype)[:, : count * size]
            tokens = torch.cat([opened, tokens[:, opened.shape[1] :]], dim=1)
        tokens = tokens.scatter(1, index[..., None].expand(-1, -1, D), x)
        outputs: list[list[Tensor]] = []
        for k in range(count):
            here = slice(k * size, (k + 1) * size)
            number = (total - k * size).clamp(0, size)
            slots = ChunkSlots.of(config, number, before - filled + k * size == 0, size)
            streams, state = self._chunk(tokens[:, here], slots, state)
            outputs.append([pick(stream, slots.slot_of) for stream in streams])
        if "open" in state:
            state["open"] = self._left_open(tokens, total, wide)
        back = index.clamp(max=count * size - 1)
        *residuals, features = (pick(torch.cat(parts, dim=1), back) for parts in zip(*outputs, strict=True))
        return Decoded(features, residuals if keep else [], [state[name] for name in shapes])

    def _left_open(self, tokens: Tensor, total: Tensor, wide: torch.dtype) -> Tensor:
        """Those of ``tokens`` that stand in a chunk which is not closed, then zeros."""
        n_ctx = self.config.n_ctx
        n = torch.arange(n_ctx, device=tokens.device)[None]
        last = pick(tokens, (total - total % n_ctx + n).clamp(max=tokens.shape[1] - 1))
        return torch.where((n < total % n_ctx)[..., None], last, 0).to(wide)

    def _chunk(self, tokens: Tensor, slots: ChunkSlots, state: State) -> tuple[list[Tensor], State]:
        """One chunk through all layers: every layer's input and the last one's output [B, T, D], and the state after it."""
        R = self.config.n_rmt_tokens
        x = torch.where(slots.token[..., None], pick(tokens, slots.nth_token), 0)
        if self.pause is not None:
            x = torch.where(slots.pause[..., None], self.pause.pause_emb.to(x.dtype), x)
        if self.rmt is not None:
            start = torch.where(slots.first[..., None], self.rmt.rmt_tokens.to(state["memory"].dtype), state["memory"])
            row = torch.arange(x.shape[1], device=x.device)[None]
            row = torch.where(slots.write, row - (slots.length - R), row).clamp(0, R - 1)
            x = torch.where((slots.read | slots.write)[..., None], pick(start, row).to(x.dtype), x)
        streams, after = [x], dict(state)
        for i, layer in enumerate(self.layers):
            cached = i - 1 if self.config.xl_layer == "below" else i
            x, own = layer(
                x,
                slots,
                past=state.get(f"{cached}.kv"),
                there=state.get("there"),
                window=state.get(f"{i}.window"),
                mamba_state=state.get(f"{i}.mamba"),
                shared_step=self.step_forward,
            )
            streams.append(x)
            own["kv"] = at_the_end(own["kv"], slots, self.config.places)
            after |= {f"{i}.{name}": value for name, value in own.items() if f"{i}.{name}" in state}
        if self.rmt is not None:
            head = torch.where(slots.first, R, 0)
            begin = head if self.config.rmt_read == "head" else slots.length - R
            written = begin + torch.arange(R, device=x.device)[None]
            after["memory"] = pick(x, written.clamp(max=x.shape[1] - 1)).to(state["memory"].dtype)
        if "there" in state:
            after["there"] = at_the_end(torch.ones_like(x[..., :1]), slots, self.config.places)[..., 0]

        def closed(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(slots.closed.reshape(-1, *[1] * (old.ndim - 1)), new.to(old.dtype), old)

        return streams, {name: closed(old, after[name]) for name, old in state.items()}


def at_the_end(x: Tensor, slots: ChunkSlots, places: int) -> Tensor:
    """x [B, T, D] up to the end of the chunk as the last columns of [B, places, D]; zeros before it, and where a slot is absent."""
    x = torch.where(slots.present[..., None], x, 0)
    column = torch.arange(places, device=x.device)[None] - (places - slots.length)
    return torch.where((column >= 0)[..., None], pick(x, column.clamp(0, x.shape[1] - 1)), 0)


class BakaForCausalLM(RecurrentLM):
    """The language model; see the file."""

    config_class = BakaConfig
    base_model_prefix = "model"
    _keys_to_ignore_on_load_missing = (r"rot\.freqs",)
    _tied_weights_keys: ClassVar[dict[str, str]] = {"vocab_out.weight": "vocab_in.weight"}

    def __init__(self, config: BakaConfig) -> None:
        super().__init__(config)
        self.vocab_in = nn.Embedding(config.n_vocab, config.dim_model)
        self.model = BakaModel(config)
        self.norm_out = make_norm(config)
        self.vocab_out = nn.Linear(config.dim_model, config.n_vocab, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vocab_in

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.vocab_in = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.vocab_out

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.vocab_out = value

    def decode(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        x = self.vocab_in(tokens)
        decoded = self.model(at_least_float32(x) if self.config.residual_in_fp32 else x, steps, states, keep)
        decoded.features = self.norm_out(decoded.features.to(self.norm_out.weight.dtype))
        return decoded

    def readout(self, features: Tensor) -> Tensor:
        return self.vocab_out(features)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal numbers for vectors, Mamba's own for Mamba, PyTorch's for the rest."""
        if isinstance(module, nn.Embedding):
            initialization.normal_(module.weight)
        elif isinstance(module, Pause):
            initialization.normal_(module.pause_emb)
        elif isinstance(module, Memory):
            initialization.normal_(module.rmt_tokens)
        elif isinstance(module, Mamba):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            torch_linear(module)
        else:
            super()._init_weights(module)
