"""Gated state-space language models: config, layer, the published size, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import kinds, layer_norm, require, require_chunk, require_epsilon, require_rate, round_up
from ssm_jax.nn.block import Block
from ssm_jax.nn.mixers import Attention, GatedStateSpace
from ssm_jax.nn.mixers.gss import derive as derive_mixer
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.transformer_block import TransformerBlock
from ssm_jax.nn.unit import Unit
from ssm_jax.ops.dss import default_chunk_size
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
        attention_every: 0 for none; n makes every n-th layer a transformer block (attention within chunks, then a perceptron), as
            the paper's hybrid does with 4. attention_heads: its heads. attention_chunk: tokens per chunk; chunks do not overlap.
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
    attention_every: int = 0
    attention_heads: int = 8
    attention_chunk: int = 512
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
        require_epsilon(self.norm_eps)
        require_chunk(self.chunk_size)
        require(self, "vocab_size", "d_model", "n_layers", "dss_kernel_N", "dss_kernel_H", "pad_vocab_size_multiple")
        require(self, "d_inner")
        if self.memory < 3:
            raise ValueError(f"memory is {self.memory}; it must be at least 3 tokens")
        if self.attention_every < 0 or self.attention_every == 1:
            raise ValueError(f"attention_every is {self.attention_every}; it must be 0 (no attention) or at least 2")
        if self.attention_every:
            require(self, "attention_heads", "attention_chunk")
            if self.n_layers % self.attention_every:
                raise ValueError(
                    f"n_layers is {self.n_layers}; with attention every {self.attention_every} layers it must be a multiple of that"
                )
            if self.d_model % (2 * self.attention_heads):
                raise ValueError(
                    f"d_model is {self.d_model}; with attention_heads = {self.attention_heads} it must be a multiple of "
                    f"{2 * self.attention_heads}"
                )

    @property
    def d_inner(self) -> int:
        return int(self.dim_expansion_factor * self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)


def layer(config: GSSConfig) -> nn.Module:
    """The repeating unit: h + GSS(LayerNorm(h)); in a hybrid several of these and a transformer block."""
    if not config.attention_every:
        return _gated(config)
    return Unit(members=(*(_gated(config) for _ in range(config.attention_every - 1)), _attending(config)))


def repeats(config: GSSConfig) -> int:
    """How often the unit repeats."""
    return config.n_layers // (config.attention_every or 1)


def _gated(config: GSSConfig) -> nn.Module:
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


def _attending(config: GSSConfig) -> nn.Module:
    # The angles of rotary positions depend on the place in the chunk alone; the original's relative bias is not published.
    attention = Attention(
        heads=config.attention_heads,
        head_dim=config.d_model // config.attention_heads,
        block=config.attention_chunk,
        rotary_base=10_000.0,
        **kinds(config),
    )
    mlp = MLP(width=config.d_inner, **kinds(config))
    return TransformerBlock(
        norm=layer_norm(config), mixer=attention, mlp_norm=layer_norm(config), mlp=mlp, dropout=config.dropout
    )


def final_norm(config: GSSConfig) -> nn.Module | None:
    """LayerNorm where the config asks for it."""
    return layer_norm(config) if config.final_norm else None


def derive(config: GSSConfig, params: Params, length: int | None, documents: bool) -> Params:
    """See ``Family.derive``: the coefficients of the modes and, for rows of ``length`` tokens, the kernels of a chunk."""
    if length is not None:
        length = min(length, config.chunk_size or default_chunk_size(documents))
    how: dict[str, Any] = {"imag_exp": config.dss_kernel_lambda_imag_exp, "accurate": config.accurate, "length": length}

    def of_layers(layers: Params) -> Params:
        return {**layers, "mixer": derive_mixer(layers["mixer"], **how)}

    layers = params["layers"]
    if config.attention_every:
        gated = {name: of_layers(member) for name, member in layers.items() if "Lambda_real" in member["mixer"]}
        return {**params, "layers": {**layers, **gated}}
    return {**params, "layers": of_layers(layers)}


def flops_per_token(config: GSSConfig, context: int) -> float:
    """Forward operations per token: weight products, state space as a recurrence, and head; that of a hybrid's attention
    grows up to a chunk."""
    D, F, H, N = config.d_model, config.d_inner, config.dss_kernel_H, config.dss_kernel_N
    gated = 2 * D * F + D * H + H * F + 6 * H * N
    reach = (min(context, config.attention_chunk) + 1) / 2
    attending = 4 * D * D + 2 * D * F + 2 * D * reach
    with_attention = repeats(config) if config.attention_every else 0
    layers = (config.n_layers - with_attention) * gated + with_attention * attending
    return 2.0 * (layers + D * config.padded_vocab_size)


PRESETS: dict[str, dict[str, Any]] = {
    "gss-708m": {"vocab_size": 50257, "d_model": 1600, "n_layers": 24, "final_norm": True},
}
"""gss-708m: naxalpha/gated-state-space."""
