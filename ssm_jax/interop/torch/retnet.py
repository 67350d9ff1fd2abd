"""RetNet by the parameter names of syncdoth/RetNet: torchscale's, with ``model.`` before them and ``lm_head`` for the head.

A layer, with a = (2 L)^(1/4) under deepnorm and 1 else:

    pre-norm   x <- a x + MSR(norm(x)),  x <- a x + FFN(norm(x));  and a norm after the last layer
    post-norm  x <- norm(a x + MSR(x)),  x <- norm(a x + FFN(x))
    MSR(x) = (concat over heads of norm(retention(x W_q, x W_k / sqrt(d_k), x W_v)) * swish(x W_g)) W_o
    FFN(x) = (act(x W_1) * (x W_gate)) W_2, or, with biases, subnorm(act(x W_1)) W_2

The norm of a head's output has no weight; all but the sub-norm are RMSNorms.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from ssm_jax.interop.torch.configs import RetNetConfig
from ssm_jax.interop.torch.lm import Decoded, RecurrentLM, States, padding_idx, torch_linear
from ssm_jax.interop.torch.norms import RMSNorm, at_least_float32, rms_norm
from ssm_jax.interop.torch.rel_pos import RelativePositions
from ssm_jax.interop.torch.retention import Retention, merge_heads, split_heads
from ssm_jax.interop.torch.steps import Steps

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu}


class MultiScaleRetention(nn.Module):
    """MSR above."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        D, V, self.heads = config.decoder_embed_dim, config.decoder_value_embed_dim, config.decoder_retention_heads
        self.eps = config.layernorm_eps
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, V, bias=False)
        self.g_proj = nn.Linear(D, V, bias=False)
        self.out_proj = nn.Linear(V, D, bias=False)

    def forward(self, x: Tensor, retention: Retention, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        o, state = retention(q, k * k.shape[-1] ** -0.5, v, state)
        o = merge_heads(rms_norm(o, self.eps)).to(x.dtype)
        return self.out_proj(F.silu(self.g_proj(x)) * o), state

    def init_weights(self, shrink: float) -> None:
        """As torchscale: uniform by Glorot with small gains; ``shrink`` is deepnorm's."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            initialization.xavier_uniform_(linear.weight, gain=2**-2.5 * (shrink if linear is self.v_proj else 1))
        initialization.xavier_uniform_(self.out_proj.weight, gain=shrink / 2)


class FeedForward(nn.Module):
    """FFN above. The activation is float32 at least."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        D, width, bias = config.decoder_embed_dim, config.decoder_ffn_embed_dim, not config.use_glu
        self.activation = ACTIVATIONS[config.activation_fn]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc1 = nn.Linear(D, width, bias=bias)
        self.fc2 = nn.Linear(width, D, bias=bias)
        self.gate = nn.Linear(D, width, bias=False) if config.use_glu else None
        self.ffn_layernorm = None
        if config.subln and not config.use_glu:
            # The original makes it as wide as the model, and then runs only where that is the width here.
            eps = config.layernorm_eps
            self.ffn_layernorm = RMSNorm(width, eps) if config.use_ffn_rms_norm else nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = self.dropout(self.activation(at_least_float32(h)).to(h.dtype))
        if self.gate is not None:
            h = h * self.gate(x)
        return self.fc2(h if self.ffn_layernorm is None else self.ffn_layernorm(h))

    def init_weights(self, shrink: float) -> None:
        """As torchscale: PyTorch's own; ``shrink`` is deepnorm's."""
        for linear in (self.fc1, self.fc2, self.gate):
            if linear is not None:
                torch_linear(linear, 1.0 if linear is self.gate else shrink)


class RetNetLayer(nn.Module):
    """Retention and feed-forward network, each with its norm and residual sum."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.pre_norm = config.decoder_normalize_before
        self.residual = (2 * config.decoder_layers) ** 0.25 if config.deepnorm else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.retention = MultiScaleRetention(config)
        self.retention_layer_norm = RMSNorm(config.decoder_embed_dim, config.layernorm_eps)
        self.ffn = FeedForward(config)
        self.final_layer_norm = RMSNorm(config.decoder_embed_dim, config.layernorm_eps)

    def forward(self, x: Tensor, retention: Retention, state: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = self.retention(self._before(self.retention_layer_norm, x), retention, state)
        x = self._after(self.retention_layer_norm, x, y)
        y = self.ffn(self._before(self.final_layer_norm, x))
        return self._after(self.final_layer_norm, x, y), state

    def _before(self, norm: RMSNorm, x: Tensor) -> Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, norm: RMSNorm, x: Tensor, y: Tensor) -> Tensor:
        total = self.residual * x + self.dropout(y)
        return total if self.pre_norm else norm(total)


class RetNetModel(nn.Module):
    """Embedding, layers, and the norm after them."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        D, V, H, eps = (
            config.decoder_embed_dim,
            config.decoder_value_embed_dim,
            config.decoder_retention_heads,
            config.layernorm_eps,
        )
        if hasattr(config, "expand_k"):
            raise ValueError(
                "This folder is in the layout of flash-linear-attention. Import fla before it is loaded, or convert it: "
                "python -m train.convert FOLDER OTHER --layout ssm_jax."
            )
        if D % (2 * H) or V % H:
            raise ValueError(f"{H} heads cannot share {D} keys (an even number each) and {V} values.")
        self.config = config
        self.embed_scale = 1.0 if config.no_scale_embedding else D**0.5
        self.embed_tokens = nn.Embedding(config.vocab_size, D, padding_idx(config))
        self.layernorm_embedding = RMSNorm(D, eps) if config.layernorm_embedding else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(RetNetLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = RMSNorm(D, eps) if config.decoder_normalize_before else None
        self.retnet_rel_pos = RelativePositions(H, D // H, config.use_lm_decay)

    def forward(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        x = self.embed_tokens(tokens) * self.embed_scale
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = self.dropout(x)
        config = self.config
        retention = Retention.of(
            steps, self.retnet_rel_pos, x.dtype, config.recurrent_chunk_size, config.score_normaliser
        )
        residuals: list[Tensor] = []
        after: list[Tensor] = []
        for layer, state in zip(self.layers, states, strict=True):
            residuals += [x] if keep else []
            x, state = layer(x, retention, state)
            after.append(state)
        return Decoded(x if self.layer_norm is None else self.layer_norm(x), residuals, after)


class RetNetForCausalLM(RecurrentLM):
    """The language model; see the file."""

    config_class = RetNetConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ("retnet_rel_pos",)
    _keys_to_ignore_on_load_missing = ("retnet_rel_pos",)
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def decode(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        return self.model(tokens, steps, states, keep)

    def readout(self, features: Tensor) -> Tensor:
        return self.lm_head(features)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, and syncdoth's term that keeps logits small: not the square of the logarithm, its logarithm."""
        loss = super().loss(logits, labels)
        if self.config.z_loss_coeff:
            loss = loss + self.config.z_loss_coeff * logits.logsumexp(-1).log().mean()
        return loss

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        shrink = (8 * config.decoder_layers) ** -0.25 if config.deepnorm else 1.0
        if isinstance(module, nn.Embedding) or module is self.lm_head:
            initialization.normal_(module.weight, std=config.decoder_embed_dim**-0.5)
        elif isinstance(module, (MultiScaleRetention, FeedForward)):
            module.init_weights(shrink)
        elif isinstance(module, RelativePositions):
            module.fill()
        elif not isinstance(module, nn.Linear):
            super()._init_weights(module)
