"""Losses by the length of the context: against whole windows read at once, target by target; the script and its page."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import ssm_jax
from ssm_jax.config import main
from ssm_jax.data.pipeline import stored_documents
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import PackedDataset, open_dataset
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation import evaluate_lengths
from ssm_jax.evaluation.intervals import estimate
from ssm_jax.evaluation.lengths import context_limit, parse_lengths
from ssm_jax.evaluation.windows import cut_stretches, window_losses
from ssm_jax.models import LanguageModel, registry
from tests.evaluation.test_report import _Page
from tests.generation.tiny import FAMILIES, full_logits, tiny
from train import evaluate as script
from train import report as report_script

ROW = 16  # tokens of a training row
CHARACTERS = (40, 63, 100, 131, 200, 64, 70)  # of the held-out documents: targets are one more, the end mark


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i, size in enumerate((90, *CHARACTERS)):
        (folder / f"{i}.txt").write_bytes(bytes(rng.integers(97, 123, size).tolist()))
    held_out = find_sources([folder / f"{i + 1}.txt" for i in range(len(CHARACTERS))])
    out, train = folder / "prepared", find_sources([folder / "0.txt"])
    prepare(train, out, load_tokenizer("bytes"), Settings(seq_len=ROW), validation_files=held_out)
    return out


@pytest.fixture(scope="module")
def held_out(prepared: Path) -> PackedDataset:
    return open_dataset(prepared, "validation")


@pytest.fixture(scope="module")
def run_folder(prepared: Path) -> Path:
    folder = prepared.parent / "run"
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    ssm_jax.save_pretrained(model, params, folder, layout="ssm_jax", tokenizer=ByteTokenizer())
    (folder / "config.yaml").write_text(f"data: {{path: {prepared}, seq_len: {ROW}}}\n", encoding="utf-8")
    return folder


def _bytes_model(family: str = "mamba") -> tuple[LanguageModel, Any]:
    return tiny(family, ByteTokenizer.vocab_size)


def _direct(model: LanguageModel, params: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of the targets of one window, read at once, float64 from the logits on."""
    logits = np.asarray(full_logits(model, params, inputs[None].astype(np.int32)), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]


