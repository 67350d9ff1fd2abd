"""Loss on held-out rows while training."""

import itertools
import math
from collections.abc import Callable

import jax

from ssm_jax import distributed, optim, sharding
from ssm_jax.data.pipeline import evaluation_batches
from ssm_jax.data.shards import PackedDataset
from ssm_jax.training.losses import next_token_loss
from ssm_jax.training.run import Run
from ssm_jax.typing import Params

Scores = dict[str, float]


def make_evaluation(run: Run) -> Callable[[Params, Params], Scores] | None:
    """``evaluate(trainable, frozen)`` over the first ``eval.batches`` microbatches of the validation split, in stored order.

    None if there is no validation split.
    """
    config, data = run.config, run.held_out
    if data is None:
        return None

    @jax.jit
    def sums(trainable: Params, frozen: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(run.model, optim.merge(trainable, frozen), batch)

    def evaluate(trainable: Params, frozen: Params) -> Scores:
        rows = evaluation_batches(
            data,
            batch_size=config.batch.size // config.batch.microbatches,
            process_index=distributed.process_index(),
            process_count=distributed.process_count(),
        )
        parts = [
            sums(trainable, frozen, sharding.put_batch(row, run.mesh))
            for row in itertools.islice(rows, config.eval.batches)
        ]
        loss_sum, weight = (math.fsum(float(value) for value in column) for column in zip(*parts, strict=True))
        return scores(loss_sum, weight, data)

    return evaluate


def scores(loss_sum: float, weight: float, data: PackedDataset) -> Scores:
    """Mean loss per target in nats, perplexity, and bits per byte of text.

    Every target counts, end marks included: bits per byte = loss / ln 2 * targets of the split / bytes of its text.
    """
    loss = loss_sum / weight
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": loss / math.log(2) * data.split.targets / data.split.text_bytes,
    }
