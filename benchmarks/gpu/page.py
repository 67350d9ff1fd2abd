"""Results as one page of HTML: what was measured over the least possible, on a logarithmic axis, and the figures below."""

import math
from html import escape
from typing import Any

from benchmarks.gpu import table
from ssm_jax.evaluation.charts import Series, line_chart
from ssm_jax.evaluation.report import page

TONES = "abcdef"
WIDTH, LEFT, RIGHT, ROW, TOP, BOTTOM = 1000, 300, 60, 26, 14, 44


def render(whole: dict[str, Any]) -> str:
    """A page that needs nothing beside itself."""
    entries = table.entries(whole)
    figures = {title: _figure(title, [e for e in entries if e["title"] == title]) for title in _titles(entries)}
    described = whole["conditions"]
    machine = f"{described['gpu']}, jax {described['jax']}, triton {described['triton']}, {described['date']}"
    rates = f"copies {described['copy_tb_per_s']:.2f} TB/s, bfloat16 products {described['bf16_matmul_tflop_per_s']:.0f} TFLOP/s"
    dry = " This was a dry run on a CPU: the times mean nothing." if described.get("dry_run") else ""
    lead = f'<p class="lead">{escape(machine)}; {escape(rates)}.{dry}</p>'
    sections = {
        **figures,
        "Whole models": _models(whole["models"]),
        "Loss": _losses(whole["models"]),
        "All figures": _all(entries),
        "Conditions": "".join(f"<div>{escape(f'{key}: {value}')}</div>" for key, value in described.items()),
    }
    return page("Kernels on a GPU", lead, sections)


def _titles(entries: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["title"] for entry in entries if entry["floor"]))


def _figure(title: str, entries: list[dict[str, Any]]) -> str:
    """A row per case and pass, a dot per implementation at measured / floor; "" if nothing was measured."""
    points = [
        (i, row, found["ms"], found["ms"] / entry["floor"]["ms"])
        for i, entry in enumerate(entries)
        for row, found in entry["rows"].items()
        if "ms" in found
    ]
    if not points:
        return ""
    names = list(dict.fromkeys(row for _, row, _, _ in points))
    tones = {name: TONES[i % len(TONES)] for i, name in enumerate(names)}
    most = max(1, math.ceil(math.log10(max(times for *_, times in points)) + 0.05))
    least = min(0, math.floor(math.log10(min(times for *_, times in points))))
    height = TOP + ROW * len(entries) + BOTTOM

    def x(times: float) -> float:
        return round(LEFT + (math.log10(times) - least) / (most - least) * (WIDTH - LEFT - RIGHT), 1)

    marks = []
    for power in range(least, most + 1):
        at, kind = x(10.0**power), "level" if power == 0 else "grid"
        marks.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        marks.append(f'<text x="{at}" y="{height - BOTTOM + 18}" text-anchor="middle">{10.0**power:g}</text>')
    marks.append(f'<text x="{WIDTH - RIGHT}" y="{height - 6}" text-anchor="end">measured / least possible</text>')
    for i, entry in enumerate(entries):
        label = escape(f"{entry['name']}, {entry['passes']}")
        marks.append(f'<text x="{LEFT - 12}" y="{TOP + ROW * (i + 0.5) + 4}" text-anchor="end">{label}</text>')
    for i, row, ms, times in points:
        label = escape(f"{row}: {ms:.4g} ms, {times:.2f} times the least possible")
        centre = f'cx="{x(times)}" cy="{TOP + ROW * (i + 0.5)}"'
        marks.append(f'<circle class="dot {tones[row]}" {centre} r="6"><title>{label}</title></circle>')
    keys = "".join(f'<span class="key {tone}">{escape(name)}</span>' for name, tone in tones.items())
    return (
        f"<figure><figcaption>{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}: measured over least possible time">'
        f"{''.join(marks)}</svg></figure>"
    )


def _all(entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        least = f"floor {entry['floor']['ms']:.4g} ms ({entry['floor']['bound']})" if entry["floor"] else ""
        rows.append(
            f"<tr><th><b>{escape(entry['name'])}, {escape(entry['passes'])}</b></th><td>{escape(least)}</td></tr>"
        )
        for row, found in entry["rows"].items():
            times = table.times_ours(entry["rows"], row)
            ours = "" if times is None else f", {times:.2f} times our fastest"
            rows.append(f"<tr><th>{escape(row)}</th><td>{escape(table.cell(found) + ours)}</td></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _models(models: dict[str, Any]) -> str:
    rows = [
        f"<tr><th>{escape(what)}</th><th>{escape(row)}</th><td>{escape(table.cell(found))}</td></tr>"
        for what, arms in models.items()
        for row, found in arms.items()
    ]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>' if rows else ""


def _losses(models: dict[str, Any]) -> str:
    losses = models.get("loss", {}).get("both", {}).get("losses", {})
    series = [
        Series(name, range(1, len(values) + 1), values, TONES[i]) for i, (name, values) in enumerate(losses.items())
    ]
    return line_chart(series, title="Training loss from the same weights and batches", y_label="nats a token")
