"""DenseRetNet (He et al. 2024, arXiv:2403.00818): gated retention units that also see keys and values of the layers below.

A layer, with y = norm(x) and | between halves of one product:

    q = silu(y W_q),  k = silu(y W_k) / sqrt(d_k),  v | g = silu(y W_h)
    above the first layer, with the k_i and v_i of the m layers below it and G(y) = silu(silu(y W_1) W_2), one per kind:
        k <- norm(k + G_k(y) * sum k_i),  v <- norm(v + G_v(y) * sum v_i)
    x <- x + (concat over heads of norm(retention(q, k, v)) * g) W_o

What a layer gives to those above are its k and v before the sums. They belong to one token, so that no cache holds them. All norms
are RMSNorms with a weight; those of k and v are over all heads together, that of the output is shared by the heads.

Parameter names are the published checkpoints'. The first layer has the weights of a sum, as there, and no use for them.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_jax.interop.torch.configs import DenseGauRetNetConfig
from ssm_jax.interop.torch.lm import Decoded, RecurrentLM, States, padding_idx
from ssm_jax.interop.torch.norms import RMSNorm
from ssm_jax.interop.torch.rel_pos import RelativePositions
from ssm_jax.interop.torch.retention import Retention, merge_heads, split_heads
from ssm_jax.interop.torch.steps import Steps


class Below(NamedTuple):
    """What a layer gives to those above: keys [B, L, K] and values [B, L, E]."""

    k: Tensor
    v: Tensor


class Select(nn.Module):
    """G above, before its outer silu."""

    def __init__(self, width: int, bottleneck: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, bottleneck, bias=False)
        self.fc2 = nn.Linear(bottleneck, out, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(y)))


class GatedRetention(nn.Module):
    """A layer without its first norm and its residual sum."""

    def __init__(self, config: DenseGauRetNetConfig) -> None:
        super().__init__()
        D, K, E, eps = config.hidden_size, config.query_key_dim, config.value_dim, config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, K, bias=False)
        self.k_proj = nn.Linear(D, K, bias=False)
        self.to_hidden = nn.Sequential(nn.Linear(D, 2 * E, bias=False), nn.SiLU())
        self.to_out = nn.Sequential(nn.Linear(E, D, bias=False), nn.Dropout(config.dropout))
        self.group_norm = RMSNorm(E // self.heads, eps)
        self.k_select = Select(D, D // config.intermediate_k_select_scale, K)
        self.v_select = Select(D, D // config.intermediate_v_select_scale, E)
        self.k_norm = RMSNorm(K, eps)
        self.v_norm = RMSNorm(E, eps)

    def forward(
        self, y: Tensor, below: list[Below], retention: Retention, state: Tensor | None
    ) -> tuple[Tensor, Below, Tensor]:
        """The output, what the layers above see, and the state. ``below``: of the nearest layers, none for the first."""
        q = F.silu(self.q_proj(y))
        k = F.silu(self.k_proj(y)) * (q.shape[-1] // self.heads) ** -0.5
        v, gate = self.to_hidden(y).chunk(2, dim=-1)
        own = Below(k, v)
        if below:
            k = self.k_norm(k + F.silu(self.k_select(y)) * sum(layer.k for layer in below))
            v = self.v_norm(v + F.silu(self.v_select(y)) * sum(layer.v for layer in below))
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        o, state = retention(q, k, v, state)
        return self.to_out(merge_heads(self.group_norm(o)).to(y.dtype) * gate), own, state


class DenseGauRetNetLayer(nn.Module):
    """Norm, gated retention, residual sum."""

    def __init__(self, config: DenseGauRetNetConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GatedRetention(config)

    def forward(
        self, x: Tensor, below: list[Below], retention: Retention, state: Tensor | None
    ) -> tuple[Tensor, Below, Tensor]:
        y, own, state = self.self_attn(self.input_layernorm(x), below, retention, state)
        return x + y, own, state


class DenseGauRetNetModel(nn.Module):
    """Embedding, layers, and the norm after them."""

    def __init__(self, config: DenseGauRetNetConfig) -> None:
        super().__init__()
        K, E, H = config.query_key_dim, config.value_dim, config.num_attention_heads
        if K % (2 * H) or E % H:
            raise ValueError(f"{H} heads cannot share {K} keys (an even number each) and {E} values.")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx(config))
        self.layers = nn.ModuleList(DenseGauRetNetLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.retnet_rel_pos = RelativePositions(H, K // H)

    def forward(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        x, config = self.embed_tokens(tokens), self.config
        retention = Retention.of(
            steps, self.retnet_rel_pos, x.dtype, config.recurrent_chunk_size, config.score_normaliser
        )
        residuals: list[Tensor] = []
        after: list[Tensor] = []
        below: list[Below] = []
        for layer, state in zip(self.layers, states, strict=True):
            residuals += [x] if keep else []
            x, own, state = layer(x, below, retention, state)
            after.append(state)
            below = [own, *below][: config.dense_block_layers]
        return Decoded(self.norm(x), residuals, after)


class DenseGauRetNetForCausalLM(RecurrentLM):
    """The language model; see the file."""

    config_class = DenseGauRetNetConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ("retnet_rel_pos",)
    _keys_to_ignore_on_load_missing = ("retnet_rel_pos",)
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DenseGauRetNetConfig) -> None:
        super().__init__(config)
        self.model = DenseGauRetNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def decode(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        return self.model(tokens, steps, states, keep)

    def readout(self, features: Tensor) -> Tensor:
        return self.lm_head(features)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with ``initializer_range`` for every matrix, as the original."""
        if isinstance(module, RelativePositions):
            module.fill()
        else:
            super()._init_weights(module)
