"""Next-token cross entropy, and the form of it that never holds the logits of a whole batch.

For logits l and the log-normaliser z = log sum_v exp(l_v),

    nll = z - l_target,   d nll / dl = softmax(l) - onehot(target).

``linear_cross_entropy`` takes the tokens of logits = features @ readout in chunks, see ``ssm_jax.ops.linear_loss``.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssm_jax.ops.linear_loss import finite_where_ignored, linear_loss, token_losses, tokens_per_chunk, weighted_sum
from ssm_jax.typing import Tokens

Scalar = Float[Array, ""]
Weights = Float[Array, "B L"]


def cross_entropy(
    logits_BLV: Float[Array, "B L V"], targets_BL: Tokens, weights_BL: Weights, *, z_loss: float = 0.0
) -> tuple[Scalar, Scalar]:
    """Sum over tokens of weight * (nll + z_loss * z^2), and the sum of the weights, both float32.

    Where the weight is 0, target and logits may be anything, NaN included.
    """
    loss_BL, _ = _token_loss(finite_where_ignored(logits_BLV.astype(jnp.float32), weights_BL), targets_BL, z_loss)
    return weighted_sum(loss_BL, weights_BL), jnp.sum(weights_BL, dtype=jnp.float32)


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
        chunk_size: tokens of each row per chunk. None: about as many tokens per chunk and batch shard as
            features are wide, from 128 to 1,024.
        batch_shards: into how many parts the mesh cuts B. The gradient of readout is then summed within each of them, and over them
            once at the end rather than once per chunk. Divides B.
        z_loss: weight of the squared log-normaliser, which keeps logits from drifting.

    Returns:
        The weighted sum of losses, and the sum of the weights, both float32. Divide one by the other after summing over everything
        that belongs to the step.
    """
    total = linear_loss(
        functools.partial(_loss_and_gradient, z_loss),
        finite_where_ignored(features_BLD, weights_BL),
        readout_DV,
        targets_BL,
        (),
        weights_BL,
        chunk_size=tokens_per_chunk(chunk_size, features_BLD, batch_shards),
        batch_shards=batch_shards,
    )
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
    of_token = functools.partial(_loss_and_gradient, 0.0)
    return token_losses(of_token, features_BLD, readout_DV, targets_BL, (), tokens_per_chunk(chunk_size, features_BLD))


def _token_loss(
    logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], z_loss: float
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """nll + z_loss * z^2 of each token, and its z."""
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.sum(jnp.where(_is_target(targets, logits), logits, 0), axis=-1)
    return log_normaliser - target_logit + z_loss * jnp.square(log_normaliser), log_normaliser


def _loss_and_gradient(
    z_loss: float, logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], fixed: tuple[()]
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens V"]]:
    del fixed
    loss, log_normaliser = _token_loss(logits, targets, z_loss)
    softmax = jnp.exp(logits - log_normaliser[..., None])
    return loss, softmax * (1 + 2 * z_loss * log_normaliser)[..., None] - _is_target(targets, logits)


def _is_target(targets: Array, logits: Array) -> Array:
    """A comparison and not a gather: it stays local where the vocabulary is sharded."""
    return targets[..., None] == jnp.arange(logits.shape[-1])
