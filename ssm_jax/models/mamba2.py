"""Mamba-2 language models: config, layer, published sizes, operation count."""

import dataclasses
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
from ssm_jax.nn.mixers import Mamba2


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Field names follow mamba_ssm; see ``MambaConfig`` for the shared ones.

    Attributes:
        headdim: P. ngroups: G, number of (B, C) pairs that the heads share.
        dt_limit: bounds of the step size after softplus, applied in every mode.
        chunk_size: length of the blocks that are worked on in parallel; a speed knob, None picks one.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    bias: bool = False
    conv_bias: bool = True
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 16
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        require_rate(self.dropout)
        require_epsilon(self.norm_eps)
        require_chunk(self.chunk_size)
        require(self, "vocab_size", "d_model", "n_layers", "d_state", "d_conv", "expand", "headdim", "ngroups")
        require(self, "pad_vocab_size_multiple")
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim {self.headdim} does not divide expand * d_model = {self.d_inner}; choose one that does"
            )
        if self.heads % self.ngroups:
            raise ValueError(f"ngroups {self.ngroups} does not divide the {self.heads} heads; choose one that does")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: Mamba2Config) -> Block:
    """The repeating unit: h + Mamba2(RMSNorm(h))."""
    mixer = Mamba2(
        d_inner=config.d_inner,
        d_state=config.d_state,
        d_conv=config.d_conv,
        headdim=config.headdim,
        ngroups=config.ngroups,
        bias=config.bias,
        conv_bias=config.conv_bias,
        norm_eps=config.norm_eps,
        dt_limit=config.dt_limit,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dt_init_floor=config.dt_init_floor,
        A_init_range=config.A_init_range,
        out_init_scale=config.n_layers**-0.5,
        chunk_size=config.chunk_size,
        **kinds(config),
    )
    return Block(norm=rms_norm(config), mixer=mixer, dropout=config.dropout)


def flops_per_token(config: Mamba2Config, context: int) -> float:
    """Forward operations per token, the recurrence counted in its recurrent form; independent of the context."""
    D, E, keys = config.d_model, config.d_inner, config.ngroups * config.d_state
    products = D * (2 * E + 2 * keys + config.heads) + E * D
    conv = config.d_conv * (E + 2 * keys)
    recurrence = 2.5 * E * config.d_state
    return 2.0 * (config.n_layers * (products + conv + recurrence) + D * config.padded_vocab_size)


PRESETS: dict[str, dict[str, Any]] = {
    "mamba2-130m": published(768, 24),
    "mamba2-370m": published(1024, 48),
    "mamba2-780m": published(1536, 48),
    "mamba2-1.3b": published(2048, 48),
    "mamba2-2.7b": published(2560, 64),
}
