"""How likely a continuation is after a context: what multiple-choice and cloze tasks are scored by."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import DataError
from ssm_jax.generation.prompt import bucket
from ssm_jax.models import LanguageModel, registry
from ssm_jax.typing import Params, Positions, Tokens


class Likelihood(NamedTuple):
    """log p of a continuation in nats, and whether greedy decoding would give exactly it."""

    logprob: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows it, cut out of the encoding of both together, so that they are those of the text.

    A context's trailing spaces go to the continuation, where subword tokenizers want them.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    head = tokenizer.encode(context).tolist()
    return head, tokenizer.encode(context + continuation).tolist()[len(head) :]


def likelihoods(
    model: LanguageModel,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 16,
) -> list[Likelihood]:
    """log p(continuation | context) = sum_t log p(c_t | context, c_1 ... c_{t-1}) for (context, continuation) pairs of token ids.

    The probabilities are those of the loss, padded rows of the vocabulary included (as in transformers); greedy decoding leaves
    them out, as ``generate`` does. The context holds at least one token. Pairs are sorted by length and padded to powers of two,
    so that few programs compile. Where the model's context has a limit, a context loses its first tokens, so that as many are read
    as fit (what lm-evaluation-harness does).

    Raises:
        ValueError: an empty context. DataError: a continuation that is longer than the model's context.
    """
    if any(not len(context) for context, _ in pairs):
        raise ValueError("a context is empty; start it with the end-of-text mark")
    limit = registry.context_limit(model.config)
    if limit is not None:
        pairs = _within(pairs, limit)
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]), reverse=True)
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        rows = [np.asarray([*pairs[i][0], *pairs[i][1]], np.int32) for i in group]
        length = bucket(max(len(row) for row in rows) - 1)
        length = length if limit is None else min(length, limit)
        tokens, targets = np.zeros((2, batch_size, length), np.int32)
        positions = np.full((batch_size, length), -1, np.int32)
        scored = np.zeros((batch_size, length), bool)
        for row, (i, ids) in enumerate(zip(group, rows, strict=True)):
            count = len(ids) - 1
            tokens[row, :count], targets[row, :count] = ids[:-1], ids[1:]
            positions[row, :count] = np.arange(count)
            scored[row, len(pairs[i][0]) - 1 : count] = True
        logprobs, greedy = (np.asarray(x) for x in _scores(model, params, tokens, targets, positions))
        for row, i in enumerate(group):
            mask = scored[row]
            found[i] = Likelihood(float(logprobs[row][mask].astype(np.float64).sum()), bool(greedy[row][mask].all()))
    return found


def _within(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The pairs with what is left of each context when ``limit`` inputs are read; the last token is no input."""
    too_long = [(i, len(continuation)) for i, (_, continuation) in enumerate(pairs) if len(continuation) > limit]
    if too_long:
        raise DataError(
            f"Continuation {too_long[0][0]} has {too_long[0][1]} tokens and the model reads at most {limit}; leave it "
            "out, or use a model with a longer context."
        )
    return [(context[-(limit + 1 - len(continuation)) :], continuation) for context, continuation in pairs]


@functools.partial(jax.jit, static_argnames=("model",))
def _scores(
    model: LanguageModel, params: Params, tokens: Tokens, targets: Tokens, positions: Positions
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """log p of each target, and whether it is the most likely token; one row of logits at a time."""
    output: Any = model.apply({"params": params}, tokens, None, positions, method="features")
    readout_DV = model.readout(params)

    def of_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
        features_LD, targets_L = row
        logits_LV = jnp.dot(features_LD, readout_DV.astype(features_LD.dtype), preferred_element_type=jnp.float32)
        logprob_L = jnp.take_along_axis(jax.nn.log_softmax(logits_LV), targets_L[:, None], axis=1)[:, 0]
        return logprob_L, jnp.argmax(logits_LV[:, : model.config.vocab_size], axis=-1) == targets_L

    return jax.lax.map(of_row, (output[0], targets))
