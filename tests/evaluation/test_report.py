"""The page of a run: every section from its file, nothing from a file unescaped, axes that fit."""

import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from ssm_jax.errors import UserError
from ssm_jax.evaluation.charts import Level, Series, bars, line_chart, nice_ticks, number
from ssm_jax.evaluation.compare import render_comparison
from ssm_jax.evaluation.report import duration, read_run, render, size, training_losses, write_report
from train import report as script

HOSTILE = "</pre><script>alert(1)</script> & \"quotes\" 'too'"
VOID = {"meta", "line", "circle", "polyline", "polygon", "rect", "path"}


class _Page(HTMLParser):
    """Collects the text, and fails on tags that do not close in order."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def _json_lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _metrics() -> str:
    steps = [
        {"step": step, "loss": 4 / step, "lr": 1e-3, "grad_norm": 0.5, "param_norm": 9, "tokens_per_s": 1000.0 + step}
        for step in range(1, 21)
    ]
    steps[6]["grad_norm"] = None  # what is not finite is null in the file
    evaluations = [{"step": step, "eval/loss": 5 / step, "eval/bits_per_byte": 6 / step} for step in (10, 20)]
    return _json_lines(*steps, *evaluations)


CONFIG = {
    "output": HOSTILE,
    "model": {"family": "mamba", "d_model": 64, "n_layers": 3, "x": HOSTILE},
    "data": {"path": "data/text"},
}
SUMMARY = {
    "finished": True,
    "parameters": 363521,
    "tokens": 81920,
    "seconds": 61.0,
    "tokens_per_s": 1343.0,
    "memory": {"peak_host_bytes": 912_000_000, "step_temp_bytes": 61_000_000},
    "devices": {"kind": HOSTILE, "count": 8},
    "jax": "0.10.2",
    "compile_s": 3.0,
}
SCORES = {"bits_per_byte": 1.6161, "bits_per_token": 1.6, "perplexity": 3.0, "loss": 1.1, "tokens": 5010, "bytes": 5000}
BASELINE = {"order": 3, "bits_per_byte": 2.0712, "bytes": 5000}
SAMPLES = (
    {"step": 10, "prompt": "def ", "text": "early"},
    {"step": 20, "prompt": HOSTILE, "text": HOSTILE},
)
FILES = {
    "config.yaml": yaml.safe_dump(CONFIG),
    "metrics.jsonl": _metrics(),
    "samples.jsonl": _json_lines(*SAMPLES),
    "summary.json": json.dumps(SUMMARY),
    "eval.json": json.dumps({"split": "validation", "step": 20, "model": SCORES, "baseline": BASELINE}),
}
SECTIONS = {
    "Loss": "metrics.jsonl",
    "Held-out text": "eval.json",
    "What it writes": "samples.jsonl",
    "Speed and optimisation": "metrics.jsonl",
    "Memory": "summary.json",
    "Use it": "config.yaml",
    "Configuration": "config.yaml",
}


def _run(folder: Path, *left_out: str) -> _Page:
    for name, content in FILES.items():
        if name not in left_out:
            (folder / name).write_text(content, encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    return _Page(page)


def test_every_section_shows_what_its_file_says(tmp_path: Path) -> None:
    page = _run(tmp_path)
    text = "".join(page.text)
    for section in SECTIONS:
        assert section in page.text, section
    for shown in (
        "1.616",
        "2.071",
        "364k",
        "81.9k",
        "1 min 1 s",
        "912 MB",
        "mamba language model, 3 layers of width 64",
        "8 x ",
    ):
        assert shown in text, shown
    assert f"python -m train.generate {tmp_path}" in text
    assert "--data data/text" in text
    assert page.tags.count("figure") == 5, "loss, throughput, learning rate, two norms"


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    page = _run(tmp_path)
    assert "script" not in page.tags
    assert "".join(page.text).count(HOSTILE) >= 5, "it is there, as text"
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = _run(tmp_path)
    assert not {"img", "link", "script", "iframe"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme:dark" in style[1]


@pytest.mark.parametrize("file", FILES)
def test_an_absent_file_is_a_section_left_out(file: str, tmp_path: Path) -> None:
    page = _run(tmp_path, file)
    for section, source in SECTIONS.items():
        assert (section in page.text) == (source != file), section


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "lo', encoding="utf-8")
    page = _Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("figure") == 1
    assert "nats per token" in page.text, "no evaluation yet, so the ratio to bytes is not known"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, "holds nothing of a run"),
        (lambda folder: folder.rmdir(), "does not exist"),
        (lambda folder: (folder / "eval.json").write_text("{"), "eval.json is not valid JSON"),
        (lambda folder: (folder / "eval.json").write_text("[]"), "eval.json does not hold a JSON object"),
        (
            lambda folder: (folder / "metrics.jsonl").write_text("{}\nx\n"),
            "metrics.jsonl holds a line that is not JSON",
        ),
        (lambda folder: (folder / "config.yaml").write_text("a: ["), "config.yaml is not valid YAML"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(UserError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def _other_run(folder: Path, name: str, shift: float, **config: Any) -> Path:
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"output": name, "optim": {"lr": 0.1}, "seed": 0, **config}))
    rows = [{"step": i, "loss": 2.0 + shift + 1 / i, "tokens_per_s": 100.0 + i} for i in range(1, 9)]
    rows.append({"step": 8, "eval/loss": 2.5 + shift, "eval/bits_per_byte": 3.0 + shift})
    (run / "metrics.jsonl").write_text(_json_lines(*rows))
    (run / "summary.json").write_text(json.dumps({"parameters": 1000, "tokens_per_s": 200.0}))
    return run


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [_other_run(tmp_path, name, shift, seed=i) for i, (name, shift) in enumerate([("base", 0.0), ("<b>", 0.25)])]
    out = tmp_path / "page.html"
    script.run([str(runs[1]), "--baseline", str(runs[0]), "--out", str(out)])
    assert "written to" in capsys.readouterr().out
    shown = _Page(out.read_text())
    text = " ".join(" ".join(shown.text).split())
    assert "Training loss less that of base" in text
    assert "2.7500 (+10.0%)" in text
    assert "3.2500" not in text, "bits per byte of rows are not those of whole documents"
    assert "seed 0 1" in text, "what differs"
    assert "optim.lr" not in text, "what does not"
    assert "script" not in shown.tags
    script.run([str(run) for run in runs] + ["--out", str(out)])
    assert "less that of" not in out.read_text()
    with pytest.raises(UserError, match="named twice"):
        script.run([str(runs[0]), "--baseline", str(runs[0]), "--out", str(out)])


def _taught(folder: Path) -> Path:
    """A run that took the data and the teacher in turn, and whose KL is far above its cross entropy."""
    run = _other_run(folder, "taught", 0.0)
    turns = [{"ce": 3.0 - i / 10} if i % 2 else {"kl": 70.0 + i} for i in range(1, 9)]
    steps = [{"step": i, "loss": next(iter(turn.values())), **turn} for i, turn in enumerate(turns, start=1)]
    last = {"step": 8, "eval/loss": 2.5, "eval/bits_per_byte": 5.0}
    (run / "metrics.jsonl").write_text(_json_lines(*steps, last))
    return run


def test_what_a_teacher_teaches_is_no_loss_on_the_data(tmp_path: Path) -> None:
    run = read_run(_taught(tmp_path))
    assert [(row["step"], row["loss"]) for row in training_losses(run)] == [(i, 3.0 - i / 10) for i in (1, 3, 5, 7)]
    page = render(run)
    figures = {re.findall("<b>(.*?)</b>", part)[0]: part for part in page.split("<figure>")[1:]}
    assert "step 7 · training 4.6" in figures["Loss"], "2.3 nats per token, 2 bits per byte each"
    assert "step 8 · training 78<" in figures["Divergence from the teacher"]
    plain = read_run(_other_run(tmp_path, "plain", 0.5))
    assert training_losses(plain) == plain.steps
    assert "Divergence" not in render(plain)
    page = render_comparison([plain, run], against_first=True)
    figures = {re.findall("<b>(.*?)</b>", part)[0]: part for part in page.split("<figure>")[1:]}
    for title in ("Training loss", "Training loss less that of plain", "Divergence from the teacher"):
        line = re.search(r'<polyline class="line b" points="([^"]*)"', figures[title])
        assert line, title
        assert len(line[1].split()) == 4, title
    assert f"taught {2.3 - (2.5 + 1 / 7):.4g}<" in figures["Training loss less that of plain"]


def test_losses_by_context_have_bars(tmp_path: Path) -> None:
    run = _other_run(tmp_path, "run", 0.0)
    parts = [{"below": 1, "loss": 2.0, "tokens": 3.0}, {"below": 2048, "loss": 1.0, "tokens": 5.0}]
    (run / "eval.json").write_text(json.dumps({"model": {"bits_per_byte": 2.0, "by_context": parts}}))
    text = " ".join(_Page(write_report(run).read_text()).text)
    assert f"1,024 to 2,047 tokens {1 / math.log(2):.3f}" in " ".join(text.split())


def test_the_script_names_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n', encoding="utf-8")
    script.run([str(tmp_path)])
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def _coordinates(figure: str) -> list[tuple[float, float]]:
    points = re.search(r'<polyline class="line a" points="([^"]*)"', figure)
    assert points
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points[1].split())]


def test_a_line_maps_data_to_the_plane() -> None:
    figure = line_chart([Series("s", [0, 50, 100], [1.0, 3.0, 2.0])], title="t", y_label="y", width=480, from_zero=True)
    (x0, y0), (x1, y1), (x2, y2) = _coordinates(figure)
    assert (x0, x1, x2) == (64, 264, 464)
    zero = 2 * y0 - y2
    assert y1 == pytest.approx(zero + 3 * (y0 - zero), abs=0.3), "heights above zero are as 1 to 3 to 2"
    assert y1 < y2 < y0, "upwards is more"


def test_long_series_are_means_of_stretches_with_their_range() -> None:
    steps = list(range(1600))
    values = [float(step % 10) for step in steps]
    figure = line_chart([Series("s", steps, values, band=True)], title="t", y_label="y")
    ys = [y for _, y in _coordinates(figure)]
    assert len(ys) == 160
    assert max(ys) - min(ys) < 10, "each stretch of ten has the mean 4.5"
    assert 'class="band a"' in figure


def test_a_steep_start_does_not_set_the_scale() -> None:
    values = [1000.0, *([1.0, 2.0] * 50)]
    figure = line_chart([Series("s", range(101), values)], title="t", y_label="y")
    ys = [y for _, y in _coordinates(figure)]
    assert max(ys[1:]) - min(ys[1:]) > 100
    assert "1,000" not in re.sub(r'<g class="strip">.*', "", figure), "the axis ends far below it"


def test_doublings_are_equally_far_apart_on_an_axis_of_powers() -> None:
    line = Series("s", [24, 48, 96], [3.0, 2.0, 1.0])
    figure = line_chart([line], title="t", y_label="y", x_label="tokens", width=480, x_log2=True, whole=True)
    assert [x for x, _ in _coordinates(figure)] == [64, 264, 464]
    assert re.findall(r'text-anchor="(?:middle|end)">(\d+)</text>', figure)[-3:] == ["24", "48", "96"]
    assert "tokens 48 · s 2" in figure


def test_intervals_are_shaded_and_nothing_is_cut_off_where_all_is_to_be_seen() -> None:
    intervals = [(40.0, 60.0), None, (0.5, 1.5)]
    line = Series("s", [1, 50, 100], [50.0, 2.0, 1.0], band=True, intervals=intervals)
    figure = line_chart([line], title="t", y_label="y", whole=True)
    shaded = re.search(r'<polygon class="band a" points="([^"]*)"', figure)
    assert shaded
    ys = [float(pair.split(",")[1]) for pair in shaded[1].split()]
    (_, first), (_, second), _ = _coordinates(figure)
    scale = (second - first) / 48
    assert ys[0] == pytest.approx(first - 10 * scale, abs=0.3)
    assert ys[-1] == pytest.approx(first + 10 * scale, abs=0.3)
    assert ys[1] == ys[-2] == second, "an interval that is not known has no width"
    assert min(ys) > 24, "within the axes"


def test_what_is_not_finite_is_left_out() -> None:
    assert line_chart([Series("s", [1, 2], [None, float("nan")])], title="t", y_label="y") == ""
    assert line_chart([], title="t", y_label="y") == ""
    figure = line_chart([Series("s", [1, 2, 3], [1.0, None, 2.0])], title="t", y_label="y", levels=[Level("l", 1.5)])
    assert len(_coordinates(figure)) == 2
    assert "nan" not in figure


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_single_point_is_drawn(value: float) -> None:
    figure = line_chart([Series("s", [5], [value])], title="t", y_label="y", from_zero=True)
    assert len(_coordinates(figure)) == 1
    assert "circle" in figure


def test_hovering_shows_the_values_of_all_lines() -> None:
    lines = [Series("one", [1, 2, 3], [0.5, 0.25, 0.125]), Series("two", [2], [7.0], "b")]
    figure = line_chart(lines, title="t", y_label="y")
    shown = re.findall(r"<text[^>]*>(step[^<]*)</text></g></g>", figure)
    assert shown == ["step 1 · one 0.5", "step 2 · one 0.25 · two 7", "step 3 · one 0.125"]


@hypothesis.given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_round_inside_and_few(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    slack = 1e-6 * span + 4 * math.ulp(abs(low) + span)  # the ticks themselves are rounded
    assert len(ticks) <= count
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)
    for one, next_one in itertools.pairwise(ticks):
        step = next_one - one
        leading = step / 10 ** math.floor(math.log10(step * 1.0001))
        assert min(abs(leading - round_number) for round_number in (1, 2, 5)) < 1e-2


def test_numbers_are_short() -> None:
    texts = {
        0.00123: "0.00123",
        1.5: "1.5",
        1234.4: "1,234",
        45678: "45.7k",
        7.891e6: "7.89M",
        1.2e9: "1.2G",
        -20000: "-20k",
    }
    assert {value: number(value) for value in texts} == texts
    assert [duration(value) for value in (5.21, 42, 200, 7500)] == ["5.2 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert [size(value) for value in (12_300, 3.4e6, 1.5e9)] == ["12.3 kB", "3.4 MB", "1.5 GB"]


def test_bars_are_in_proportion_and_escaped() -> None:
    text = bars([("<a>", 50.0, "half"), ("b", 100.0, "whole")])
    assert re.findall(r"width:([\d.]+)%", text) == ["50.0", "100.0"]
    assert "&lt;a&gt;" in text
