"""One self-contained HTML page that sets runs side by side, from the files in their folders."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssm_jax.errors import DataError
from ssm_jax.evaluation.charts import Series, line_chart, number
from ssm_jax.evaluation.length_charts import Lengths, length_charts
from ssm_jax.evaluation.report import DIVERGENCE, Row, RunFiles, duration, page, read_run, training_losses

TONES = ("a", "b", "c", "d", "e", "f")
COMPARISON = "comparison.html"


def write_comparison(folders: Sequence[str | Path], path: str | Path, baseline: str | Path | None = None) -> Path:
    """Writes the page and returns its path. With a ``baseline`` the losses are also drawn as differences to that run's.

    Raises:
        DataError: a folder that is no run, more runs than colours, or one run twice.
    """
    named = [Path(folder) for folder in (*([baseline] if baseline is not None else []), *folders)]
    if len({folder.resolve() for folder in named}) < len(named):
        raise DataError("A run is named twice; name each one once, the baseline by --baseline alone.")
    if len(named) > len(TONES):
        raise DataError(f"There are {len(named)} runs; at most {len(TONES)} can be told apart on one page.")
    runs = [read_run(folder) for folder in named]
    Path(path).write_text(render_comparison(runs, baseline is not None), encoding="utf-8")
    return Path(path)


def render_comparison(runs: Sequence[RunFiles], against_first: bool = False) -> str:
    """The page as text. ``against_first``: the first run is the baseline."""
    names, steps, losses = _names(runs), [run.steps for run in runs], [training_losses(run) for run in runs]
    charts = {
        "Training loss": _chart(losses, names, "loss", "Training loss", "nats per token"),
        DIVERGENCE: _chart(steps, names, "kl", DIVERGENCE, "nats per token", from_zero=True),
        "Held-out loss": _chart(
            [run.evaluations for run in runs], names, "eval/loss", "Held-out loss", "nats per token"
        ),
        "Throughput": _chart(steps, names, "tokens_per_s", "Throughput", "tokens per second", from_zero=True),
        "Gradient norm": _chart(steps, names, "grad_norm", "Gradient norm", "before clipping", from_zero=True),
    }
    if against_first:
        difference = _differences(losses, names)
        charts = {
            "Training loss": charts.pop("Training loss"),
            f"Training loss less that of {names[0]}": difference,
            **charts,
        }
    lengths = [Lengths(name, tone, run.lengths) for run, name, tone in zip(runs, names, TONES, strict=False)]
    charts["Longer contexts"] = length_charts(lengths)
    sections = {"Runs": _table(runs, names, against_first), **charts, "What differs": _config_table(runs, names)}
    return page(" · ".join(names), '<p class="lead">Training runs side by side</p>', sections)


def _names(runs: Sequence[RunFiles]) -> list[str]:
    short = [run.folder.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.folder) for name, run in zip(short, runs, strict=True)]


def _chart(
    rows: Sequence[list[Row]],
    names: Sequence[str],
    key: str,
    title: str,
    y_label: str,
    from_zero: bool = False,
) -> str:
    """One line per run, of what its rows hold under ``key``."""
    series = []
    for each, name, tone in zip(rows, names, TONES, strict=False):
        found = [row for row in each if key in row]
        series.append(Series(name, [row["step"] for row in found], [row[key] for row in found], tone))
    return line_chart(series, title=title, y_label=y_label, from_zero=from_zero)


def _differences(losses: Sequence[list[Row]], names: Sequence[str]) -> str:
    """At the steps that a run and the baseline both have."""
    baseline = {row["step"]: row["loss"] for row in losses[0]}
    series = []
    for steps, name, tone in list(zip(losses, names, TONES, strict=False))[1:]:
        both = [(row["step"], row["loss"], baseline[row["step"]]) for row in steps if row["step"] in baseline]
        values = [None if a is None or b is None else a - b for _, a, b in both]
        series.append(Series(name, [step for step, *_ in both], values, tone))
    return line_chart(series, title=f"Training loss less that of {names[0]}", y_label="nats per token")


def _table(runs: Sequence[RunFiles], names: Sequence[str], against_first: bool) -> str:
    columns = (
        "bits per byte",
        "held-out loss",
        "parameters",
        "tokens",
        "tokens per second",
        "time in steps",
    )
    head = "".join(f'<th class="number">{title}</th>' for title in columns)
    first = _figures(runs[0]) if against_first else None
    lines = []
    for run, name in zip(runs, names, strict=True):
        cells = []
        for key, (value, text) in _figures(run).items():
            comparable = key not in ("bits", "loss") or run.config.get("data") == runs[0].config.get("data")
            base = first[key][0] if first is not None and run is not runs[0] and comparable else None
            change = f" ({value / base - 1:+.1%})" if value is not None and base else ""
            cells.append(f'<td class="number">{escape(text + change)}</td>')
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    note = (
        '<p class="note">Bits per byte: of whole documents, by train.evaluate, or of windows as long as the model reads. '
        "Held-out loss: of rows, at the end of training. "
        "Differences of both are left out where the data differ.</p>"
    )
    return note + f'<div class="wide"><table class="scores"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _figures(run: RunFiles) -> dict[str, tuple[Any, str]]:
    """value and text of each column."""
    summary, last = run.summary, run.evaluations[-1] if run.evaluations else {}
    bits, windows = run.scores.get("model", {}).get("bits_per_byte"), run.scores.get("sliding")
    values = {
        "bits": (bits, "{:.4f}".format),
        "loss": (last.get("eval/loss"), "{:.4f}".format),
        "parameters": (summary.get("parameters"), number),
        "tokens": (summary.get("tokens"), number),
        "speed": (summary.get("tokens_per_s"), number),
        "seconds": (summary.get("seconds"), duration),
    }
    found = {key: (value, "–" if value is None else form(value)) for key, (value, form) in values.items()}
    if windows and bits is not None:  # to be read, not to be compared: they see less than whole documents
        found["bits"] = (None, f"{bits:.4f} (windows of {windows['window']})")
    return found


def _config_table(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """The keys whose values are not the same everywhere."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key != "output"]
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    if not differing:
        return "<p>Their configurations are the same.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = (
        f"<tr><th>{escape(key)}</th>"
        + "".join(f"<td>{escape(str(values.get(key, '–')))}</td>" for values in flat)
        + "</tr>"
        for key in differing
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _flatten(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found