def _expected(model: LanguageModel, params: Any, dataset: PackedDataset, stretch: int, length: int) -> list[np.ndarray]:
    """The losses of each long document's targets, written out window by window."""
    found = []
    for document in stored_documents(dataset):
        used = (len(document) - 1) // stretch * stretch
        windows = [slice(start, start + length) for start in range(0, used, length)]
        parts = [_direct(model, params, document[:-1][window], document[1:][window]) for window in windows]
        if parts:
            found.append(np.concatenate(parts))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_whole_windows_read_afresh(family: str, held_out: PackedDataset) -> None:
    model, params = _bytes_model(family)
    result = evaluate_lengths(model, params, held_out, [8, 32, 64], batch_size=2, piece=24)
    used = [(size + 1) // 64 * 64 for size in CHARACTERS]
    assert result["targets"] == sum(used) == 64 * result["stretches"]
    assert (result["documents"], result["documents_left_out"]) == (sum(map(bool, used)), used.count(0)) == (6, 1)
    assert result["interval_over"] == "documents"
    short = _expected(model, params, held_out, 64, 8)
    for row in result["lengths"]:
        losses = _expected(model, params, held_out, 64, row["length"])
        every = np.concatenate(losses)
        assert row["loss"] == pytest.approx(every.mean(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(every.mean()), rel=1e-5)
        tail = every.reshape(-1, row["length"])[:, row["length"] // 2 :]
        assert row["tail_loss"] == pytest.approx(tail.mean(), rel=1e-5)
        change = np.array([a.sum() - b.sum() for a, b in zip(losses, short, strict=True)])
        mean, counts = change.sum() / len(every), np.array([len(part) for part in losses])
        error = math.sqrt(6 / 5 * np.square(change - mean * counts).sum()) / len(every)
        half = stats.t.ppf(0.975, 5) * error
        assert row["relative_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert row["relative_interval"] == pytest.approx([math.exp(mean - half), math.exp(mean + half)], rel=1e-4)
    assert result["lengths"][0]["relative_interval"] == [1, 1], "a model does not differ from itself"


def test_losses_by_position_are_those_of_the_longest_windows(held_out: PackedDataset) -> None:
    model, params = _bytes_model()
    found = evaluate_lengths(model, params, held_out, [8, 64])["by_position"]
    assert (found["length"], found["reference"]) == (64, 8)
    long, short = (np.concatenate(_expected(model, params, held_out, 64, length)).reshape(-1, 64) for length in (64, 8))
    assert [part["from"] for part in found["linear"]] == list(range(64))
    assert [part["from"] for part in found["powers"]] == [0, 1, 2, 4, 8, 16, 32]
    for part in found["linear"] + found["powers"]:
        inside = slice(part["from"], part["below"])
        assert part["loss"] == pytest.approx(long[:, inside].mean(), rel=1e-5)
        assert part["reference_loss"] == pytest.approx(short[:, inside].mean(), rel=1e-5)
        ratio = math.exp((long - short)[:, inside].mean())
        assert part["relative_perplexity"] == pytest.approx(ratio, rel=1e-5)
    assert found["powers"][-1]["below"] == 64
    assert all(part["relative_interval"] == pytest.approx([1, 1]) for part in found["linear"][:8]), (
        "nothing was cut yet"
    )


@pytest.mark.parametrize(("batch_size", "piece"), [(1, 1000), (3, 7), (16, 48), (2, 1)])
def test_neither_pieces_nor_batches_change_a_target(batch_size: int, piece: int) -> None:
    model, params = tiny("mamba2")
    tokens = np.random.default_rng(1).integers(0, 61, (3, 97)).astype(np.int32)
    for length in (8, 96):
        expected = np.stack(
            [
                np.concatenate(
                    [
                        _direct(model, params, row[i : i + length], row[i + 1 : i + length + 1])
                        for i in range(0, 96, length)
                    ]
                )
                for row in tokens
            ]
        )
        got = window_losses(model, params, tokens, length, batch_size, piece)
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_stretches_hold_every_target_once() -> None:
    documents = [np.arange(start, start + size, dtype=np.int32) for start, size in ((0, 17), (100, 16), (200, 40))]
    stretches, origins = cut_stretches(documents, 8)
    assert stretches[:, 1:].ravel().tolist() == [*range(1, 17), *range(101, 109), *range(201, 233)]
    assert (stretches[:, :-1] + 1).tolist() == stretches[:, 1:].tolist(), "a token's target is the next one"
    assert origins.tolist() == [0, 0, 1, 2, 2, 2, 2]


def test_the_error_of_a_mean_is_that_of_independent_units() -> None:
    losses = np.array([1.0, 2.0, 4.0, 9.0])
    sums, ones = losses * 10, np.full(4, 10.0)
    found = estimate(sums, ones, np.arange(4))
    assert found.mean == pytest.approx(4.0)
    assert found.error == pytest.approx(losses.std(ddof=1) / 2)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 3) * found.error)
    pairs = estimate(np.repeat(sums, 2), np.repeat(ones, 2), np.repeat(np.arange(4), 2))
    assert pairs == pytest.approx(found), "counting everything twice teaches nothing"
    assert math.isnan(estimate(sums, ones, np.zeros(4, int)).error), "one unit has no spread"


def test_auto_goes_as_far_as_documents_do(held_out: PackedDataset) -> None:
    model, params = _bytes_model()
    result = evaluate_lengths(model, params, held_out, training_length=ROW)
    assert [row["length"] for row in result["lengths"]] == [16, 32, 64, 128]
    assert result["left_out"] == [{"length": n, "reason": "no document is that long"} for n in (256, 512, 1024)]
    assert (result["longest_document"], result["stretch"], result["documents"]) == (201, 128, 2)
    assert result["interval_over"] == "stretches", "two documents say little about the spread between documents"
    one = evaluate_lengths(model, params, held_out, [50, 200])
    assert one["stretches"] == 1
    assert [row["relative_interval"] for row in one["lengths"]] == [None, None]
    assert [row["se"] for row in one["lengths"]] == [None, None]


def test_a_limited_context_leaves_out_lengths_and_no_targets(
    held_out: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = _bytes_model()
    assert context_limit(model) is None
    free = evaluate_lengths(model, params, held_out, [8, 32, 64])

    def limit_to(limit: int) -> None:
        family = dataclasses.replace(registry.FAMILIES["mamba"], context_limit=lambda config: limit)
        monkeypatch.setitem(registry.FAMILIES, "mamba", family)

    limit_to(40)
    places = np.random.default_rng(0).normal(0, 0.4, (40, model.config.d_model)).astype(np.float32)
    params = {**params, "embed_position": {"embedding": places}}
    limited = evaluate_lengths(model, params, held_out, [8, 32, 64])
    assert limited["context_limit"] == 40
    assert limited["left_out"] == [{"length": 64, "reason": "beyond the model's context"}]
    assert limited["targets"] == free["targets"]
    for row in limited["lengths"]:
        expected = np.concatenate(_expected(model, params, held_out, 64, row["length"])).mean()
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert limited["by_position"]["length"] == 32
    limit_to(4)
    with pytest.raises(DataError, match="context ends at 4 tokens"):
        evaluate_lengths(model, params, held_out, [8, 32, 64])


def test_what_is_not_finite_is_none(held_out: PackedDataset) -> None:
    model, params = _bytes_model()
    broken = {**params, "norm_f": {"scale": params["norm_f"]["scale"] * np.nan}}
    result = evaluate_lengths(model, broken, held_out, [8, 64])
    assert {row["loss"] for row in result["lengths"]} == {None}
    assert "NaN" not in json.dumps(result)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8,x", "not whole numbers"),
        ("", "not whole numbers"),
        ("64,8", "ascending"),
        ("8,8", "ascending"),
        ("0,8", "positive"),
        ("-8,8", "positive"),
        ("8,24,64", "Length 24 does not divide the longest, 64"),
    ],
)
def test_lengths_that_cannot_be_compared_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_lengths(text)


def test_lengths_are_read_as_they_are_written() -> None:
    assert parse_lengths("8, 32,64") == (8, 32, 64)
    assert parse_lengths("auto") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda data: evaluate_lengths(*_bytes_model(), data, [8, 256]),
            r"No document .* has 256 targets \(the longest",
        ),
        (lambda data: evaluate_lengths(*_bytes_model(), data, training_length=202), "has 202 targets"),
        (lambda data: evaluate_lengths(*_bytes_model(), data), "name the lengths"),
        (lambda data: evaluate_lengths(*_bytes_model(), data, []), "ascending"),
        (lambda data: evaluate_lengths(*tiny("mamba"), data, [8]), "has 257 token ids and the model 61"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    call: Callable[[PackedDataset], Any], message: str, held_out: PackedDataset
) -> None:
    with pytest.raises(DataError, match=message):
        call(held_out)


