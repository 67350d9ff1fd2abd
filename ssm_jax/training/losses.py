"""The loss of a batch, as a sum and a weight, so that parts of a batch add up."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from ssm_jax import optim
from ssm_jax.models import LanguageModel
from ssm_jax.ops import linear_cross_entropy
from ssm_jax.optim.relora import Wrapped
from ssm_jax.training.carry import going_on
from ssm_jax.typing import Activations, Key, Params, PyTree

AppliedModel = LanguageModel | Wrapped
"""A model, or one with low-rank paths, whose parameters hold these beside the kernels."""

Batch = Mapping[str, jax.Array]
"""tokens, targets, positions int32 and weights float32, all [B, L]; without positions a row is one document."""

Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""(weighted sum, weight) of "loss", which is minimised, and of whatever else is of interest; float32, they add up over batches."""

Objective = Callable[[Params, Params, Batch, Key, Int[Array, ""], PyTree], tuple[Sums, Params, PyTree]]
"""``(trainable, frozen, batch, dropout key, number of the microbatch in the run, carry) -> (sums, gradient, carry)``, the gradient
being that of the sum of "loss" with respect to ``trainable``. ``carry``: the recurrent state before and after the batch, a
constant; None where every row begins with an empty one."""


def next_token_objective(model: AppliedModel, batch_shards: int = 1) -> Objective:
    """``next_token_loss`` and nothing else."""

    def loss_sum(
        trainable: Params, frozen: Params, batch: Batch, key: Key, index: Int[Array, ""], carry: PyTree = None
    ) -> tuple[Float[Array, ""], tuple[Sums, PyTree]]:
        del index
        params = optim.merge(trainable, frozen)
        (loss, weight), carry = next_token_loss(model, params, batch, key, batch_shards, carry)
        return loss, ({"loss": (loss, weight)}, carry)

    return with_gradient(loss_sum)


def with_gradient(
    loss_sum: Callable[..., tuple[Array, tuple[Sums, PyTree]]],
) -> Callable[..., tuple[Sums, Params, PyTree]]:
    """``(sums, gradient of the first result with respect to the first argument, carry)`` of ``loss_sum``, which returns
    (loss, (sums, carry))."""
    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)

    def sums_and_gradient(*arguments: Any) -> tuple[Sums, Params, PyTree]:
        (_, (sums, carry)), gradient = value_and_grad(*arguments)
        return sums, gradient, carry

    return sums_and_gradient


def next_token_loss(
    model: AppliedModel,
    params: Params,
    batch: Batch,
    dropout_key: Key | None = None,
    batch_shards: int = 1,
    carry: PyTree = None,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], PyTree]:
    """(sum of w_t * -log p(target_t | tokens up to t), sum of w_t), float32, and the carry; see ``features``. Nothing of size
    [B, L, V] is held at once.

    Without ``dropout_key`` the model is deterministic. ``batch_shards``: over how many devices the lanes are split.
    """
    features_BLD, carry = features(model, params, batch, dropout_key, carry)
    sums = linear_cross_entropy(
        features_BLD, model.readout(params), batch["targets"], batch["weights"], batch_shards=batch_shards
    )
    return sums, carry


def seen(row: Mapping[str, Any], joined: bool) -> dict[str, Any]:
    """What the model sees of rows: without their positions where documents are joined, so that each row is one document."""
    return {name: value for name, value in row.items() if not (joined and name == "positions")}


def features(
    model: AppliedModel, params: Params, batch: Batch, dropout_key: Key | None = None, carry: PyTree = None
) -> tuple[Activations, PyTree]:
    """Final hidden states of a batch, and the state of every row after it where a ``carry`` is given that rows go on from. Without
    one every row begins with an empty state, and None is returned."""
    positions = batch.get("positions")
    if carry is not None and positions is not None:
        positions = going_on(positions, carry.position)
    features_BLD, state = model.apply(
        {"params": params},
        batch["tokens"],
        state=carry,
        positions=positions,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="features",
    )
    return features_BLD, None if carry is None else state
