"""The loss of a batch, as a sum and a weight, so that parts of a batch add up."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from ssm_jax.models import LanguageModel
from ssm_jax.ops import linear_cross_entropy
from ssm_jax.typing import Key, Params

Batch = Mapping[str, jax.Array]
"""tokens, targets, positions int32 and weights float32, all [B, L]."""


def next_token_loss(
    model: LanguageModel, params: Params, batch: Batch, dropout_key: Key | None = None, batch_shards: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of w_t * -log p(target_t | tokens up to t), sum of w_t), float32; nothing of size [B, L, V] is held at once.

    Without ``dropout_key`` the model is deterministic. ``batch_shards``: over how many devices the lanes are split.
    """
    features_BLD, _ = model.apply(
        {"params": params},
        batch["tokens"],
        positions=batch["positions"],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="features",
    )
    return linear_cross_entropy(
        features_BLD, model.readout(params), batch["targets"], batch["weights"], batch_shards=batch_shards
    )
