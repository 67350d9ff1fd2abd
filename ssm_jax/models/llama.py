"""LLaMA (Touvron et al. 2023, arXiv:2302.13971) with grouped queries: config, layer, sizes, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import kinds, require, require_epsilon, require_rate, rms_norm, round_up
from ssm_jax.nn.mixers import Attention
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.transformer_block import TransformerBlock

INIT = nn.initializers.normal(0.02)
"""Of every matrix, as in transformers; the paper does not say."""
ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "n_positions",
    "rope_theta": "rope_base",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Names of transformers for what is here."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A transformer with rotary positions, for comparison and as a teacher; see ``MambaConfig`` for the shared fields.

    Attributes:
        n_heads: H. n_kv_heads: G, heads of keys and values, each shared by H / G of the others; None is H.
        head_dim: P; None is d_model / H.
        d_mlp: width of the gated perceptron; None is the paper's, 8/3 d_model rounded up to a multiple of 256.
        n_positions: the longest document, in tokens; ``init_state`` makes room for it. No parameter depends on it.
        rope_base: of the rotary angles.
        attention_bias, mlp_bias: whether the projections carry biases.
        dropout: of each of a layer's two branches, in training.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_mlp: int | None = None
    n_positions: int = 2048
    rope_base: float = 10_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
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
        require(self, *(name for name in ("n_kv_heads", "head_dim", "d_mlp") if getattr(self, name) is not None))
        if self.rope_base <= 1:
            raise ValueError(f"rope_base is {self.rope_base}; it must be above 1")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads {self.n_heads} does not divide d_model = {self.d_model}; choose one that does, or set head_dim"
            )
        if self.n_heads % self.n_kv_heads_resolved:
            raise ValueError(
                f"n_kv_heads {self.n_kv_heads} does not divide n_heads = {self.n_heads}; choose one that does"
            )
        if self.head_dim_resolved % 2:
            raise ValueError(f"head_dim is {self.head_dim_resolved}; rotary positions turn pairs, so it must be even")

    @property
    def n_kv_heads_resolved(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim_resolved(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def d_mlp_resolved(self) -> int:
        return round_up(8 * self.d_model // 3, 256) if self.d_mlp is None else self.d_mlp

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: LlamaConfig) -> TransformerBlock:
    """The repeating unit: attention and gated perceptron, each after an RMSNorm and added to the stream."""
    inits: dict[str, Any] = {"kernel_init": INIT, "out_init": INIT}
    attention = Attention(
        heads=config.n_heads,
        head_dim=config.head_dim_resolved,
        block=config.n_positions,
        key_heads=config.n_kv_heads_resolved,
        bias=config.attention_bias,
        rotary_base=config.rope_base,
        **inits,
        **kinds(config),
    )
    mlp = MLP(
        width=config.d_mlp_resolved, activation="silu", gated=True, bias=config.mlp_bias, **inits, **kinds(config)
    )
    return TransformerBlock(
        norm=rms_norm(config), mixer=attention, mlp_norm=rms_norm(config), mlp=mlp, dropout=config.dropout
    )


def flops_per_token(config: LlamaConfig, context: int) -> float:
    """Forward operations per token of a document of ``context`` tokens, each of which attends to (context + 1) / 2 on average."""
    D, P = config.d_model, config.head_dim_resolved
    heads, kv_heads = config.n_heads, config.n_kv_heads_resolved
    products = 2 * D * P * (heads + kv_heads) + 3 * D * config.d_mlp_resolved
    attention = 2 * heads * P * (min(context, config.n_positions) + 1) / 2
    return 2.0 * (config.n_layers * (products + attention) + D * config.padded_vocab_size)


def _paper(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    return {"vocab_size": 32000, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}


def _relora(d_model: int, d_mlp: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    sizes = {"d_model": d_model, "d_mlp": d_mlp, "n_layers": n_layers, "n_heads": n_heads}
    return {"vocab_size": 32100, "n_positions": 1024, **sizes}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-9m": _relora(128, 352, 4, 4),
    "llama-20m": _relora(256, 688, 4, 4),
    "llama-35m": _relora(384, 1024, 6, 8),
    "llama-40m": _relora(416, 1024, 8, 8),
    "llama-60m": _relora(512, 1376, 8, 8),
    "llama-71m": _relora(512, 1368, 12, 8),
    "llama-100m": _relora(512, 1368, 21, 16),
    "llama-130m": _relora(768, 2048, 12, 12),
    "llama-250m": _relora(768, 2560, 24, 16),
    "llama-350m": _relora(1024, 2736, 24, 16),
    "llama-1b": _relora(2048, 5461, 24, 32),
    "llama-3b": _relora(2560, 6848, 32, 32),
    "llama-7b": _paper(4096, 32, 32),
    "llama-13b": _paper(5120, 40, 40),
    "llama-30b": _paper(6656, 60, 52),
    "llama-65b": _paper(8192, 80, 64),
}
"""Below 7B the models of ReLoRA (Lialin et al. 2023, arXiv:2307.05695), with T5's vocabulary; from there those of the paper."""
