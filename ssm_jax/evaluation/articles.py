"""Perplexity over whole articles by BakaLLM's protocol (github.com/Maykeye/BakaLLM, bench.py), in constant memory.

Each article is read alone, in windows of n_ctx tokens that start every n_ctx/2 (see article_windows.py), each from an empty state:

    loss = mean over windows of (mean over the window's targets of -log p)        perplexity = exp(loss)
    token_loss = mean over all targets of -log p                                  token_perplexity = exp(token_loss)

The former counts windows alike however few targets they have (it is what BakaLLM publishes), the latter every target once. Within a
window the state is carried from piece to piece, so the device holds ``lanes * piece`` tokens whatever n_ctx and however long an
article.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from ssm_jax.data.pipeline import stored_documents
from ssm_jax.data.shards import PackedDataset
from ssm_jax.errors import DataError
from ssm_jax.evaluation.article_windows import Window, batches, spans
from ssm_jax.evaluation.intervals import exp_or_none, finite_or_none
from ssm_jax.evaluation.perplexity import token_losses
from ssm_jax.models import LanguageModel, registry
from ssm_jax.typing import Params

PIECE = 512
"""Tokens of a window that are read at once."""

Report = Callable[[int, int], None]
"""Called with the tokens read so far and those to read in all."""


@dataclasses.dataclass(frozen=True)
class StoredArticles:
    """The documents of a split of prepared data, in stored order, as often as they are asked for.

    marks: with the end-of-text marks that preparing put before and after each; BakaLLM's articles have none.
    """

    dataset: PackedDataset
    marks: bool = False

    def __iter__(self) -> Iterator[Integer[np.ndarray, "_"]]:
        for document in stored_documents(self.dataset):
            yield document if self.marks else document[1:-1]


def parse_contexts(text: str) -> tuple[int, ...]:
    """``512,2048`` as numbers. Raises DataError: not a list of different even numbers from 2 on."""
    try:
        contexts = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(
            f"Option --articles {text!r} is no list of whole numbers; write the lengths of windows with commas between them, like "
            "512,2048,1048576."
        ) from error
    check_contexts(contexts)
    return contexts


def check_contexts(contexts: Sequence[int]) -> None:
    """Raises DataError unless there is a window length, and all are different, even and at least 2."""
    if not contexts:
        raise DataError("There is no n_ctx; give the length of a window, such as 2048.")
    for n_ctx in contexts:
        if n_ctx < 2:
            raise DataError(f"n_ctx is {n_ctx}, and a window needs a token and its target; choose 2 or more.")
        if n_ctx % 2:
            raise DataError(
                f"n_ctx is {n_ctx}; windows start every n_ctx / 2 tokens, and with an odd n_ctx their last targets would count "
                f"twice. Choose {n_ctx - 1} or {n_ctx + 1}."
            )
        if contexts.count(n_ctx) > 1:
            raise DataError(f"n_ctx {n_ctx} is named twice; name each length once.")


def readable_contexts(model: LanguageModel, contexts: Sequence[int]) -> list[int]:
    """The window lengths within the model's context. Raises DataError if there is none."""
    limit = registry.context_limit(model.config)
    readable = [n_ctx for n_ctx in contexts if limit is None or n_ctx <= limit]
    if not readable:
        raise DataError(
            f"The {registry.family_name(model.config)} model reads at most {limit} tokens, and every n_ctx "
            f"({', '.join(map(str, contexts))}) is above that; add one that is not."
        )
    return readable


