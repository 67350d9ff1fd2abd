"""Next-token cross entropy, and the form of it that never holds the logits of a whole batch.

The logits of a language model, [B, L, V] in float32, are usually its largest array. The loss needs one number per token of them,
and their gradient is known as soon as they are: for logits l = f W and the log-normaliser z = log sum_v exp(l_v),

    nll = z - l_target,   d nll / dl = softmax(l) - onehot(target),   df = dl W^T,   dW = f^T dl.

So ``linear_cross_entropy`` takes the tokens in chunks, and when it is differentiated it makes df and dW in that same pass: logits
are computed once, used, and dropped. (Computing them again in the backward pass costs a fourth matrix product: 1.4 times the time.)
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

    Where the weight is 0, target and logits may be anything, NaN included.
    """
    loss_BL, _ = _token_loss(_finite_where_ignored(logits_BLV.astype(jnp.float32), weights_BL), targets_BL, z_loss)
    return _weighted_sum(loss_BL, weights_BL), jnp.sum(weights_BL, dtype=jnp.float32)


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

    Logits are float32 sums of products in the features' dtype; the gradients of features and readout are summed in float32. Every
    chunk has its part of every row, so a sharded batch stays where it is, and readout may be sharded in either axis.

    Where the weight is 0, target and features may be anything, NaN included.

    Args:
        chunk_size: tokens of each row per chunk. None: about ``TOKENS_PER_CHUNK`` tokens per chunk and batch shard.
        batch_shards: into how many parts the mesh cuts B. The gradient of readout is then summed within each of them, and over them
            once at the end rather than once per chunk. Divides B.
        z_loss: weight of the squared log-normaliser, which keeps logits from drifting.

    Returns:
        The weighted sum of losses, and the sum of the weights, both float32. Divide one by the other after summing over everything
        that belongs to the step.
    """
    chunk_size = _chunk_size(chunk_size, targets_BL, batch_shards)
    features_BLD = _finite_where_ignored(features_BLD, weights_BL)
    total = _linear_loss((chunk_size, batch_shards, z_loss), features_BLD, readout_DV, targets_BL, weights_BL)
    return total, jnp.sum(weights_BL, dtype=jnp.float32)


def linear_token_nll(
    features_BLD: Float[Array, "B L D"],
    readout_DV: Float[Array, "D V"],
    targets_BL: Tokens,
    *,
    chunk_size: int | None = None,
) -> Float[Array, "B L"]:
    """-log softmax(features @ readout)[target] of each token, float32, holding the logits of one chunk at a time.

    For evaluation: its gradient would keep all logits.
    """
    return _linear_token_loss(_chunk_size(chunk_size, targets_BL, 1), 0.0, features_BLD, readout_DV, targets_BL)


def _finite_where_ignored(x: Array, weights: Array) -> Array:
    """Zero in place of what is not finite where the weight is 0: zero times NaN is NaN."""
    return jnp.where((weights == 0)[..., None] & ~jnp.isfinite(x), 0, x)


def _weighted_sum(loss: Array, weights: Array) -> Array:
    return jnp.sum(jnp.where((weights == 0) & ~jnp.isfinite(loss), 0, loss) * weights)


def _token_loss(
    logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], z_loss: float
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """nll + z_loss * z^2 of each token, and its z."""
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0), axis=-1)
    return log_normaliser - target_logit + z_loss * jnp.square(log_normaliser), log_normaliser


def _is_target(targets: Array, logits: Array) -> Array:
    """A comparison and not a gather: it stays local where the vocabulary is sharded."""
    return targets[..., None] == jnp.arange(logits.shape[-1])


def _logits(features: Array, readout: Array) -> Array:
    return jnp.dot(features, readout.astype(features.dtype), preferred_element_type=jnp.float32)


def _chunk_size(chunk_size: int | None, targets: Array, batch_shards: int) -> int:
    """At most what was asked for, and evened out over the chunks that makes."""
    batch, length = targets.shape
    chunk_size = chunk_size or max(1, TOKENS_PER_CHUNK * batch_shards // batch)
    chunks = -(-length // chunk_size)
    return -(-length // chunks)


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


def _linear_token_loss(chunk_size: int, z_loss: float, features: Array, readout: Array, targets: Array) -> Array:
    def of_chunk(chunk: tuple[Array, Array]) -> Array:
        features, targets = chunk
        return _token_loss(_logits(features, readout), targets, z_loss)[0]

    loss = lax.map(of_chunk, (_split(features, chunk_size), _split(targets, chunk_size)))
    return _join(loss, targets.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_loss(
    static: tuple[int, int, float], features: Array, readout: Array, targets: Array, weights: Array
) -> Array:
    chunk_size, _, z_loss = static
    return _weighted_sum(_linear_token_loss(chunk_size, z_loss, features, readout, targets), weights)


def _forward(
    static: tuple[int, int, float], features: Array, readout: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    chunk_size, shards, z_loss = static
    dtype = features.dtype
    low_readout = readout.astype(dtype)

    def step(d_readout: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        features, targets, weights = chunk
        logits = _logits(features, low_readout)
        loss, log_normaliser = _token_loss(logits, targets, z_loss)
        softmax = jnp.exp(logits - log_normaliser[..., None])
        d_logits = softmax * (1 + 2 * z_loss * log_normaliser)[..., None] - _is_target(targets, logits)
        d_logits = jnp.where((weights == 0)[..., None], 0, d_logits * weights[..., None]).astype(dtype)
        d_features = jnp.einsum("bcv,dv->bcd", d_logits, low_readout, preferred_element_type=jnp.float32)
        by_shard = (x.reshape(shards, -1, *x.shape[1:]) for x in (features, d_logits))
        d_readout += jnp.einsum("sbcd,sbcv->sdv", *by_shard, preferred_element_type=jnp.float32)
        return d_readout, (d_features.astype(dtype), loss)

    zeros = jnp.zeros((shards, *readout.shape), jnp.float32)
    chunks = (_split(features, chunk_size), _split(targets, chunk_size), _split(weights, chunk_size))
    d_readout, (d_features, loss) = lax.scan(step, zeros, chunks)
    d_features, loss = (_join(x, targets.shape[1]) for x in (d_features, loss))
    d_readout, d_weights = jnp.sum(d_readout, axis=0).astype(readout.dtype), loss.astype(weights.dtype)
    return _weighted_sum(loss, weights), (d_features, d_readout, d_weights)


def _backward(
    static: tuple[int, int, float], residuals: tuple[Array, Array, Array], d_total: Array
) -> tuple[Array, Array, None, Array]:
    del static
    d_features, d_readout, d_weights = ((x * d_total).astype(x.dtype) for x in residuals)
    return d_features, d_readout, None, d_weights


_linear_loss.defvjp(_forward, _backward)
