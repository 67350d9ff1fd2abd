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
    "gss": {"dss_kernel_N": 8, "dss_kernel_H": 8, "final_norm": True, "pad_vocab_size_multiple": 8},
    "gpt2": {"n_heads": 4, "n_positions": 64, "pad_vocab_size_multiple": 8},
    "llama": {"n_heads": 4, "n_kv_heads": 2, "d_mlp": 24, "n_positions": 64, "pad_vocab_size_multiple": 8},
}
FAMILIES = tuple(FIELDS)
FIELDS["baka"] = {"n_heads": 2, "d_mlp": 24, "n_ctx": 8, "n_pauses": 2, "n_rmt_tokens": 2, "d_state": 4}
"""Not among ``FAMILIES``, whose documents may begin anywhere in a row."""
SCALES = {"baka": 2.0, "gpt2": 2.0, "gss": 3.0}
"""Mean of the norms' scales, 0 where not given. Against a bias in the last norm a small one would always lose."""


@functools.cache
def tiny(family: str, vocab_size: int = VOCAB) -> tuple[LanguageModel, Any]:
    """A model of two layers with random parameters of a size at which its greedy text does not repeat one token."""
    model = ssm_jax.build(family, vocab_size=vocab_size, d_model=16, n_layers=2, **FIELDS[family])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = SCALES.get(family, 0.0) if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.4, leaf.shape), jnp.float32)

    return model, jax.tree.map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames=("model",))
def full_logits(model: LanguageModel, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of one pass over whole sequences, padding rows of the vocabulary included."""
    return model.apply({"params": params}, tokens)[0]
