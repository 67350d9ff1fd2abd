"""One self-contained HTML page about a run, from the files in its folder; a file that is not there is a section left out."""

import json
import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ssm_jax.config import read_yaml
from ssm_jax.errors import DataError
from ssm_jax.evaluation.charts import Level, Number, Series, bars, line_chart, number
from ssm_jax.evaluation.length_charts import LENGTHS, Lengths, length_charts
from ssm_jax.evaluation.style import CSS

REPORT = "report.html"
DIVERGENCE = "Divergence from the teacher"
Row = dict[str, Any]


class RunFiles(NamedTuple):
    """What a run folder holds; empty where a file is absent."""

    folder: Path
    config: dict[str, Any]
    steps: list[Row]
    evaluations: list[Row]
    samples: list[Row]
    summary: dict[str, Any]
    scores: dict[str, Any]
    lengths: dict[str, Any]


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    Raises:
        DataError: the folder is not there, holds nothing of a run, or one of its files is damaged.
    """
    path = Path(folder) / REPORT
    page = render(read_run(folder))
    path.write_text(page, encoding="utf-8")
    return path


def read_run(folder: str | Path) -> RunFiles:
    """Reads config.yaml, metrics.jsonl, samples.jsonl, summary.json, eval.json and lengths.json of a run folder.

    Raises as ``write_report``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"Run folder {folder} does not exist; give the `output` of a training run.")
    metrics = _read_lines(folder / "metrics.jsonl")
    run = RunFiles(
        folder=folder,
        config=read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {},
        steps=[row for row in metrics if "loss" in row],
        evaluations=[row for row in metrics if "eval/loss" in row],
        samples=_read_lines(folder / "samples.jsonl"),
        summary=_read_json(folder / "summary.json"),
        scores=_read_json(folder / "eval.json"),
        lengths=_read_json(folder / LENGTHS),
    )
    if not any(run[1:]):
        raise DataError(
            f"Folder {folder} holds nothing of a run (no config.yaml, metrics.jsonl, ...); give a run folder."
        )
    return run


def render(run: RunFiles) -> str:
    """The page as text. Everything that comes from the files is escaped."""
    sections: dict[str, Callable[[RunFiles], str]] = {
        "Loss": _loss,
        DIVERGENCE: _divergence,
        "Held-out text": _scores,
        "Loss by context": _by_context,
        "Longer contexts": _lengths,
        "What it writes": _samples,
        "Speed and optimisation": _curves,
        "Memory": _memory,
        "Use it": _usage,
        "Configuration": _config,
    }
    bodies = {title: section(run) for title, section in sections.items()}
    return page(run.folder.resolve().name, _lead(run) + _tiles(run), bodies, _footer(run))


def page(title: str, lead: str, sections: Mapping[str, str], footer: str = "") -> str:
    """A whole page: the title as text, everything else as markup; empty sections are left out."""
    content = "".join(f"<section><h2>{escape(name)}</h2>{body}</section>" for name, body in sections.items() if body)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head><body><main>'
        f"<h1>{escape(title)}</h1>{lead}{content}{footer}</main></body></html>\n"
    )


def training_losses(run: RunFiles) -> list[Row]:
    """The logged steps with the loss on the data alone, under ``loss``.

    Of a run with a teacher that is ``ce``, in the steps that computed it: what it minimises is no loss on the data.
    """
    if not any(name in row for row in run.steps for name in ("ce", "kl")):
        return run.steps
    return [{**row, "loss": row["ce"]} for row in run.steps if "ce" in row]


def _lead(run: RunFiles) -> str:
    model, summary = run.config.get("model", {}), run.summary
    parts = [
        f"{model['family']} language model" if "family" in model else "",
        f"{model['n_layers']} layers of width {model['d_model']}" if {"n_layers", "d_model"} <= set(model) else "",
        f"trained on {_device(summary)}" if summary.get("devices") else "",
        "not finished" if summary.get("finished") is False else "",
    ]
    return f'<p class="lead">{escape(", ".join(part for part in parts if part))}</p>'


def _tiles(run: RunFiles) -> str:
    summary = run.summary
    baseline, best = _baseline(run), _bits_per_byte(run)
    tiles = [
        ("bits per byte on held-out text", None if best is None else f"{best:.3f}"),
        (f"bits per byte of an {_baseline_name(run)}", None if baseline is None else f"{baseline:.3f}"),
        ("parameters", _maybe(number, summary.get("parameters"))),
        ("tokens trained on", _maybe(number, summary.get("tokens"))),
        ("tokens per second", _maybe(number, summary.get("tokens_per_s"))),
        ("time in training steps", _maybe(duration, summary.get("seconds"))),
    ]
    cells = [f"<b>{escape(value)}</b><span>{escape(name)}</span>" for name, value in tiles if value is not None]
    if not cells:
        return ""
    first = "tile main" if best is not None else "tile"
    rest = "".join(f'<div class="tile">{cell}</div>' for cell in cells[1:])
    return f'<div class="tiles"><div class="{first}">{cells[0]}</div>{rest}</div>'