def evaluate_articles(
    model: LanguageModel,
    params: Params,
    articles: Iterable[Integer[np.ndarray, "_"]],
    contexts: Sequence[int],
    *,
    lanes: int = 16,
    piece: int = PIECE,
    report: Report | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The scores of articles at every window length n_ctx: see the head of this file. One program serves all lengths.

    Args:
        articles: token ids of each; gone through once for their lengths and once per n_ctx, so no iterator.
        contexts: the lengths n_ctx of windows.
        lanes: windows read at once. piece: tokens read at once of each, more for a family that reads longer chunks.
            No result depends on either.
        report: is told the progress after every batch.

    Returns:
        rows: in the order of ``contexts``: n_ctx; loss, token_loss (nats) and their perplexities, None if not finite; windows (that
        have a target), targets; windows_without_target (that of each article of one token); articles, empty_articles (no token, so
        no window), tokens. left_out: n_ctx and reason of lengths beyond the model's context.

    Raises:
        DataError: lengths that are odd, below 2 or named twice, all of them beyond the model's context, no article with a target.
        ValueError: articles that can be gone through only once; no lane, no piece.
    """
    check_contexts(contexts)
    if iter(articles) is articles:
        raise ValueError("articles can be gone through only once; pass a list, or an object whose __iter__ begins anew")
    if lanes < 1 or piece < 1:
        raise ValueError(f"lanes is {lanes} and piece {piece}; both must be at least 1")
    limit = registry.context_limit(model.config)
    readable = readable_contexts(model, contexts)
    lengths = [len(article) for article in articles]
    windows, to_read = _work(lengths, readable)
    if not windows:
        raise DataError(
            f"None of the {len(lengths):,} articles has two tokens, so there is no target; give data with longer ones."
        )
    # Long windows first: short ones fill the lanes that would be idle while the last long one is read.
    waiting = (
        Window(article[span.start : span.stop], span, n_ctx)
        for n_ctx in sorted(readable, reverse=True)
        for article in articles
        for span in spans(len(article), n_ctx)
    )
    dealt = batches(waiting, min(lanes, windows), registry.whole_chunks(model.config, min(piece, max(readable))))
    tallies, read = {n_ctx: _Tally() for n_ctx in readable}, 0
    for finished, inputs in _losses(model, params, dealt, None if limit is None else max(readable)):
        for window, loss in finished:
            tallies[window.owner].add(loss, window.span.targets)
        read += inputs
        if report is not None:
            report(read, to_read)
    about = {"windows_without_target": lengths.count(1), "articles": len(lengths), "empty_articles": lengths.count(0)}
    about |= {"tokens": sum(lengths)}
    reason = f"beyond the model's context of {limit} tokens"
    return {
        "rows": [{"n_ctx": n_ctx, **tallies[n_ctx].scores(), **about} for n_ctx in readable],
        "left_out": [{"n_ctx": n_ctx, "reason": reason} for n_ctx in contexts if n_ctx not in readable],
    }


def _work(lengths: Iterable[int], contexts: Iterable[int]) -> tuple[int, int]:
    """The number of windows with a target, and of tokens read in them."""
    windows = inputs = 0
    for length, n_ctx in itertools.product(lengths, contexts):
        for span in spans(length, n_ctx):
            windows += span.targets > 0
            inputs += span.inputs
    return windows, inputs


def _losses(
    model: LanguageModel, params: Params, dealt: Iterable[dict[str, Any]], capacity: int | None
) -> Iterator[tuple[list[tuple[Window, float]], int]]:
    """Of each batch the windows that it finishes with the sum of their losses in float64, and the number of tokens it reads."""
    sums: dict[int, float] = {}
    for nll_BL, batch in token_losses(model, params, dealt, carry=True, capacity=capacity):
        nll, finished, inputs = np.asarray(nll_BL, np.float64), [], 0
        for lane, part in enumerate(batch["parts"]):
            if part is None:
                continue
            sums[lane] = (sums[lane] if part.start else 0.0) + float(nll[lane, part.scored].sum())
            inputs += part.size
            if part.is_last:
                finished.append((part.window, sums[lane]))
        yield finished, inputs


@dataclasses.dataclass
class _Tally:
    """Sums over windows, float64."""

    means: float = 0.0
    losses: float = 0.0
    windows: int = 0
    targets: int = 0

    def add(self, loss: float, targets: int) -> None:
        self.means += loss / targets
        self.losses += loss
        self.windows += 1
        self.targets += targets

    def scores(self) -> dict[str, float | int | None]:
        loss, token_loss = self.means / self.windows, self.losses / self.targets
        return {
            "loss": finite_or_none(loss),
            "perplexity": exp_or_none(loss),
            "token_loss": finite_or_none(token_loss),
            "token_perplexity": exp_or_none(token_loss),
            "windows": self.windows,
            "targets": self.targets,
        }
