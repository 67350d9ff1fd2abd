"""RetNet (Sun et al. 2023, arXiv:2307.08621) as in torchscale and its descendants: config, layer, sizes, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import (
    kinds,
    layer_norm,
    require,
    require_chunk,
    require_epsilon,
    require_rate,
    rms_norm,
    round_up,
)
from ssm_jax.nn import initializers
from ssm_jax.nn.mixers import Retention
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.transformer_block import TransformerBlock


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
    """See ``MambaConfig`` for the shared fields.

    Attributes:
        n_heads: H; d_model / H is the width of a key, which must be even, and d_value / H that of a value.
        d_value: of all heads together. d_mlp: between the two layers of the perceptron.
        decay: "powers": gamma_h = 1 - 2^(-5-h); "log_spaced": 1 - gamma from 1/32 to 1/512 (syncdoth's use_lm_decay).
        mlp: "glu": (f(x W) * x V) W_2; "plain": f(x W + b) W_2 + b. activation: f.
        mlp_norm: of the plain perceptron's inner layer (syncdoth's subln): "layer", "rms" or None.
        post_norm: norms after the residual sums, and none before the head. deepnorm: residual streams times (2 layers)^(1/4).
        embedding_scale: token vectors times sqrt(d_model). embedding_norm: a norm after them.
        rotary, norm_scale, score_scale: "interleaved", False and True as published; "halves", True and False in
            flash-linear-attention.
        score_normaliser: None for the exact form, whatever the checkpoint was trained with; "abs_sum" or "sum_abs" for the
            published parallel forms, which take no state.
        trained_normaliser: the one that an imported checkpoint was trained with, where its files tell; changes nothing.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_value: int
    d_mlp: int
    decay: Literal["powers", "log_spaced"] = "powers"
    mlp: Literal["glu", "plain"] = "glu"
    mlp_norm: Literal["layer", "rms"] | None = None
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu"
    post_norm: bool = False
    deepnorm: bool = False
    embedding_scale: bool = False
    embedding_norm: bool = False
    rotary: Literal["interleaved", "halves"] = "interleaved"
    norm_scale: bool = False
    score_scale: bool = True
    score_normaliser: Literal["abs_sum", "sum_abs"] | None = None
    trained_normaliser: Literal["abs_sum", "sum_abs"] | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        require_rate(self.dropout)
        require_epsilon(self.norm_eps)
        require_chunk(self.chunk_size)
        require(self, "vocab_size", "d_model", "n_layers", "n_heads", "d_value", "d_mlp", "pad_vocab_size_multiple")
        require_head_widths(self.n_heads, d_model=self.d_model, d_value=self.d_value)
        if self.mlp_norm and self.mlp != "plain":
            raise ValueError(f"mlp_norm is {self.mlp_norm!r}, which only the plain perceptron has; set mlp to 'plain'")
        if self.score_normaliser and not self.score_scale:
            raise ValueError(
                f"score_normaliser is {self.score_normaliser!r}, of scaled scores; set score_scale to True"
            )

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def require_head_widths(heads: int, **widths: int) -> None:
    """Raises ValueError unless the heads divide the widths, and the first, that of keys, into even parts: rotation turns pairs."""
    for name, width in widths.items():
        if width % heads:
            raise ValueError(f"n_heads {heads} does not divide {name} = {width}; choose one that does")
    name, width = next(iter(widths.items()))
    if width // heads % 2:
        raise ValueError(
            f"{name} / n_heads = {width} / {heads} = {width // heads} is odd; retention turns keys in pairs, so choose an even one"
        )


def layer(config: RetNetConfig) -> TransformerBlock:
    """The repeating unit: retention and perceptron, each with a norm and added to the stream."""
    # DeepNorm (arXiv:2203.00555): the smaller initial values that go with the larger residual stream.
    beta = (8 * config.n_layers) ** -0.25 if config.deepnorm else 1.0
    retention = Retention(
        heads=config.n_heads,
        key_dim=config.d_model // config.n_heads,
        value_dim=config.d_value // config.n_heads,
        decay=config.decay,
        norm_scale=config.norm_scale,
        epsilon=config.norm_eps,
        rotary=config.rotary,
        score_normaliser=config.score_normaliser,
        score_scale=config.score_scale,
        projection_init=initializers.xavier_uniform(2.0**-2.5),
        value_init=initializers.xavier_uniform(2.0**-2.5 * beta),
        out_init=initializers.xavier_uniform(2.0**-1 * beta),
        chunk_size=config.chunk_size,
        **kinds(config),
    )
    smaller = initializers.scaled_torch_linear(beta)
    inner_norm = {"layer": layer_norm, "rms": rms_norm}[config.mlp_norm](config) if config.mlp_norm else None
    gated = config.mlp == "glu"
    mlp = MLP(
        width=config.d_mlp,
        activation=config.activation,
        gated=gated,
        bias=not gated,
        norm=inner_norm,
        kernel_init=initializers.torch_linear if gated else smaller,
        gate_init=smaller,
        out_init=smaller,
        **kinds(config),
    )
    return TransformerBlock(
        norm=rms_norm(config),
        mixer=retention,
        mlp_norm=rms_norm(config),
        mlp=mlp,
        dropout=config.dropout,
        post_norm=config.post_norm,
        residual_scale=(2 * config.n_layers) ** 0.25 if config.deepnorm else 1.0,
    )


def final_norm(config: RetNetConfig) -> nn.Module | None:
    """Between the last layer and the head: none after post-norm layers."""
    return None if config.post_norm else rms_norm(config)


def embedding_norm(config: RetNetConfig) -> nn.Module | None:
    """Between the token vectors and the first layer."""
    return rms_norm(config) if config.embedding_norm else None


def embedding_scale(config: RetNetConfig) -> float:
    """What the token vectors are multiplied with."""
    return float(config.d_model**0.5) if config.embedding_scale else 1.0


def flops_per_token(config: RetNetConfig, context: int) -> float:
    """Forward operations per token: weight products, the recurrence (an update and a read-out of N x P per head), head."""
    D, V = config.d_model, config.d_value
    projections = 2 * D * D + 3 * D * V
    memory = 2 * D * V // config.n_heads
    mlp = (3 if config.mlp == "glu" else 2) * D * config.d_mlp
    return 2.0 * (config.n_layers * (projections + memory + mlp) + D * config.padded_vocab_size)


def _published(d_model: int, n_layers: int, n_heads: int, inner: int) -> dict[str, Any]:
    """The vocabulary is GPT-2's, as in syncdoth's configs; torchscale leaves it to the task."""
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_value": inner, "d_mlp": inner}
    return {"vocab_size": 50257, "embedding_scale": True, "embedding_norm": True, **sizes}


PRESETS: dict[str, dict[str, Any]] = {
    "retnet-base": _published(512, 6, 2, 864),
    "retnet-300m": _published(1280, 12, 8, 2560),
    "retnet-medium": _published(1024, 16, 4, 1728),
    "retnet-xl": _published(2048, 24, 8, 3456),
    "retnet-3b": _published(2560, 32, 10, 4280),
    "retnet-7b": _published(4096, 32, 16, 6912),
    "retnet-13b": _published(5120, 40, 20, 8560),
    "retnet-65b": _published(8192, 64, 32, 13824),
}
