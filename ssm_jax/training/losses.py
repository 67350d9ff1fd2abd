"""The loss of a batch, as a sum and a weight, so that parts of a batch add up."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from ssm_jax import optim
from ssm_jax.models import LanguageModel
from ssm_jax.ops import linear_cross_entropy
from ssm_jax.typing import Activations, Key, Params

Batch = Mapping[str, jax.Array]
"""tokens, targets, positions int32 and weights float32, all [B, L]; without positions a row is one document."""

Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""(weighted sum, weight) of "loss", which is minimised, and of whatever else is of interest; float32, they add up over batches."""

Objective = Callable[[Params, Params, Batch, Key, Int[Array, ""]], tuple[Sums, Params]]
"""``(trainable, frozen, batch, dropout key, number of the microbatch in the run) -> (sums, gradient)``, the gradient being that of
the sum of "loss" with respect to ``trainable``."""


def next_token_objective(model: LanguageModel, batch_shards: int = 1) -> Objective:
    """``next_token_loss`` and nothing else."""

    def loss_sum(
        trainable: Params, frozen: Params, batch: Batch, key: Key, index: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Sums]:
        del index
        loss, weight = next_token_loss(model, optim.merge(trainable, frozen), batch, key, batch_shards)
        return loss, {"loss": (loss, weight)}

    return with_gradient(loss_sum)


def with_gradient(loss_sum: Callable[..., tuple[Array, Sums]]) -> Callable[..., tuple[Sums, Params]]:
    """``(sums, gradient of the first result with respect to the first argument)`` of ``loss_sum``, which returns (loss, sums)."""
    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)

    def sums_and_gradient(*arguments: Any) -> tuple[Sums, Params]:
        (_, sums), gradient = value_and_grad(*arguments)
        return sums, gradient

    return sums_and_gradient


def next_token_loss(
    model: LanguageModel, params: Params, batch: Batch, dropout_key: Key | None = None, batch_shards: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of w_t * -log p(target_t | tokens up to t), sum of w_t), float32; nothing of size [B, L, V] is held at once.

    Without ``dropout_key`` the model is deterministic. ``batch_shards``: over how many devices the lanes are split.
    """
    return linear_cross_entropy(
        features(model, params, batch, dropout_key),
        model.readout(params),
        batch["targets"],
        batch["weights"],
        batch_shards=batch_shards,
    )


def seen(row: Mapping[str, Any], joined: bool) -> dict[str, Any]:
    """What the model sees of rows: without their positions where documents are joined, so that each row is one document."""
    return {name: value for name, value in row.items() if not (joined and name == "positions")}


def features(model: LanguageModel, params: Params, batch: Batch, dropout_key: Key | None = None) -> Activations:
    """Final hidden states of a batch, every row from a fresh state."""
    features_BLD, _ = model.apply(
        {"params": params},
        batch["tokens"],
        positions=batch.get("positions"),
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="features",
    )
    return features_BLD
