"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), Pythia's architecture: config, layer, sizes, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import kinds, layer_norm, require, require_epsilon, require_rate, round_up
from ssm_jax.nn.mixers import Attention
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.transformer_block import TransformerBlock

SMALL_INIT = nn.initializers.variance_scaling(2 / 5, "fan_in", "normal")
"""Of every matrix that reads d_model numbers: deviation sqrt(2 / (5 d_model)) (Nguyen & Salazar 2019, arXiv:1910.05895)."""
ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "n_positions",
    "rotary_pct": "rotary_fraction",
    "rotary_emb_base": "rope_base",
    "use_parallel_residual": "parallel_residual",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "hidden_dropout": "dropout",
}
"""Names of transformers for what is here."""


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig:
    """A transformer, rotary in a part of each head, for comparison and as a teacher; see ``MambaConfig`` for the shared fields.

    Attributes:
        n_heads: H; P = d_model / H is the width of each.
        d_mlp: width between the two layers of the perceptron; None is 4 * d_model.
        n_positions: the longest document, in tokens; ``init_state`` makes room for it. No parameter depends on it.
        rotary_fraction: of each head, its first int(P * rotary_fraction) entries, which rotary angles turn.
        rope_base: of the rotary angles.
        parallel_residual: attention and perceptron read the same stream; False: the perceptron reads what attention left.
        activation: "gelu" in everything published; "gelu_tanh" is its approximation.
        attention_bias: whether attention's projections carry biases; the perceptron's always do.
        dropout: of each of a layer's two branches, in training.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int | None = None
    n_positions: int = 2048
    rotary_fraction: float = 0.25
    rope_base: float = 10_000.0
    parallel_residual: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    attention_bias: bool = True
    tie_embeddings: bool = False
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
        if self.rope_base <= 1:
            raise ValueError(f"rope_base is {self.rope_base}; it must be above 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model = {self.d_model}; choose one that does")
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction is {self.rotary_fraction}; it must be above 0 and at most 1")
        if self.rotary_width % 2 or not self.rotary_width:
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of heads of width {self.head_dim} is {self.rotary_width}; "
                "rotary positions turn pairs, so it must be even and at least 2"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary_width(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    @property
    def d_mlp_resolved(self) -> int:
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: GPTNeoXConfig) -> TransformerBlock:
    """The repeating unit: attention and perceptron, each after a LayerNorm of its own and added to the stream."""
    inits: dict[str, Any] = {
        "kernel_init": SMALL_INIT,
        "out_init": nn.initializers.normal(2 / config.n_layers * config.d_model**-0.5),
    }
    attention = Attention(
        heads=config.n_heads,
        head_dim=config.head_dim,
        block=config.n_positions,
        bias=config.attention_bias,
        rotary_base=config.rope_base,
        rotary_width=config.rotary_width,
        **inits,
        **kinds(config),
    )
    mlp = MLP(width=config.d_mlp_resolved, activation=config.activation, **inits, **kinds(config))
    return TransformerBlock(
        norm=layer_norm(config),
        mixer=attention,
        mlp_norm=layer_norm(config),
        mlp=mlp,
        dropout=config.dropout,
        parallel=config.parallel_residual,
    )


def embedding_std(config: GPTNeoXConfig) -> float:
    """That of ``SMALL_INIT``."""
    return float((2 / (5 * config.d_model)) ** 0.5)


def flops_per_token(config: GPTNeoXConfig, context: int) -> float:
    """Forward operations per token of a document of ``context`` tokens, each of which attends to (context + 1) / 2 on average."""
    D = config.d_model
    products = 4 * D * D + 2 * D * config.d_mlp_resolved
    attention = 2 * D * (min(context, config.n_positions) + 1) / 2
    return 2.0 * (config.n_layers * (products + attention) + D * config.padded_vocab_size)


def _pythia(d_model: int, n_layers: int, n_heads: int, devices: int = 1) -> dict[str, Any]:
    """The table has a multiple of 128 rows on each of the devices that the model was split over."""
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}
    return {"vocab_size": 50277, "pad_vocab_size_multiple": 128 * devices, **sizes}


PRESETS: dict[str, dict[str, Any]] = {
    "pythia-14m": _pythia(128, 6, 4),
    "pythia-31m": _pythia(256, 6, 8),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, devices=2),
    "pythia-12b": _pythia(5120, 36, 40, devices=4),
}
