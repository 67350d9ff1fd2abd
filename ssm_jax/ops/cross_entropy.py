"""Next-token cross entropy, and the form of it that never holds the logits of a whole batch.

The logits of a language model, [B, L, V] in float32, are usually its largest array. The loss needs one number per token of them,
and their gradient is known as soon as they are: for logits l = f W and the log-normaliser z = log sum_v exp(l_v),

    nll = z - l_target,   d nll / dl = softmax(l) - onehot(target),   df = dl W^T,   dW = f^T dl.

So ``linear_cross_entropy`` walks along the sequence in chunks, and when it is differentiated it makes df and dW in that same walk:
logits are computed once, used, and dropped.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ssm_jax.typing import Tokens

Scalar = Float[Array, ""]
Weights = Float[Array, "B L"]

TOKENS_PER_CHUNK = 1024


def cross_entropy(
    logits_BLV: Float[Array, "B L V"], targets_BL: Tokens, weights_BL: Weights, *, z_loss: float = 0.0
) -> tuple[Scalar, Scalar]:
    """Sum over tokens of weight * (nll + z_loss * z^2), and the sum of the weights, both float32.

    A target may be any id in range where its weight is 0.
    """
    nll_BL = _token_loss(logits_BLV.astype(jnp.float32), targets_BL, z_loss)
    return _weighted_sum(nll_BL, weights_BL), jnp.sum(weights_BL, dtype=jnp.float32)


def linear_cross_entropy(
    features_BLD: Float[Array, "B L D"],
    readout_DV: Float[Array, "D V"],
    targets_BL: Tokens,
    weights_BL: Weights,
    *,
    chunk_size: int | None = None,
    batch_shards: int = 1,
    z_loss: float = 0.0,
) -> tuple[Scalar, Scalar]:
    """``cross_entropy(features @ readout, targets, weights)`` without ever holding the logits of more than a chunk.

    Logits are float32 sums of products in the features' dtype; the gradients of features and readout are summed in float32. The
    sequence is cut along L, so a sharded batch stays where it is, and readout may be sharded in either axis.

    Args:
        chunk_size: tokens of each row per chunk. None: about ``TOKENS_PER_CHUNK`` tokens per chunk and batch shard.
        batch_shards: over how many devices the batch is sharded. The gradient of readout is then summed on each of them and reduced
            once, not once per chunk.
        z_loss: weight of the squared log-normaliser, which keeps logits from drifting.

    Returns:
        The weighted sum of losses, and the sum of the weights, both float32. Divide one by the other after summing over everything
        that belongs to the step.
    """
    chunk_size = _chunk_size(chunk_size, targets_BL, batch_shards)
    total = _linear_loss((chunk_size, batch_shards, z_loss), features_BLD, readout_DV, targets_BL, weights_BL)
    return total, jnp.sum(weights_BL, dtype=jnp.float32)


def linear_token_nll(
    features_BLD: Float[Array, "B L D"],
    readout_DV: Float[Array, "D V"],
    targets_BL: Tokens,
    *,
    chunk_size: int | None = None,
) -> Float[Array, "B L"]:
    """-log softmax(features @ readout)[target] of each token, float32, holding the logits of one chunk at a time."""
    chunk_size = _chunk_size(chunk_size, targets_BL, 1)
    length = targets_BL.shape[1]

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        features, targets = chunk
        return None, _token_loss(_logits(features, readout_DV), targets, 0.0)

    _, nll = lax.scan(step, None, (_split(features_BLD, chunk_size), _split(targets_BL, chunk_size)))
    return _join(nll, length)


def _token_loss(logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], z_loss: float) -> Array:
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.sum(jnp.where(_is_target(targets, logits.shape[-1]), logits, 0), axis=-1)
    return log_normaliser - target_logit + z_loss * jnp.square(log_normaliser)


def _is_target(targets: Array, vocab_size: int) -> Array:
    """A comparison and not a gather: it stays local where the vocabulary is sharded."""
    return targets[..., None] == jnp.arange(vocab_size)


def _weighted_sum(loss: Array, weights: Array) -> Array:
    return jnp.sum(jnp.where(weights == 0, 0, loss * weights), dtype=jnp.float32)


def _logits(features: Array, readout: Array) -> Array:
    return jnp.dot(features, readout.astype(features.dtype), preferred_element_type=jnp.float32)


def _chunk_size(chunk_size: int | None, targets: Array, batch_shards: int) -> int:
    """At most what was asked for, and evened out over the chunks that makes."""
    batch, length = targets.shape
    chunk_size = chunk_size or max(1, TOKENS_PER_CHUNK * batch_shards // batch)
    chunks = -(-length // chunk_size)
    return -(-length // chunks)


def _split(x_BL: Array, chunk_size: int) -> Array:
    """[B, L, ...] -> [chunks, B, chunk_size, ...], filled with zeros."""
    batch, length, *rest = x_BL.shape
    chunks = -(-length // chunk_size)
    padded = jnp.pad(x_BL, [(0, 0), (0, chunks * chunk_size - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(padded.reshape(batch, chunks, chunk_size, *rest), 1, 0)


def _join(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_loss(
    static: tuple[int, int, float], features: Array, readout: Array, targets: Array, weights: Array
) -> Array:
    chunk_size, _, z_loss = static

    def step(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        features, targets, weights = chunk
        return total + _weighted_sum(_token_loss(_logits(features, readout), targets, z_loss), weights), None

    chunks = tuple(_split(x, chunk_size) for x in (features, targets, weights))
    total, _ = lax.scan(step, jnp.zeros((), jnp.float32), chunks)
    return total


def _forward(
    static: tuple[int, int, float], features: Array, readout: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, ...]]:
    chunk_size, shards, z_loss = static
    length, (width, vocab_size) = features.shape[1], readout.shape

    def step(
        carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        total, d_readout = carry
        features, targets, weights = chunk
        logits = _logits(features, readout)
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        is_target = _is_target(targets, vocab_size)
        loss = log_normaliser - jnp.sum(jnp.where(is_target, logits, 0), axis=-1) + z_loss * jnp.square(log_normaliser)
        softmax = jnp.exp(logits - log_normaliser[..., None])
        d_logits = softmax * (1 + 2 * z_loss * log_normaliser)[..., None] - is_target
        d_logits = (d_logits * weights[..., None]).astype(features.dtype)
        d_features = jnp.dot(d_logits, readout.astype(features.dtype).T, preferred_element_type=jnp.float32)
        by_shard = (x.reshape(shards, -1, x.shape[-1]) for x in (features, d_logits))
        d_readout += jnp.einsum("std,stv->sdv", *by_shard, preferred_element_type=jnp.float32)
        return (total + _weighted_sum(loss, weights), d_readout), (d_features.astype(features.dtype), loss)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros((shards, width, vocab_size), jnp.float32)
    chunks = tuple(_split(x, chunk_size) for x in (features, targets, weights))
    (total, d_readout), (d_features, loss) = lax.scan(step, zeros, chunks)
    d_readout = jnp.sum(d_readout, axis=0).astype(readout.dtype)
    return total, (_join(d_features, length), d_readout, _join(loss, length).astype(weights.dtype))


def _backward(static: tuple[int, int, float], residuals: tuple[Array, ...], d_total: Array) -> tuple[Array | None, ...]:
    d_features, d_readout, d_weights = (x * d_total.astype(x.dtype) for x in residuals)
    return d_features, d_readout, None, d_weights


_linear_loss.defvjp(_forward, _backward)
