"""Losses of logits = features @ readout, computed without ever holding the logits of a whole batch.

The logits of a language model, [B, L, V] in float32, are usually its largest array. A loss needs one number per token of them,
and their gradient dl is known as soon as they are; df = dl W^T, dW = f^T dl. So the tokens are taken in chunks, and when the loss
is differentiated df and dW are made in that same pass: logits are computed once, used, and dropped. (Computing them again in the
backward pass costs a fourth matrix product: 1.4 times the time.)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ssm_jax.typing import PyTree

FEWEST, MOST = 128, 1024
"""Tokens per chunk."""

TokenLoss = Callable[[Array, PyTree, PyTree], tuple[Array, Array]]
"""``(logits [*tokens, V] float32, per_token, fixed) -> (loss [*tokens], d loss / d logits [*tokens, V])``, both float32."""


def linear_loss(
    token_loss: TokenLoss,
    features_BLD: Float[Array, "B L D"],
    readout_DV: Float[Array, "D V"],
    per_token: PyTree,
    fixed: PyTree,
    weights_BL: Float[Array, "B L"],
    *,
    chunk_size: int,
    batch_shards: int = 1,
) -> Float[Array, ""]:
    """Sum over tokens of weight * ``token_loss(features @ readout, per_token, fixed)``, float32.

    Logits are float32 sums of products in the features' dtype; the gradients of features and readout are summed in float32. Every
    chunk has its part of every row, so a sharded batch stays where it is, and readout may be sharded in either axis.

    Args:
        per_token: arrays [B, L, ...] of which each chunk takes its part, and fixed: arrays that it takes whole. Neither has a
            gradient.
        chunk_size: tokens of each row per chunk, see ``tokens_per_chunk``.
        batch_shards: into how many parts the mesh cuts B. The gradient of readout is then summed within each of them, and over them
            once at the end rather than once per chunk. Divides B.
    """
    return _linear_loss((token_loss, chunk_size, batch_shards), features_BLD, readout_DV, per_token, fixed, weights_BL)


def token_losses(
    token_loss: TokenLoss,
    features_BLD: Float[Array, "B L D"],
    readout_DV: Float[Array, "D V"],
    per_token: PyTree,
    fixed: PyTree,
    chunk_size: int,
) -> Float[Array, "B L"]:
    """The loss of each token. Its gradient would keep all logits."""

    def of_chunk(chunk: tuple[Array, PyTree]) -> Array:
        features, per_token = chunk
        return token_loss(logits_of(features, readout_DV), per_token, fixed)[0]

    loss = lax.map(of_chunk, jax.tree.map(lambda x: _split(x, chunk_size), (features_BLD, per_token)))
    return _join(loss, features_BLD.shape[1])


def tokens_per_chunk(chunk_size: int | None, features_BLD: Float[Array, "B L D"], batch_shards: int = 1) -> int:
    """Tokens of each row per chunk: at most what was asked for, and evened out over the chunks that makes.

    None: about D tokens per chunk and batch shard, within ``FEWEST`` and ``MOST``. A chunk reads and writes the readout's gradient
    once, 8 D V bytes, and its logits several times, 4 V bytes per token: with D tokens the former is the lesser part, and more
    would only push the logits out of the caches (half the time at D = 128 and V = 50,257 on a CPU).
    """
    batch, length, width = features_BLD.shape
    chunk_size = chunk_size or max(1, min(max(width, FEWEST), MOST) * batch_shards // batch)
    chunks = -(-length // chunk_size)
    return -(-length // chunks)


def logits_of(features: Float[Array, "*tokens D"], readout: Float[Array, "D V"]) -> Float[Array, "*tokens V"]:
    """features @ readout: products in the features' dtype, sums in float32."""
    return jnp.dot(features, readout.astype(features.dtype), preferred_element_type=jnp.float32)


def finite_where_ignored(x: Float[Array, "B L V"], weights: Float[Array, "B L"]) -> Float[Array, "B L V"]:
    """Zero in place of what is not finite where the weight is 0: zero times NaN is NaN."""
    return jnp.where((weights == 0)[..., None] & ~jnp.isfinite(x), 0, x)


def weighted_sum(loss: Float[Array, "B L"], weights: Float[Array, "B L"]) -> Float[Array, ""]:
    """Sum of weight * loss, where a loss without weight may be anything."""
    return jnp.sum(jnp.where((weights == 0) & ~jnp.isfinite(loss), 0, loss) * weights)


def _split(x: Array, chunk_size: int) -> Array:
    """[B, L, ...] -> [chunks, B, chunk_size, ...], filled with zeros.

    Chunk i has the tokens i, i + chunks, ...: a part of every shard of the batch and of the length.
    """
    batch, length, *rest = x.shape
    chunks = -(-length // chunk_size)
    padded = jnp.pad(x, [(0, 0), (0, chunks * chunk_size - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(padded.reshape(batch, chunk_size, chunks, *rest), 2, 0)


def _join(x: Array, length: int) -> Array:
    """Undoes ``_split``."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


Static = tuple[TokenLoss, int, int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_loss(
    static: Static, features: Array, readout: Array, per_token: PyTree, fixed: PyTree, weights: Array
) -> Array:
    token_loss, chunk_size, _ = static
    return weighted_sum(token_losses(token_loss, features, readout, per_token, fixed, chunk_size), weights)


def _forward(
    static: Static, features: Array, readout: Array, per_token: PyTree, fixed: PyTree, weights: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    token_loss, chunk_size, shards = static
    dtype = features.dtype
    low_readout = readout.astype(dtype)

    def step(d_readout: Array, chunk: tuple[Array, PyTree, Array]) -> tuple[Array, tuple[Array, Array]]:
        features, per_token, weights = chunk
        loss, d_logits = token_loss(logits_of(features, low_readout), per_token, fixed)
        d_logits = jnp.where((weights == 0)[..., None], 0, d_logits * weights[..., None]).astype(dtype)
        d_features = jnp.einsum("bcv,dv->bcd", d_logits, low_readout, preferred_element_type=jnp.float32)
        by_shard = (x.reshape(shards, -1, *x.shape[1:]) for x in (features, d_logits))
        d_readout += jnp.einsum("sbcd,sbcv->sdv", *by_shard, preferred_element_type=jnp.float32)
        return d_readout, (d_features.astype(dtype), loss)

    zeros = jnp.zeros((shards, *readout.shape), jnp.float32)
    chunks = jax.tree.map(lambda x: _split(x, chunk_size), (features, per_token, weights))
    d_readout, (d_features, loss) = lax.scan(step, zeros, chunks)
    d_features, loss = (_join(x, features.shape[1]) for x in (d_features, loss))
    d_readout, d_weights = jnp.sum(d_readout, axis=0).astype(readout.dtype), loss.astype(weights.dtype)
    return weighted_sum(loss, weights), (d_features, d_readout, d_weights)


def _backward(
    static: Static, residuals: tuple[Array, Array, Array], d_total: Array
) -> tuple[Array, Array, None, None, Array]:
    del static
    d_features, d_readout, d_weights = ((x * d_total).astype(x.dtype) for x in residuals)
    return d_features, d_readout, None, None, d_weights


_linear_loss.defvjp(_forward, _backward)
