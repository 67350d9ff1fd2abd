"""Loss over batches of text: every target counted once, summed in float64, independent of how rows are batched."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ssm_jax.models import LanguageModel
from ssm_jax.nn.state import LMState
from ssm_jax.ops import linear_token_nll
from ssm_jax.typing import Params, Positions, Tokens

_POSITION_BINS = 40


def evaluate(
    model: LanguageModel,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    text_bytes: int | None = None,
    *,
    carry: bool = False,
) -> dict[str, Any]:
    """Scores of a model over batches ``{tokens, targets, positions, weights}``, each [B, L].

        loss = sum_t w_t (-log p(target_t | tokens up to t)) / sum_t w_t        perplexity = exp(loss)
        bits_per_token = loss / ln 2        bits_per_byte = (total loss / ln 2) / text_bytes

    Every target counts, end marks included; ``text_bytes`` is the size of the text without them (None leaves out the last
    score). Batches of one shape share one compiled program. Nothing of size [B, L, V] is held at once.

    Args:
        carry: each batch goes on from the state of the one before; else every row starts afresh.

    Returns:
        loss (nats), perplexity, bits_per_token, tokens (the sum of the weights), with ``text_bytes`` bits_per_byte and bytes, and
        by_context: loss and tokens of the targets that have fewer than 1, 2, 4, ... 2^i tokens before their input token.

    Raises:
        ValueError: the batches hold no target.
    """
    totals = np.zeros((2, _POSITION_BINS))
    for nll_BL, batch in token_losses(model, params, batches, carry):
        weights = np.asarray(batch["weights"], np.float64)
        losses = np.where(weights == 0, 0.0, np.asarray(nll_BL, np.float64) * weights)
        bins = np.frexp(np.maximum(np.asarray(batch["positions"]), 0))[1].ravel()  # 0, then 1, then 2-3, then 4-7, ...
        totals += [np.bincount(bins, x.ravel(), _POSITION_BINS) for x in (losses, weights)]
    (total, weight), filled = totals.sum(axis=1).tolist(), np.flatnonzero(totals[1])
    if weight == 0:
        raise ValueError("there is no target with a weight above 0 to evaluate")
    loss = total / weight
    scores = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_token": loss / math.log(2),
        "tokens": weight,
    }
    if text_bytes is not None:
        scores |= {"bits_per_byte": total / math.log(2) / text_bytes, "bytes": float(text_bytes)}
    by_context = [
        {"below": 2 ** int(i), "loss": totals[0, i] / totals[1, i], "tokens": totals[1, i]} for i in filled.tolist()
    ]
    return {**scores, "by_context": by_context}


def token_losses(
    model: LanguageModel,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    carry: bool = False,
    capacity: int | None = None,
) -> Iterator[tuple[Float[Array, "B L"], Mapping[str, Any]]]:
    """-log p(target) of every place of every batch, beside the batch; what has no weight or is absent has a meaningless one.

    ``carry``: each batch goes on from the state of the one before (a position 0 clears its lane); else every row starts afresh.
    ``capacity``: of the carried state, see ``init_state``.
    """
    return _one_late(_scored(model, params, batches, carry, capacity))


def _scored(
    model: LanguageModel, params: Params, batches: Iterable[Mapping[str, Any]], carry: bool, capacity: int | None
) -> Iterator[tuple[Array, Mapping[str, Any]]]:
    state = None
    for batch in batches:
        if carry and state is None:
            state = model.init_state(len(batch["tokens"]), capacity)
        nll_BL, state = _token_nll(model, params, *_inputs(batch), state)
        state = state if carry else None
        yield nll_BL, batch


@functools.partial(jax.jit, static_argnames=("model",))
def _token_nll(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    targets: Tokens,
    positions: Positions,
    state: LMState | None,
) -> tuple[Float[Array, "B L"], LMState]:
    output: Any = model.apply({"params": params}, tokens, state, positions, method="features")
    features_BLD, state = output
    return linear_token_nll(features_BLD, model.readout(params), targets), state


def _inputs(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["tokens"], batch["targets"], batch["positions"]


def _one_late(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each handed out when the next one has been made: the device works while the host sums."""
    items = iter(items)
    for previous in items:
        for item in items:
            yield previous
            previous = item
        yield previous
