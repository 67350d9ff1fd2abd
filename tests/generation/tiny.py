"""Small models with lively logits, shared by the tests of generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ssm_jax
from ssm_jax.models import LanguageModel

VOCAB = 61  # padded to 64 rows
FIELDS: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 8, "headdim": 8},
    "gpt2": {"n_heads": 4, "n_positions": 64, "pad_vocab_size_multiple": 8},
}
FAMILIES = tuple(FIELDS)


@functools.cache
def tiny(family: str, vocab_size: int = VOCAB) -> tuple[LanguageModel, Any]:
    """A model of two layers with random parameters of a size at which its greedy text does not repeat one token."""
    model = ssm_jax.build(family, vocab_size=vocab_size, d_model=16, n_layers=2, **FIELDS[family])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnames=("model",))
def full_logits(model: LanguageModel, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of one pass over whole sequences, padding rows of the vocabulary included."""
    return model.apply({"params": params}, tokens)[0]
