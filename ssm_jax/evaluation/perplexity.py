"""Loss over prepared rows: every target counted once, summed in float64, independent of how rows are batched."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ssm_jax.models import LanguageModel
from ssm_jax.ops import linear_token_nll
from ssm_jax.typing import Params, Positions, Tokens


def evaluate(
    model: LanguageModel, params: Params, batches: Iterable[Mapping[str, Any]], text_bytes: int | None = None
) -> dict[str, float]:
    """Scores of a model over batches ``{tokens, targets, positions, weights}``, each [B, L]; each row starts afresh.

        loss = sum_t w_t (-log p(target_t | tokens up to t)) / sum_t w_t        perplexity = exp(loss)
        bits_per_token = loss / ln 2        bits_per_byte = (total loss / ln 2) / text_bytes

    Every target counts, end marks included; ``text_bytes`` is the size of the text without them (None leaves out the last
    score). Batches of one shape share one compiled program. Nothing of size [B, L, V] is held at once.

    Returns:
        loss (nats), perplexity, bits_per_token, tokens (the sum of the weights), and with ``text_bytes`` bits_per_byte and bytes.

    Raises:
        ValueError: the batches hold no target.
    """
    total, weight = 0.0, 0.0
    for nll_BL, weights in _one_late(
        (_token_nll(model, params, *_inputs(batch)), batch["weights"]) for batch in batches
    ):
        weights = np.asarray(weights, np.float64)
        total += float(np.sum(np.where(weights == 0, 0.0, np.asarray(nll_BL, np.float64) * weights)))
        weight += float(weights.sum())
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
    return scores


@functools.partial(jax.jit, static_argnames=("model",))
def _token_nll(
    model: LanguageModel, params: Params, tokens: Tokens, targets: Tokens, positions: Positions
) -> Float[Array, "B L"]:
    features_BLD, _ = model.apply({"params": params}, tokens, positions=positions, method="features")
    return linear_token_nll(features_BLD, model.readout(params), targets)


def _inputs(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["tokens"], batch["targets"], batch["positions"]


def _one_late(items: Iterable[Any]) -> Iterable[Any]:
    """The same items, each handed out when the next one has been made: the device works while the host sums."""
    items = iter(items)
    for previous in items:
        for item in items:
            yield previous
            previous = item
        yield previous
