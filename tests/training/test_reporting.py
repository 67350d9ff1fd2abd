"""The bar and the lines a person sees, and the files that outlive the run."""

import io
import json
from pathlib import Path

from rich.console import Console

from ssm_jax.training.config import LogConfig
from ssm_jax.training.metrics import Meter, MetricsLog, truncate
from ssm_jax.training.progress import TrainingProgress

QUIET = LogConfig(tensorboard=False)
ROW = {"step": 3, "loss": 1.25, "tokens_per_s": 12345.6, "lr": 1e-3, "step_s": 90.0}


def shown(terminal: bool) -> str:
    stream = io.StringIO()
    with TrainingProgress(Console(file=stream, force_terminal=terminal, width=160, highlight=False)) as progress:
        progress.start(2, 43)
        progress.update(ROW)
        progress.update(ROW)
        progress.note("a [red]sample[/red] :smile:\x1b]0;title\x07")
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "step 3/43  loss 1.2500  12,346 tokens/s  lr 1.00e-03  1:00:00 left",
        "a [red]sample[/red] :smile:\ufffd]0;title\ufffd",
    ]


def test_a_bar_in_a_terminal() -> None:
    text = shown(terminal=True)
    assert "loss 1.2500  12,346 tokens/s" in text
    assert "3/43" in text
    assert "a [red]sample[/red] :smile:" in text


def test_metrics_log_writes_strict_json_and_goes_on(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, QUIET, {}) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": float("nan") if step == 1 else 0.1 * step})
            log.sample(step, "é", "\u2028 text")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write('{"step": 1, "text": "é'.encode()[:-1])
    with MetricsLog(tmp_path, 2, QUIET, {}) as log:
        log.write({"step": 3, "loss": 7.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 7.0}]
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in samples if line] == ["\u2028 text"] * 2


def test_truncating_what_is_not_there(tmp_path: Path) -> None:
    truncate(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_meter_counts_on_after_a_restart() -> None:
    meter = Meter()
    first = meter.row(1, {"loss": 1.0, "weight": 10.0}, batch_size=8)
    assert first["tokens"] == 10.0
    assert first["tokens_per_s"] * first["step_s"] > 9.99
    going_on = Meter(**meter.counts())
    again = going_on.row(2, {"loss": 1.0, "weight": 5.0}, batch_size=4)
    assert again["tokens"] == 15.0
    assert going_on.rows == 12
    assert again["seconds"] > first["seconds"]
