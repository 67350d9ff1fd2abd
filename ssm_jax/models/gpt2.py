"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"): config, layer, sizes, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import kinds, layer_norm, require, require_epsilon, require_rate, round_up
from ssm_jax.nn.mixers import Attention
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.transformer_block import TransformerBlock

_STD = 0.02


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """A transformer with learned positions, for comparison and as a teacher; see ``MambaConfig`` for the shared fields.

    Attributes:
        n_heads: H; d_model / H is the width of each.
        n_positions: the longest document, in tokens; ``init_state`` makes room for it.
        d_mlp: width between the two layers of the perceptron; None is 4 * d_model.
        activation: "gelu_tanh" in everything published; "gelu" is the exact one.
        dropout: of each of a layer's two branches, in training.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_positions: int = 1024
    d_mlp: int | None = None
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu_tanh"
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        require_rate(self.dropout)
        require_epsilon(self.norm_eps)
        require(self, "vocab_size", "d_model", "n_layers", "n_heads", "n_positions", "pad_vocab_size_multiple")
        if self.d_mlp is not None:
            require(self, "d_mlp")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model = {self.d_model}; choose one that does")

    @property
    def d_mlp_resolved(self) -> int:
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: GPT2Config) -> TransformerBlock:
    """The repeating unit: attention and perceptron, each after a LayerNorm and added to the stream."""
    inits: dict[str, Any] = {
        "kernel_init": nn.initializers.normal(_STD),
        "out_init": nn.initializers.normal(_STD * (2 * config.n_layers) ** -0.5),
    }
    attention = Attention(
        heads=config.n_heads,
        head_dim=config.d_model // config.n_heads,
        block=config.n_positions,
        bias=True,
        **inits,
        **kinds(config),
    )
    mlp = MLP(width=config.d_mlp_resolved, activation=config.activation, **inits, **kinds(config))
    return TransformerBlock(
        norm=layer_norm(config), mixer=attention, mlp_norm=layer_norm(config), mlp=mlp, dropout=config.dropout
    )


def flops_per_token(config: GPT2Config, context: int) -> float:
    """Forward operations per token of a document of ``context`` tokens, each of which attends to (context + 1) / 2 on average."""
    D = config.d_model
    products = 4 * D * D + 2 * D * config.d_mlp_resolved
    attention = 2 * D * (min(context, config.n_positions) + 1) / 2
    return 2.0 * (config.n_layers * (products + attention) + D * config.padded_vocab_size)


def _published(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    return {"vocab_size": 50257, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _published(768, 12, 12),
    "gpt2-medium": _published(1024, 24, 16),
    "gpt2-large": _published(1280, 36, 20),
    "gpt2-xl": _published(1600, 48, 25),
}
