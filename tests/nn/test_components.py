"""Baka's parts in models that are not Baka, as the README puts them together."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ssm_jax.nn.chunk_layer import ChunkLayer
from ssm_jax.nn.chunked import ChunkedStack, ChunkUnit
from ssm_jax.nn.mixers.chunk_attention import ChunkAttention
from ssm_jax.nn.mixers.retention import Retention
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.slots import ChunkShape


def test_memory_and_pauses_around_retention_carry_what_was_read() -> None:
    """Whole = in two calls, and a token of the first chunk reaches the third, where the attention of one layer does not see it."""
    shape = ChunkShape(n_ctx=8, pauses=2, memory=2, close_calls=False)
    layer = ChunkLayer(
        norm=nn.RMSNorm(),
        mixer=ChunkAttention(heads=2, head_dim=8, value_dim=8, places=shape.places),
        mlp=MLP(width=32, activation="elephant", gated=True),
        mamba_norm=nn.RMSNorm(),
        mamba=Retention(heads=2, key_dim=8, value_dim=8),
    )
    stack = ChunkedStack(shape=shape, units=ChunkUnit((layer,)), rest=None, repeats=1, width=16)
    x = jax.random.normal(jax.random.key(0), (1, 24, 16))
    params = jax.jit(stack.init)(jax.random.key(1), x)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return stack.apply(params, x)[0]

    whole = run(x)
    first, state = jax.jit(stack.apply)(params, x[:, :13])
    second, _ = jax.jit(stack.apply)(params, x[:, 13:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=2e-5)
    changed = run(x.at[:, 3].add(1.0)) - whole
    assert float(jnp.abs(changed[:, :3]).max()) == 0
    assert float(jnp.abs(changed[:, 16:]).max()) > 1e-4