def _loss(run: RunFiles) -> str:
    """Training and held-out loss in bits per byte where their ratio to nats per token is known, else in nats per token."""
    last = run.evaluations[-1] if run.evaluations else {}
    in_bytes = bool(last.get("eval/bits_per_byte") and last.get("eval/loss"))
    factor = last["eval/bits_per_byte"] / last["eval/loss"] if in_bytes else 1.0
    series = [
        _series(training_losses(run), "loss", "training", "a", factor=factor, band=True),
        _series(run.evaluations, "eval/bits_per_byte" if in_bytes else "eval/loss", "held out", "b"),
    ]
    baseline = _baseline(run)
    chart = line_chart(
        series,
        title="Loss",
        y_label="bits per byte" if in_bytes else "nats per token",
        levels=[Level(_baseline_name(run), baseline)] if in_bytes and baseline is not None else [],
    )
    note = (
        '<p class="note">Where several steps are drawn as one, the band spans them. '
        "Training loss is converted from nats per token with the held-out text's tokens per byte.</p>"
    )
    return chart + (note if chart and in_bytes else "")


def _divergence(run: RunFiles) -> str:
    series = [_series(run.steps, "kl", "training", "c", band=True)]
    chart = line_chart(series, title=DIVERGENCE, y_label="nats per token", from_zero=True)
    note = '<p class="note">T² KL(teacher ‖ student) of the steps that computed it; the loss above is that on the data alone.</p>'
    return chart + (note if chart else "")


_SCORES = {
    "bits_per_byte": "bits per byte",
    "bits_per_token": "bits per token",
    "perplexity": "perplexity",
    "loss": "nats per token",
}


def _scores(run: RunFiles) -> str:
    scores = run.scores
    if "model" not in scores:
        return ""
    context = ", whole documents" if "rows" in scores else ""
    if "sliding" in scores:
        context = ", windows of {window}, stride {stride}".format(**scores["sliding"])
    models = {
        f"this model{context}": scores["model"],
        "every row as one document" if scores.get("joined") else "every row read afresh": scores.get("rows"),
        _baseline_name(run): scores.get("baseline"),
    }
    head = "".join(f'<th class="number">{title}</th>' for title in _SCORES.values())
    lines = []
    for name, values in models.items():
        if values:
            texts = (_maybe("{:.4f}".format, values.get(key)) or "–" for key in _SCORES)
            cells = "".join(f'<td class="number">{text}</td>' for text in texts)
            lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    counted = scores["model"]
    amount = (
        f"{counted.get('bytes', 0):,.0f} bytes of text, {counted.get('tokens', 0):,.0f} targets, end marks included"
    )
    note = f"Split {scores.get('split', '?')}, at step {scores.get('step', '?')}: {amount}."
    table = f'<table class="scores"><tr><th></th>{head}</tr>{"".join(lines)}</table>'
    return f'<div class="wide">{table}</div><p class="note">{escape(note)}</p>'


def _by_context(run: RunFiles) -> str:
    parts = run.scores.get("model", {}).get("by_context", [])
    rows = []
    for part in parts:
        low, high = part["below"] // 2, part["below"] - 1
        bits = part["loss"] / math.log(2)
        rows.append((f"{low:,} to {high:,} tokens" if high > low else f"{low:,} tokens", bits, f"{bits:.3f}"))
    if not rows:
        return ""
    return bars(rows) + '<p class="note">Bits per token of held-out text, by the number of tokens read before.</p>'


def _lengths(run: RunFiles) -> str:
    return length_charts([Lengths("this model", "a", run.lengths)])


def _samples(run: RunFiles) -> str:
    by_step: dict[Any, list[Row]] = {}
    for row in run.samples:
        by_step.setdefault(row.get("step"), []).append(row)
    parts: list[str] = []
    for step, rows in reversed(by_step.items()):
        pairs = [(escape(str(row.get("prompt", ""))), escape(str(row.get("text", "")))) for row in rows]
        texts = "".join(f'<pre class="sample"><b>{prompt}</b>{text}</pre>' for prompt, text in pairs)
        opened = "" if parts else " open"
        parts.append(f"<details{opened}><summary>after step <b>{escape(str(step))}</b></summary>{texts}</details>")
    return "".join(parts)


