"""Loss on held-out rows while training."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax

from ssm_jax import distributed, optim, sharding
from ssm_jax.data.mixture import Mixture
from ssm_jax.data.packing import Row
from ssm_jax.data.pipeline import evaluation_batches
from ssm_jax.data.shards import PackedDataset
from ssm_jax.training import carry as carry_lib
from ssm_jax.training.lanes import held_out_rows
from ssm_jax.training.losses import AppliedModel, next_token_loss, seen
from ssm_jax.training.run import Run
from ssm_jax.typing import Params, PyTree

Scores = dict[str, float]


def make_evaluation(run: Run, model: AppliedModel) -> Callable[[Params, Params], Scores] | None:
    """``evaluate(trainable, frozen)`` of ``model``, the run's as it is applied, over the first ``eval.batches`` microbatches of
    each validation split, in stored order.

    A run that reads in lanes reads the held-out articles in lanes too, and carries their state if it carries it in training.

    None if there is no validation split.
    """
    config, data = run.config, run.held_out
    if data is None:
        return None

    size = config.batch.size // config.batch.microbatches
    replicated = sharding.replicated(run.mesh)
    empty = carry_lib.empty_on(run.model, size, run.mesh) if config.train.carry_state else None
    places = jax.tree.map(lambda leaf: leaf.sharding, empty)

    @functools.partial(jax.jit, out_shardings=((replicated, replicated), places))
    def sums(
        trainable: Params, frozen: Params, batch: dict[str, jax.Array], carry: PyTree
    ) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
        return next_token_loss(model, optim.merge(trainable, frozen), batch, carry=carry)

    def rows_of(dataset: PackedDataset) -> Iterator[Row]:
        if run.lanes is not None:
            return held_out_rows(run.lanes, config)
        rows = evaluation_batches(
            dataset,
            batch_size=size,
            process_index=distributed.process_index(),
            process_count=distributed.process_count(),
        )
        return (seen(row, config.data.joined) for row in rows)

    def of_dataset(trainable: Params, frozen: Params, dataset: PackedDataset) -> tuple[float, float]:
        parts, carry = [], empty
        for row in itertools.islice(rows_of(dataset), config.eval.batches):
            batch = sharding.put_batch(row, run.mesh)
            with jax.set_mesh(run.mesh):  # As in training: kernels divide their work over it.
                part, carry = sums(trainable, frozen, batch, carry)
            parts.append(part)
        loss_sum, weight = (math.fsum(float(value) for value in column) for column in zip(*parts, strict=True))
        return loss_sum, weight

    names = [dataset.path.name for dataset in data.datasets]
    names = [name if names.count(name) == 1 else str(d.path) for name, d in zip(names, data.datasets, strict=True)]

    def evaluate(trainable: Params, frozen: Params) -> Scores:
        each = [of_dataset(trainable, frozen, dataset) for dataset in data.datasets]
        found = scores(each, data)
        if len(each) > 1:
            found |= {f"eval/{name}/loss": loss / weight for name, (loss, weight) in zip(names, each, strict=True)}
        return found

    return evaluate


def scores(sums: Sequence[tuple[float, float]], data: Mixture) -> Scores:
    """Mean loss per target in nats, perplexity, and bits per byte of text, over all corpora, from (loss, weight) of each.

    Every target counts, end marks included. The bytes that a corpus's targets stand for are their share of its text.
    """
    total = math.fsum(loss for loss, _ in sums)
    loss = total / math.fsum(weight for _, weight in sums)
    splits = [dataset.split for dataset in data.datasets]
    size = math.fsum(weight * split.text_bytes / split.targets for (_, weight), split in zip(sums, splits, strict=True))
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": total / math.log(2) / size,
    }
