"""From a name or a config to a model."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ssm_jax.config import to_dict
from ssm_jax.models import registry
from ssm_jax.models.lm import LanguageModel

if TYPE_CHECKING:
    from flax import nnx


def build(name_or_config: Any, **fields: Any) -> LanguageModel:
    """A model from a family name, the name of a published size, or a config object, with fields set or overridden.

    ``build("mamba", vocab_size=257, d_model=128, n_layers=4)``; ``build("mamba2-130m", dtype="bfloat16")``.

    Raises:
        ConfigError: unknown name or field (with the nearest valid one), missing field, wrong type.
    """
    if isinstance(name_or_config, str):
        return LanguageModel(registry.make_config(name_or_config, **fields))
    family = registry.family_of(name_or_config)
    if not fields:
        return LanguageModel(name_or_config)
    return LanguageModel(registry.config_of(family, fields, to_dict(name_or_config)))


def count_parameters(config: Any) -> int:
    """Number of parameters of a model with this config, padding rows included, without allocating any."""
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def flops_per_token(config: Any, context: int) -> float:
    """Operations of one forward pass per token at a context length; a training step costs three times as much."""
    return registry.family_of(config).flops_per_token(config, context)


def to_nnx(model: LanguageModel) -> "nnx.bridge.ToNNX":
    """The model as an NNX module (``flax.nnx.bridge.ToNNX``); call ``.lazy_init(tokens)`` to create its parameters."""
    from flax import nnx

    return nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0))
