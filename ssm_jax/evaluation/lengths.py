"""Length generalisation: the loss of the same targets at every length of context, and by position at the longest.

From each document with at least S targets, S the longest length asked for, the first floor(targets / S) * S targets are taken, in
stretches of S. At length C a stretch is cut into S / C windows and each is read afresh; every target counts once at every C, with
0 to C - 1 tokens before its input token. So lengths differ in what the model sees and in nothing else, and their differences are
paired. A model whose context has a limit is evaluated up to it, over the same targets as one without.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Integer

from ssm_jax.data.pipeline import stored_documents
from ssm_jax.data.shards import PackedDataset
from ssm_jax.errors import DataError
from ssm_jax.evaluation.intervals import estimate, exp_or_none, finite_or_none, relative
from ssm_jax.evaluation.positions import by_position
from ssm_jax.evaluation.split import require_vocabulary
from ssm_jax.evaluation.windows import PIECE, cut_stretches, window_losses
from ssm_jax.models import LanguageModel, registry
from ssm_jax.typing import Params

FACTORS = tuple(2**i for i in range(7))
"""Of the training length, where no lengths are given."""
_MIN_DOCUMENTS = 5  # fewer say too little about the spread between documents; then stretches are the units


def context_limit(model: LanguageModel) -> int | None:
    """The longest context that a model can read at all; None where there is no such limit."""
    return registry.family_of(model.config).context_limit(model.config)


def parse_lengths(text: str) -> tuple[int, ...] | None:
    """``128,256,1024`` as numbers, None for ``auto``.

    Raises:
        DataError: not a list of positive whole numbers in ascending order, each of which divides the last.
    """
    if text == "auto":
        return None
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(
            f"Lengths {text!r} are not whole numbers with commas between them; write 128,256,512 or auto."
        ) from error
    _check_lengths(lengths)
    return lengths


def _check_lengths(lengths: Sequence[int]) -> None:
    shown = ",".join(map(str, lengths))
    if not lengths or lengths[0] < 1 or sorted(set(lengths)) != list(lengths):
        raise DataError(f"Lengths {shown} are not positive, ascending and different; write them like 128,256,512.")
    wrong = [length for length in lengths if lengths[-1] % length]
    if wrong:
        raise DataError(
            f"Length {wrong[0]} does not divide the longest, {lengths[-1]}, so not every window would be whole; choose lengths "
            "that divide it, like its halves."
        )


def evaluate_lengths(
    model: LanguageModel,
    params: Params,
    dataset: PackedDataset,
    lengths: Sequence[int] | None = None,
    *,
    training_length: int | None = None,
    batch_size: int = 16,
    piece: int = PIECE,
) -> dict[str, Any]:
    """Losses at every context length C, over the same targets of a split's long documents.

        loss(C) = mean over targets of -log p(target | the tokens of its window of C up to it)
        relative_perplexity(C) = exp(loss(C) - loss(shortest C))

    Intervals are Student's 95 % of the mean, over documents where at least five are long enough, else over stretches (which, of
    one document, are not independent: read them as too narrow); null where there is one unit.

    Args:
        lengths: ascending, each a divisor of the last; None: ``training_length`` times 1, 2, 4, ... 64, as far as documents reach.
        batch_size: windows of ``piece`` tokens at once, and as many more shorter ones as have their size. No result depends on it.
        piece: tokens of a window read at once. No result depends on it.

    Returns:
        stretch, stretches, documents, documents_left_out, targets, longest_document, interval_over, context_limit, training_length;
        lengths: per length its loss, standard error ``se``, perplexity, ``tail_loss`` (of the targets in the second halves of its
        windows: other targets than the shortest length's tail), relative_perplexity and relative_interval; left_out: lengths
        that were not evaluated, and why; by_position: see ``by_position``. What is not finite is None.

    Raises:
        DataError: lengths that cannot be used, no document long enough, a model whose context is shorter than every length, token
            ids that the model does not have.
    """
    if lengths is None and not training_length:
        raise DataError("The length of the training rows is not known, so there is no 'auto'; name the lengths.")
    asked = list(lengths) if lengths is not None else [factor * (training_length or 0) for factor in FACTORS]
    _check_lengths(asked)
    require_vocabulary(model, dataset)
    documents = list(stored_documents(dataset))
    longest = max((len(document) - 1 for document in documents), default=0)
    needed = asked[0] if lengths is None else asked[-1]
    if longest < needed:
        raise DataError(
            f"No document of the {dataset.name} split of {dataset.path} has {needed:,} targets (the longest has {longest:,}); "
            "choose shorter lengths, or data with longer documents."
        )
    reached = [length for length in asked if length <= longest]
    limit = context_limit(model)
    readable = [length for length in reached if limit is None or length <= limit]
    if not readable:
        raise DataError(
            f"The model's context ends at {limit} tokens, below the shortest length, {reached[0]}; add a shorter length."
        )
    stretches, origins = cut_stretches(documents, reached[-1])
    count = len(set(origins.tolist()))
    over_documents = count >= _MIN_DOCUMENTS
    units = origins if over_documents else np.arange(len(origins))
    piece = piece if limit is None else limit  # with a limit a window is one call: such a state need not go on
    found, folded = _losses(model, params, stretches, readable, units, batch_size, piece)
    reasons = [(length, "no document is that long") for length in asked if length not in reached]
    reasons += [(length, "beyond the model's context") for length in reached if length not in readable]
    return {
        "training_length": training_length,
        "stretch": reached[-1],
        "stretches": len(stretches),
        "documents": count,
        "documents_left_out": len(documents) - count,
        "targets": stretches.shape[0] * reached[-1],
        "longest_document": longest,
        "interval_over": "documents" if over_documents else "stretches",
        "context_limit": limit,
        "left_out": [{"length": length, "reason": reason} for length, reason in sorted(reasons)],
        "lengths": found,
        "by_position": by_position(*folded, reached[-1] // readable[-1], readable[0], units),
    }


def _losses(
    model: LanguageModel,
    params: Params,
    stretches: Int32[np.ndarray, "n m"],
    lengths: Sequence[int],
    units: Integer[np.ndarray, "n"],
    batch_size: int,
    piece: int,
) -> tuple[list[dict[str, Any]], tuple[Float64[np.ndarray, "n C"], Float64[np.ndarray, "n C"]]]:
    """The scores of every length; the losses of the longest and of the shortest, summed over the longest's windows of a stretch."""
    n, size = len(stretches), stretches.shape[1] - 1
    whole, rows, folded, totals = np.full(n, float(size)), [], [], []
    for length in lengths:
        losses = window_losses(model, params, stretches, length, batch_size, piece).astype(np.float64)
        sums = losses.sum(axis=1)
        totals.append(sums)
        if length in (lengths[0], lengths[-1]):
            folded.append(losses.reshape(n, -1, lengths[-1]).sum(axis=1))
        tail = losses.reshape(n, -1, length)[:, :, length // 2 :]
        with np.errstate(invalid="ignore"):
            difference = estimate(sums - totals[0], whole, units)
        loss = estimate(sums, whole, units)
        rows.append(
            {
                "length": length,
                "loss": finite_or_none(loss.mean),
                "se": finite_or_none(loss.error),
                "perplexity": exp_or_none(loss.mean),
                "tail_loss": finite_or_none(float(tail.mean())),
                **relative(difference),
            }
        )
    return rows, (folded[-1], folded[0])
