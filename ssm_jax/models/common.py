"""What every family's config shares."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ssm_jax.nn.norm import RMSNorm


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def require(config: Any, *names: str) -> None:
    """Raises ValueError unless each named field is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


def require_rate(dropout: float) -> None:
    """Raises ValueError unless a dropout rate lies in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")


def require_epsilon(norm_eps: float) -> None:
    """Raises ValueError unless the epsilon of the norms is above 0."""
    if norm_eps <= 0:
        raise ValueError(f"norm_eps is {norm_eps}; it must be above 0")


def require_chunk(chunk_size: int | None) -> None:
    """Raises ValueError unless a chunk has at least one token."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or null for the best one")


def published(d_model: int, n_layers: int) -> dict[str, Any]:
    """Fields of a size published by state-spaces: trained with the GPT-NeoX tokenizer, everything else as by default."""
    return {"vocab_size": 50277, "d_model": d_model, "n_layers": n_layers}


def kinds(config: Any) -> dict[str, Any]:
    """The types that modules compute in and store parameters in."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def rms_norm(config: Any) -> nn.Module:
    """RMSNorm over the model's width."""
    return RMSNorm(config.norm_eps, **kinds(config))


def layer_norm(config: Any) -> nn.Module:
    """LayerNorm over the model's width; the variance in two passes, because E[x^2] - E[x]^2 loses digits."""
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, **kinds(config))
