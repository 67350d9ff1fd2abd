"""What a new model predicts: nothing yet, so that its loss is that of a uniform guess."""

import jax
import jax.numpy as jnp
import pytest

import ssm_jax
from tests.optim.relora.test_intercept import MODELS


@pytest.mark.parametrize("family", ["gss", "baka"])
def test_a_tied_head_begins_with_logits_of_order_one(family: str) -> None:
    """In the families whose tables begin with a deviation of 1 where they are no heads."""
    fields = {**MODELS[family], "vocab_size": 300, "d_model": 64, "n_layers": 1, "tie_embeddings": True}
    model = ssm_jax.build(family, **fields)
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 300)
    logits = jax.jit(lambda key: model.apply(model.init(key, tokens), tokens)[0])(jax.random.key(1))
    assert float(jnp.std(logits[..., :300])) < 3
