"""DenseRetNet (He et al. 2024, arXiv:2403.00818; DenseSSM's dense_gau_retnet): config, layer, sizes, operation count."""

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from ssm_jax.models.common import kinds, require, require_chunk, require_epsilon, require_rate, rms_norm, round_up
from ssm_jax.models.retnet import require_head_widths
from ssm_jax.nn.dense import DenseBlock
from ssm_jax.nn.mixers import Retention

_STD = 0.02


@dataclasses.dataclass(frozen=True)
class DenseRetNetConfig:
    """Gated retention units without perceptrons, whose keys and values are fused with those of shallower layers.

    See ``MambaConfig`` and ``RetNetConfig`` for the other fields.

    Attributes:
        d_key, d_value: of all heads together; None for d_model / 2 and 2 d_model.
        dense_layers: m, how many layers below are fused; 0 for none.
        key_gate_ratio, value_gate_ratio: d_model / r features between the two layers of the gates.
        gate: False fuses without gates. projection: "identity", or "linear" for a matrix per source.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_key: int | None = None
    d_value: int | None = None
    dense_layers: int = 2
    key_gate_ratio: int = 32
    value_gate_ratio: int = 32
    gate: bool = True
    projection: Literal["identity", "linear"] = "identity"
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
        require(self, "vocab_size", "d_model", "n_layers", "n_heads", "d_key_resolved", "d_value_resolved")
        require(self, "key_gate_ratio", "value_gate_ratio", "pad_vocab_size_multiple")
        require_head_widths(self.n_heads, d_key=self.d_key_resolved, d_value=self.d_value_resolved)
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers is {self.dense_layers}; it must be 0 or more")
        if self.gate and self.dense_layers and max(self.key_gate_ratio, self.value_gate_ratio) > self.d_model:
            raise ValueError(
                f"gate ratios {self.key_gate_ratio} and {self.value_gate_ratio} leave no feature of d_model = {self.d_model}; "
                "choose a smaller key_gate_ratio and value_gate_ratio"
            )

    @property
    def d_key_resolved(self) -> int:
        return self.d_model // 2 if self.d_key is None else self.d_key

    @property
    def d_value_resolved(self) -> int:
        return 2 * self.d_model if self.d_value is None else self.d_value

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)

    @property
    def gate_widths(self) -> tuple[int, int]:
        return self.d_model // self.key_gate_ratio, self.d_model // self.value_gate_ratio


def layer(config: DenseRetNetConfig) -> DenseBlock:
    """The repeating unit: one gated retention unit. The first layer has, and never uses, what fusion needs, as published."""
    init = nn.initializers.normal(_STD)
    retention = Retention(
        heads=config.n_heads,
        key_dim=config.d_key_resolved // config.n_heads,
        value_dim=config.d_value_resolved // config.n_heads,
        activated=True,
        norm_scale=True,
        epsilon=config.norm_eps,
        gate_bottlenecks=config.gate_widths if config.gate else None,
        source_matrices=config.projection == "linear",
        score_normaliser=config.score_normaliser,
        projection_init=init,
        out_init=init,
        gate_init=init,
        chunk_size=config.chunk_size,
        **kinds(config),
    )
    return DenseBlock(norm=rms_norm(config), mixer=retention, sources=config.dense_layers, dropout=config.dropout)


def flops_per_token(config: DenseRetNetConfig, context: int) -> float:
    """Forward operations per token: weight products, gates, the recurrence, head."""
    D, K, V = config.d_model, config.d_key_resolved, config.d_value_resolved
    products = 2 * D * K + 3 * D * V + 2 * K * V // config.n_heads
    if config.dense_layers and config.gate:
        products += sum(width * (D + out) for width, out in zip(config.gate_widths, (K, V), strict=True))
    if config.projection == "linear":
        products += config.dense_layers * (K * K + V * V)
    return 2.0 * (config.n_layers * products + D * config.padded_vocab_size)


def _published(d_model: int, n_layers: int, n_heads: int, **fields: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 32000, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "dropout": 0.1}
    return {**sizes, "dense_layers": 1, **fields}


_HUB = {"vocab_size": 32001, "dense_layers": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "dense-retnet-350m": _published(1536, 16, 2),
    "dense-retnet-1.3b": _published(2560, 25, 4),
    "dense-retnet-350m-hub": _published(1536, 16, 2, key_gate_ratio=8, **_HUB),
    "dense-retnet-1.3b-hub": _published(2560, 25, 4, key_gate_ratio=16, value_gate_ratio=8, **_HUB),
}