def _curves(run: RunFiles) -> str:
    def chart(title: str, key: str, tone: str, y_label: str, from_zero: bool = True) -> str:
        series = _series(run.steps, key, title.lower(), tone, band=True)
        return line_chart([series], title=title, y_label=y_label, width=480, height=230, from_zero=from_zero)

    charts = (
        chart("Throughput", "tokens_per_s", "a", "tokens per second")
        + chart("Learning rate", "lr", "c", "per update")
        + chart("Gradient norm", "grad_norm", "b", "before clipping")
        + chart("Parameter norm", "param_norm", "c", "all parameters", from_zero=False)
    )
    return f'<div class="pair">{charts}</div>' if charts else ""


def _memory(run: RunFiles) -> str:
    names = {
        "peak_host_bytes": "process, at its peak",
        "step_argument_bytes": "training step: state and batch",
        "step_temp_bytes": "training step: temporaries",
        "step_output_bytes": "training step: results",
        "step_generated_code_bytes": "training step: code",
    }
    memory = run.summary.get("memory", {})
    rows = [(names[key], value, size(value)) for key in names if (value := memory.get(key))]
    if not rows:
        return ""
    return bars(rows) + "<p class=\"note\">The training step's figures are the compiler's own, per device.</p>"


def _usage(run: RunFiles) -> str:
    if not run.config:
        return ""
    folder, data = str(run.folder), run.config.get("data", {}).get("path", "DATA")
    exported = f"exported/{run.folder.resolve().name}"
    shell = (
        f'python -m train.generate {folder} --prompt "..." --temperature 0.8 --top-p 0.95\n'
        f"python -m train.evaluate {folder} --data {data}\n"
        f"python -m train.convert {folder} {exported}     # a folder that transformers loads"
    )
    ours = (
        f"import ssm_jax\nmodel, params = ssm_jax.from_pretrained({folder!r})\n"
        "logits, state = model.apply({'params': params}, tokens)"
    )
    torch = f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({exported!r})"
    return (
        f"<p>In a terminal:</p><pre>{escape(shell)}</pre><p>In JAX:</p><pre>{escape(ours)}</pre>"
        f"<p>In PyTorch, after <code>train.convert</code>:</p><pre>{escape(torch)}</pre>"
    )


def _config(run: RunFiles) -> str:
    plain = {key: value for key, value in run.config.items() if not isinstance(value, Mapping)}
    sections = {**({"run": plain} if plain else {}), **{k: v for k, v in run.config.items() if isinstance(v, Mapping)}}
    tables = []
    for name, values in sections.items():
        rows = "".join(
            f"<tr><th>{escape(str(key))}</th><td>{escape(_text(value))}</td></tr>" for key, value in values.items()
        )
        tables.append(f"<div><h3>{escape(name)}</h3><table>{rows}</table></div>")
    return f'<div class="columns">{"".join(tables)}</div>' if tables else ""


def _footer(run: RunFiles) -> str:
    summary = run.summary
    parts = [
        "Made by ssm_jax from the files in the run folder",
        f"JAX {summary['jax']}" if "jax" in summary else "",
        f"compiled in {duration(summary['compile_s'])}" if summary.get("compile_s") else "",
    ]
    return f"<footer>{escape(' · '.join(part for part in parts if part))}</footer>"


def duration(seconds: Number) -> str:
    """5.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def size(count: Number) -> str:
    """12 kB, 3.4 MB, 1.5 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _series(
    rows: list[Row], key: str, name: str, tone: str = "a", *, factor: float = 1.0, band: bool = False
) -> Series:
    points = [(row["step"], row[key]) for row in rows if key in row and "step" in row]
    return Series(name, [x for x, _ in points], [None if y is None else y * factor for _, y in points], tone, band)


def _bits_per_byte(run: RunFiles) -> Number | None:
    """From the evaluation of the whole split, else from the last one while training."""
    if "model" in run.scores:
        return run.scores["model"].get("bits_per_byte")
    return run.evaluations[-1].get("eval/bits_per_byte") if run.evaluations else None


def _baseline(run: RunFiles) -> Number | None:
    return run.scores.get("baseline", {}).get("bits_per_byte")


def _baseline_name(run: RunFiles) -> str:
    return f"order-{run.scores.get('baseline', {}).get('order', '?')} byte model"


def _device(summary: Mapping[str, Any]) -> str:
    devices = summary["devices"]
    return f"{devices.get('count', 1)} x {devices.get('kind', '?')}"


def _maybe(form: Callable[[Any], str], value: Any) -> str | None:
    return None if value is None or not math.isfinite(value) else form(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_json(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"File {path} is not valid JSON ({error}); remove it or write it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"File {path} does not hold a JSON object; remove it or write it again.")
    return content


def _read_lines(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; a torn last line, of a run that is being written, is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise DataError(f"File {path} holds a line that is not JSON ({error}); remove that line.") from error
