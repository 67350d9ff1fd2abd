"""Small models with lively logits, shared by the tests of generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import ssm_jax
from ssm_jax.models import LanguageModel

VOCAB = 61  # padded to 64 rows
FIELDS: dict[str, dict[str, Any]] = {"mamba": {"d_state": 4}, "mamba2": {"d_state": 8, "headdim": 8}}
FAMILIES = tuple(FIELDS)


@functools.cache
def tiny(family: str, vocab_size: int = VOCAB) -> tuple[LanguageModel, Any]:
    """A model of two layers whose parameters were moved by noise, so that its greedy text does not repeat one token."""
    model = ssm_jax.build(family, vocab_size=vocab_size, d_model=16, n_layers=2, **FIELDS[family])
    leaves, treedef = jax.tree.flatten(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return model, treedef.unflatten(noisy)


@functools.partial(jax.jit, static_argnames=("model",))
def full_logits(model: LanguageModel, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of one pass over whole sequences, padding rows of the vocabulary included."""
    return model.apply({"params": params}, tokens)[0]
