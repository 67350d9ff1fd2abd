"""DenseMamba (He et al. 2024, arXiv:2403.00818), announced there and never released: config, layer, sizes, operation count."""

import dataclasses
from typing import Any, Literal

from ssm_jax.models import mamba
from ssm_jax.models.common import require, rms_norm
from ssm_jax.models.mamba import MambaConfig
from ssm_jax.nn.dense import DenseBlock


@dataclasses.dataclass(frozen=True)
class DenseMambaConfig(MambaConfig):
    """Mamba whose layers read out the hidden states of shallower layers with their own.

    The paper's figures leave open what its code would have settled. Here the recurrence carries the layer's own hidden state, not
    the fused one (which no parallel form could compute), sources are unfused too, one gate serves all of them, and no norm follows.

    Attributes:
        dense_layers: m, how many layers below are read; 0 is Mamba, bit for bit.
        gate: one per "channel", or per entry of a channel's "state"; None for none. gate_ratio: d_model / r features between
            the two layers of its perceptron.
        projection: "identity", or "linear" for a matrix [N, N] per source over a channel's state.
    """

    dense_layers: int = 2
    gate: Literal["channel", "state"] | None = "channel"
    gate_ratio: int = 32
    projection: Literal["identity", "linear"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "gate_ratio")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers is {self.dense_layers}; it must be 0 or more")
        if self.gate is not None and self.dense_layers and self.gate_ratio > self.d_model:
            raise ValueError(f"gate_ratio {self.gate_ratio} leaves no feature of d_model = {self.d_model}")


def layer(config: DenseMambaConfig) -> DenseBlock:
    """The repeating unit. The first layer has, and never uses, what fusion needs, so that all layers are alike."""
    dense = {
        "gate": config.gate,
        "gate_bottleneck": config.d_model // config.gate_ratio,
        "source_matrices": config.projection == "linear",
    }
    mixer = mamba.mixer(config, **dense)
    return DenseBlock(norm=rms_norm(config), mixer=mixer, sources=config.dense_layers, dropout=config.dropout)


def flops_per_token(config: DenseMambaConfig, context: int) -> float:
    """Forward operations per token: Mamba's, the gate, and one more scan per source."""
    if not config.dense_layers:
        return mamba.flops_per_token(config, context)
    D, E, N = config.d_model, config.d_inner, config.d_state
    width = {"channel": E, "state": N, None: 0}[config.gate]
    gate = D // config.gate_ratio * (D + width) if width else 0
    matrices = N * N if config.projection == "linear" else 0
    more = gate + config.dense_layers * (9 * E * N / 2 + matrices)
    return mamba.flops_per_token(config, context) + 2.0 * config.n_layers * more


def _size(d_model: int) -> dict[str, Any]:
    """The vocabulary is that of DenseRetNet's published sizes, Llama's."""
    return {"vocab_size": 32000, "d_model": d_model, "n_layers": 48}


PRESETS: dict[str, dict[str, Any]] = {"dense-mamba-360m": _size(1024), "dense-mamba-1.3b": _size(2048)}