def test_the_script_writes_scores_a_page_and_the_report(
    run_folder: Path, held_out: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.run([str(run_folder), "--lengths", "--json", str(tmp_path / "scores.json")])
    printed = " ".join(capsys.readouterr().out.split())
    scores = json.loads((run_folder / "lengths.json").read_text())
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (scores["split"], scores["step"], scores["training_length"]) == ("validation", 0, ROW)
    expected = evaluate_lengths(*_bytes_model(), held_out, training_length=ROW)
    assert scores["lengths"] == expected["lengths"]
    longest = scores["lengths"][-1]
    assert f"128 {longest['loss']:.4f} {longest['se']:.4f} {longest['tail_loss']:.4f}" in printed
    assert f"{longest['relative_perplexity']:.4f} [{longest['relative_interval'][0]:.4f}," in printed
    assert "Length 1,024 left out: no document is that long." in printed
    for path in (run_folder / "lengths.html", tmp_path / "scores.html"):
        assert str(path) in printed
        page = _Page(path.read_text())
        assert page.tags.count("figure") == 4, "ratio and loss, by length and by position"
        assert "script" not in page.tags
    report_script.run([str(run_folder)])
    report = _Page((run_folder / "report.html").read_text())
    assert "Longer contexts" in report.text
    assert "Perplexity relative to the shortest context" in report.text
    assert f"validation split of {held_out.path}" in (run_folder / "lengths.html").read_text()
    script.run([str(run_folder), "--lengths", "32,64"])
    assert [row["length"] for row in json.loads((run_folder / "lengths-32_64.json").read_text())["lengths"]] == [32, 64]
    assert json.loads((run_folder / "lengths.json").read_text()) == scores
    assert not list(run_folder.glob("*.tmp"))


def test_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    rows = [
        {"length": n, "loss": 2.0, "relative_perplexity": r, "relative_interval": [r - 0.1, r + 0.1]}
        for n, r in ((64, 1.0), (128, 0.9))
    ]
    counts = {"targets": 256, "stretch": 128, "stretches": 2, "documents": 2, "documents_left_out": 0}
    for name, data in (("one", "a"), ("two<b>", "a"), ("three", "other"), ("none", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
        if data:
            (tmp_path / name / "lengths.json").write_text(json.dumps({"data": data, "lengths": rows, **counts}))

    def compared(*names: str) -> _Page:
        out = tmp_path / "page.html"
        report_script.run([*(str(tmp_path / name) for name in names), "--out", str(out)])
        return _Page(out.read_text())

    page = compared("one", "two<b>", "none")
    assert page.tags.count("figure") == 2, "positions are for a single run"
    assert "two<b>" in page.text
    assert [page.attributes.count(("class", f"band {tone}")) for tone in "abc"] == [1, 1, 0]
    assert "not scored on the same targets" not in "".join(page.text)
    assert "not scored on the same targets" in "".join(compared("one", "three").text)


def test_the_script_refuses_options_that_do_not_go_together(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate", str(run_folder), *arguments])
        with pytest.raises(SystemExit) as stopped:
            main(script.run)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "neither --task nor" in error("--lengths", "8,16", "--window", "8", "--stride", "4")
    assert "let it end in .json" in error("--lengths", "8,16", "--json", "scores.html")
    assert "does not divide" in error("--lengths", "8,20")
    assert "choose shorter lengths" in error("--lengths", "1024")
