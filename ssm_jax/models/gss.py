"""Gated state-space language models: config, layer, the published size, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import kinds, layer_norm, require, require_rate, round_up
from ssm_jax.nn.block import Block
from ssm_jax.nn.mixers import GatedStateSpace
from ssm_jax.nn.mixers.gss import derive as derive_mixer
from ssm_jax.typing import Params

ALIASES = {"num_tokens": "vocab_size", "dim": "d_model", "depth": "n_layers"}
"""Names of gated-state-spaces-pytorch for what every family here has."""


@dataclasses.dataclass(frozen=True)
class GSSConfig:
    """Field names and defaults follow gated-state-spaces-pytorch, whose num_tokens, dim and depth are accepted too.

    Attributes:
        vocab_size: number of tokens; the table has ``padded_vocab_size`` rows.
        dim_expansion_factor: F / d_model; F is the product truncated to an integer.
        dss_kernel_N: modes, shared by all channels. dss_kernel_H: H, width of the state-space branch.
        dss_kernel_lambda_imag_exp: whether Lambda_imag is the logarithm of the frequency.
        final_norm: LayerNorm before the head, as in the published checkpoint; the package has none.
        init, memory: how the modes begin; see ``nn.initializers.dss_modes``. accurate: see ``GatedStateSpace``.
        residual_in_fp32: keep the residual stream in float32 whatever ``dtype`` is.
        dtype, param_dtype: compute and storage of parameters; state space, norms' statistics and loss are float32 always.
        dropout: of every layer's output, in training.
        remat: what is recomputed in the backward pass: "none", "dots" (all but weight products), "full" (whole layers).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    dim_expansion_factor: float = 4.0
    dss_kernel_N: int = 512
    dss_kernel_H: int = 256
    dss_kernel_lambda_imag_exp: bool = True
    final_norm: bool = False
    tie_embeddings: bool = False
    init: Literal["reference", "slow"] = "reference"
    memory: int = 4096
    accurate: bool = False
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        require_rate(self.dropout)
        require(self, "vocab_size", "d_model", "n_layers", "dss_kernel_N", "dss_kernel_H", "pad_vocab_size_multiple")
        require(self, "d_inner")
        if self.memory < 3:
            raise ValueError(f"memory is {self.memory}; it must be at least 3 tokens")

    @property
    def d_inner(self) -> int:
        return int(self.dim_expansion_factor * self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: GSSConfig) -> nn.Module:
    """The repeating unit: h + GSS(LayerNorm(h))."""
    mixer = GatedStateSpace(
        d_inner=config.d_inner,
        d_dss=config.dss_kernel_H,
        n_modes=config.dss_kernel_N,
        imag_exp=config.dss_kernel_lambda_imag_exp,
        modes_init=config.init,
        memory=config.memory,
        accurate=config.accurate,
        chunk_size=config.chunk_size,
        norm_eps=config.norm_eps,
        **kinds(config),
    )
    return Block(norm=layer_norm(config), mixer=mixer, dropout=config.dropout)


def final_norm(config: GSSConfig) -> nn.Module | None:
    """LayerNorm where the config asks for it."""
    return layer_norm(config) if config.final_norm else None


def derive(config: GSSConfig, params: Params, length: int | None) -> Params:
    """See ``Family.derive``: the coefficients of the modes and, for rows of ``length`` tokens, the kernels."""
    how = {"imag_exp": config.dss_kernel_lambda_imag_exp, "accurate": config.accurate}
    mixer = derive_mixer(params["layers"]["mixer"], length=length, **how)
    return {**params, "layers": {**params["layers"], "mixer": mixer}}


def flops_per_token(config: GSSConfig, context: int) -> float:
    """Forward operations per token: weight products, state space as a recurrence, and head; independent of the context."""
    D, F, H, N = config.d_model, config.d_inner, config.dss_kernel_H, config.dss_kernel_N
    products = D * F + D * H + H * F + F * D
    return 2.0 * (config.n_layers * (products + 6 * H * N) + D * config.padded_vocab_size)


PRESETS: dict[str, dict[str, Any]] = {
    "gss-708m": {"vocab_size": 50257, "d_model": 1600, "n_layers": 24, "final_norm": True},
}
"""gss-708m: naxalpha/gated-state-space."""
