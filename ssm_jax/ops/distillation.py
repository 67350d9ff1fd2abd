"""Knowledge distillation: a student's next-token distribution drawn towards a teacher's.

For student logits s, teacher logits t and a temperature T, with p = softmax(t / T) and q = softmax(s / T),

    loss = T^2 KL(p || q) = T^2 sum_v p_v (log p_v - log q_v),   d loss / ds = T (q - p).

The gradient of KL alone shrinks as 1 / T^2: once for s / T, and once more because softened distributions differ less. Times T^2 it
keeps its size, so that the learning rate and the weight beside a cross entropy mean the same at every temperature (Hinton, Vinyals
and Dean 2015, Distilling the Knowledge in a Neural Network, section 2).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.ops.linear_loss import finite_where_ignored, linear_loss, logits_of, tokens_per_chunk

Scalar = Float[Array, ""]


def linear_distillation(
    features_BLD: Float[Array, "B L D"],
    readout_DV: Float[Array, "D V"],
    teacher_features_BLM: Float[Array, "B L M"],
    teacher_readout_MW: Float[Array, "M W"],
    weights_BL: Float[Array, "B L"],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    batch_shards: int = 1,
) -> tuple[Scalar, Scalar]:
    """Sum over tokens of weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)), and the sum of the weights, both float32.

    student = features @ readout and teacher = teacher_features @ teacher_readout are never held for more than a chunk of tokens;
    types, sharding, ``chunk_size`` and ``batch_shards`` are as in ``linear_cross_entropy``. The widths D and M are free. The
    teacher has no gradient.

    Where the weight is 0, features of both sides may be anything, NaN included.

    Args:
        temperature: T, above 0; larger ones bring out the teacher's unlikely tokens.
        vocab_size: rows of both tables that are tokens; the rows after them, which fill a table up, have no probability on either
            side, and the tables may have different numbers of them. None: all rows, of which both have the same number.

    Returns:
        The weighted sum of losses, and the sum of the weights, both float32.

    Raises:
        ValueError: a temperature that is not above 0; tables without ``vocab_size`` rows, or of different sizes without it.
    """
    rows, teacher_rows = readout_DV.shape[1], teacher_readout_MW.shape[1]
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if vocab_size is None and rows != teacher_rows:
        raise ValueError(
            f"the tables have {rows} and {teacher_rows} rows; give vocab_size, how many of them are tokens"
        )
    vocab_size = rows if vocab_size is None else vocab_size
    if not 0 < vocab_size <= min(rows, teacher_rows):
        raise ValueError(
            f"vocab_size is {vocab_size}; the tables have {rows} and {teacher_rows} rows, so it must lie within"
        )
    # Only the teacher's table is cut or filled up to fit: the student's gradient keeps its shape and sharding.
    fitted_MV = jnp.pad(teacher_readout_MW[:, :rows], ((0, 0), (0, max(0, rows - teacher_rows))))
    total = linear_loss(
        functools.partial(_loss_and_gradient, temperature, vocab_size),
        finite_where_ignored(features_BLD, weights_BL),
        readout_DV,
        finite_where_ignored(teacher_features_BLM, weights_BL),
        fitted_MV.astype(teacher_features_BLM.dtype),
        weights_BL,
        chunk_size=tokens_per_chunk(chunk_size, features_BLD, batch_shards),
        batch_shards=batch_shards,
    )
    return total, jnp.sum(weights_BL, dtype=jnp.float32)


def _loss_and_gradient(
    temperature: float,
    vocab_size: int,
    logits: Float[Array, "*tokens V"],
    teacher_features: Float[Array, "*tokens M"],
    teacher_readout: Float[Array, "M V"],
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens V"]]:
    is_token = jnp.arange(logits.shape[-1]) < vocab_size

    def log_probabilities(logits: Array) -> Array:
        return jax.nn.log_softmax(jnp.where(is_token, logits / temperature, -jnp.inf), axis=-1)

    log_q = log_probabilities(logits)
    log_p = log_probabilities(logits_of(teacher_features, teacher_readout))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kl = jnp.sum(jnp.where(is_token, p * (log_p - log_q), 0), axis=-1)
    return temperature**2 * kl, temperature * (q - p)
