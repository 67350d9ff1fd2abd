"""What ``evaluate_lengths`` found, as charts for a page and as lines for a terminal."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ssm_jax.evaluation.charts import Level, Number, Series, line_chart

LENGTHS = "lengths.json"
"""The file of a run folder that holds the result."""


class Lengths(NamedTuple):
    """A result with the name and the CSS tone of its lines."""

    name: str
    tone: str
    result: Mapping[str, Any]


def length_charts(found: Sequence[Lengths]) -> str:
    """Perplexity relative to the shortest context, and the loss, by length; of a single result also by position. "" of nothing.

    Everything that comes from the results is escaped.
    """
    found = [lengths for lengths in found if lengths.result.get("lengths")]
    if not found:
        return ""
    relative = line_chart(
        [
            _series(one, "length", one.result["lengths"], "relative_perplexity", intervals="relative_interval")
            for one in found
        ],
        title="Perplexity relative to the shortest context",
        y_label="ratio, same targets",
        x_label="tokens of context",
        levels=[Level("as at the shortest:", 1)],
        x_log2=True,
        whole=True,
    )
    loss = line_chart(
        [_series(one, "length", one.result["lengths"], "loss") for one in found],
        title="Loss by length of context",
        y_label="nats per token",
        x_label="tokens of context",
        x_log2=True,
        whole=True,
    )
    by_position = _by_position(found[0].result) if len(found) == 1 else ""
    notes = [_note(one, len(found) > 1) for one in found]
    if len({_targets(one.result) for one in found}) > 1:
        notes.append(
            "The runs were not scored on the same targets, so only their ratios can be compared, and with care."
        )
    return relative + loss + by_position + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _by_position(result: Mapping[str, Any]) -> str:
    positions = result.get("by_position", {})
    bins = [{**part, "middle": (part["from"] + part["below"]) / 2} for part in positions.get("linear", [])]
    if len(bins) < 2:
        return ""
    long, short = (
        f"read in windows of {positions['length']:,}",
        f"the same targets, windows of {positions['reference']:,}",
    )
    ranges = [
        None if b["loss"] is None or b["se"] is None else (b["loss"] - b["se"], b["loss"] + b["se"]) for b in bins
    ]
    line = _series(Lengths(long, "a", result), "middle", bins, "loss")._replace(band=True, intervals=ranges)
    if positions["length"] == positions["reference"]:
        series, ratio = [line], ""
    else:
        series = [line, _series(Lengths(short, "b", result), "middle", bins, "reference_loss")]
        ratio = line_chart(
            [_series(Lengths(long, "a", result), "middle", bins, "relative_perplexity", "relative_interval")],
            title=f"Perplexity by position, relative to windows of {positions['reference']:,}",
            y_label="ratio, same targets",
            x_label="tokens read before",
            levels=[Level("as in short windows:", 1)],
            whole=True,
        )
    loss = line_chart(
        series, title="Loss by position", y_label="nats per token", x_label="tokens read before", whole=True
    )
    return (
        ratio
        + loss
        + '<p class="note">The band of the loss by position is one standard error, most of it the text\'s own.</p>'
    )


def _series(one: Lengths, x: str, rows: Sequence[Mapping[str, Any]], y: str, intervals: str | None = None) -> Series:
    ranges: list[Sequence[Number] | None] = [row.get(intervals) for row in rows] if intervals else []
    return Series(one.name, [row[x] for row in rows], [row[y] for row in rows], one.tone, bool(ranges), ranges)


def _note(one: Lengths, named: bool) -> str:
    """What was scored, and what was not."""
    parts = [f"{one.name}: {_scored(one.result)}" if named else _scored(one.result)]
    parts += [f"{left['length']:,} left out: {left['reason']}." for left in one.result.get("left_out", [])]
    return " ".join(parts) + f" Bands: 95 % of the paired difference, over {one.result.get('interval_over', '?')}."


def _scored(result: Mapping[str, Any]) -> str:
    return (
        f"{result['targets']:,} targets, the same at every length: {result['stretches']:,} stretches of {result['stretch']:,} "
        f"tokens from {result['documents']:,} documents ({result['documents_left_out']:,} shorter ones left out)."
    )


def _targets(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(key) for key in ("data", "split", "stretch", "targets"))


def length_table(result: Mapping[str, Any]) -> str:
    """The scores as lines for a terminal; the last column answers whether a longer context is worse."""
    rows = result["lengths"]
    shortest = rows[0]["length"]
    lines = [
        f"{result['split']} split of {result['data']}",
        _scored(result),
        *(f"Length {left['length']:,} left out: {left['reason']}." for left in result["left_out"]),
        "",
        f"{'context':>10}{'nats/token':>12}{'± s.e.':>9}{'last half':>11}{'perplexity':>12}   relative to {shortest:,}, 95 %",
    ]
    for row in rows:
        figures = f"{row['length']:>10,}{_text(row['loss']):>12}{_text(row['se']):>9}{_text(row['tail_loss']):>11}"
        lines.append(f"{figures}{_text(row['perplexity'], 3):>12}   {_relative(row, shortest)}")
    if any(row["relative_interval"] for row in rows):
        lines.append(f"Intervals: of the paired difference, over {result['interval_over']}.")
    return "\n".join(lines)


def _relative(row: Mapping[str, Any], shortest: int) -> str:
    text, interval = _text(row["relative_perplexity"]), row["relative_interval"]
    if row["length"] == shortest or interval is None:
        return text
    low, high = interval
    verdict = "better" if high < 1 else "worse" if low > 1 else "no difference seen"
    return f"{text} [{low:.4f}, {high:.4f}] {verdict}"


def _text(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
