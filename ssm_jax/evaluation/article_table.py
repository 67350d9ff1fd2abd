"""What ``evaluate_articles`` found, as lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any


def article_table(models: Sequence[Mapping[str, Any]]) -> str:
    """Rows for a terminal, one per model and n_ctx. Each model has a ``model`` (its name), ``rows`` and ``left_out``."""
    width = max(5, *(len(found["model"]) for found in models))
    lines = [
        f"{'':{width}}{'':>11}{'mean over windows':>21}{'mean over targets':>21}",
        f"{'model':{width}}{'n_ctx':>11}"
        + f"{'loss':>10}{'ppl':>11}" * 2
        + f"{'windows':>10}{'no target':>11}{'articles':>10}{'tokens':>12}",
    ]
    notes = []
    for found in models:
        for row in found["rows"]:
            figures = "".join(
                f"{_text(row[loss]):>10}{_text(row[perplexity], 3):>11}"
                for loss, perplexity in (("loss", "perplexity"), ("token_loss", "token_perplexity"))
            )
            counts = (
                f"{row['windows']:>10,}{row['windows_without_target']:>11,}{row['articles']:>10,}{row['tokens']:>12,}"
            )
            lines.append(f"{found['model']:{width}}{row['n_ctx']:>11,}{figures}{counts}")
        notes += [
            f"{found['model']}: n_ctx {left['n_ctx']:,} left out, {left['reason']}." for left in found["left_out"]
        ]
    row = models[0]["rows"][0]
    if row["empty_articles"]:
        notes.append(f"{row['empty_articles']:,} of the articles have no token, so no window.")
    return "\n".join(lines + notes)


def _text(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
