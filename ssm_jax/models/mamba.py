"""Mamba-1 language models: config, layer, published sizes, operation count."""

import dataclasses
import math
from typing import Any, Literal

from ssm_jax.models.common import (
    kinds,
    published,
    require,
    require_chunk,
    require_epsilon,
    require_rate,
    rms_norm,
    round_up,
)
from ssm_jax.nn.block import Block
from ssm_jax.nn.mixers import Mamba


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Field names follow mamba_ssm.

    Attributes:
        vocab_size: number of tokens; the table has ``padded_vocab_size`` rows.
        d_state: N. d_conv: K. expand: E / d_model. dt_rank: R, "auto" = ceil(d_model / 16).
        residual_in_fp32: keep the residual stream in float32 whatever ``dtype`` is.
        dtype, param_dtype: compute and storage of parameters; states, decays and the loss are float32 always.
        dropout: of every layer's output, in training.
        remat: what is recomputed in the backward pass: "none", "dots" (all but weight products), "full" (whole layers).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    bias: bool = False
    conv_bias: bool = True
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        require_rate(self.dropout)
        require_epsilon(self.norm_eps)
        require_chunk(self.chunk_size)
        require(self, "vocab_size", "d_model", "n_layers", "d_state", "d_conv", "expand", "pad_vocab_size_multiple")
        if self.dt_rank != "auto":
            require(self, "dt_rank")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def dt_rank_resolved(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else int(self.dt_rank)

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: MambaConfig) -> Block:
    """The repeating unit: h + Mamba(RMSNorm(h))."""
    return Block(norm=rms_norm(config), mixer=mixer(config), dropout=config.dropout)


def mixer(config: MambaConfig, **dense: Any) -> Mamba:
    """The mixer of a layer; ``dense``: what it needs to fuse hidden states."""
    return Mamba(
        d_inner=config.d_inner,
        dt_rank=config.dt_rank_resolved,
        d_state=config.d_state,
        d_conv=config.d_conv,
        bias=config.bias,
        conv_bias=config.conv_bias,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dt_init_floor=config.dt_init_floor,
        dt_init=config.dt_init,
        dt_scale=config.dt_scale,
        out_init_scale=config.n_layers**-0.5,
        chunk_size=config.chunk_size,
        **dense,
        **kinds(config),
    )


def flops_per_token(config: MambaConfig, context: int) -> float:
    """Forward operations per token: weight products, convolution, scan and head; independent of the context."""
    D, E, N, R = config.d_model, config.d_inner, config.d_state, config.dt_rank_resolved
    products = D * 2 * E + E * (R + 2 * N) + R * E + E * D
    scan = 9 * E * N / 2
    return 2.0 * (config.n_layers * (products + config.d_conv * E + scan) + D * config.padded_vocab_size)


PRESETS: dict[str, dict[str, Any]] = {
    "mamba-130m": published(768, 24),
    "mamba-370m": published(1024, 48),
    "mamba-790m": published(1536, 48),
    "mamba-1.4b": published(2048, 48),
    "mamba-2.8b": published(2560, 64),
}
