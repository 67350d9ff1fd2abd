"""Scores against a float64 sum over plain logits; the script on prepared data."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.config import main
from ssm_jax.data.pipeline import stored_documents
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import open_dataset
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation import documents, evaluate, evaluate_baseline, evaluate_documents, evaluate_split, ngram
from ssm_jax.evaluation.perplexity import _token_nll
from ssm_jax.evaluation.split import byte_documents
from ssm_jax.models import LanguageModel
from ssm_jax.models.registry import context_limit
from tests.generation.tiny import FAMILIES, full_logits, tiny
from train import evaluate as script

LENGTH = 24


def _batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two documents each, the last token of every document without a target, absent places at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 61, (rows, LENGTH)).astype(np.int32)
    positions = np.tile(np.r_[np.arange(9), np.arange(11), [-1] * 4].astype(np.int32), (rows, 1))
    weights = np.ones((rows, LENGTH), np.float32)
    weights[:, [8, 19, 20, 21, 22, 23]] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "weights": weights}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_definition(family: str) -> None:
    model, params = tiny(family)
    batch = _batch(3)
    total = 0.0
    for row in range(3):
        for start, end in ((0, 9), (9, 20)):
            tokens = np.zeros((1, LENGTH), np.int32)
            tokens[0, : end - start] = batch["tokens"][row, start:end]
            logits = np.asarray(full_logits(model, params, tokens), np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            total -= sum(log_p[i, batch["targets"][row, start + i]] for i in range(end - start - 1))
    scores = evaluate(model, params, [batch], text_bytes=40)
    assert scores["tokens"] == 3 * 18
    assert scores["loss"] == pytest.approx(total / 54, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / 54), rel=1e-5)
    assert scores["bits_per_token"] == pytest.approx(total / 54 / math.log(2), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / 40, rel=1e-5)
    assert scores["bytes"] == 40


def test_batching_does_not_matter_and_compiles_once_per_shape() -> None:
    model, params = tiny("mamba")
    whole = _batch(12)
    expected = evaluate(model, params, [whole])
    before = _token_nll._cache_size()
    parts = [{name: array[i : i + 4] for name, array in whole.items()} for i in range(0, 12, 4)]
    got = evaluate(model, params, iter(parts))
    assert _token_nll._cache_size() == before + 1
    assert got["tokens"] == expected["tokens"]
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_what_has_no_weight_has_no_influence() -> None:
    model, params = tiny("mamba")
    batch = _batch(2)
    changed = {name: array.copy() for name, array in batch.items()}
    changed["targets"][batch["weights"] == 0] = 17
    changed["tokens"][batch["positions"] < 0] = 5
    assert evaluate(model, params, [changed]) == evaluate(model, params, [batch])


def test_fractional_weights_weigh() -> None:
    model, params = tiny("mamba")
    batch = _batch(2)
    doubled = {**batch, "weights": batch["weights"] * np.array([[1.0], [3.0]], np.float32)}
    each = [evaluate(model, params, [{k: v[i : i + 1] for k, v in batch.items()}])["loss"] for i in (0, 1)]
    assert evaluate(model, params, [doubled])["loss"] == pytest.approx((each[0] + 3 * each[1]) / 4, rel=1e-6)


def _documents(lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 61, length).astype(np.int32) for length in lengths]


def _definition(model: LanguageModel, params: Any, document: np.ndarray) -> np.ndarray:
    """-log p of every target of a document, each seeing all before it, float64."""
    padded = np.zeros((1, 64 if len(document) <= 65 else 80), np.int32)
    padded[0, : len(document) - 1] = document[:-1]
    logits = np.asarray(full_logits(model, params, padded), np.float64)[0, : len(document) - 1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, document[1:, None], axis=1)[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "window"), [(1, 7), (3, 16), (8, 100)])
def test_endless_context_sees_whole_documents(family: str, count: int, window: int) -> None:
    model, params = tiny(family)
    found = _documents((min(70, context_limit(model.config) or 70), 2, 33, 1, 16, 50))
    expected = np.concatenate([_definition(model, params, document) for document in found])
    scores = evaluate(model, params, documents.endless(documents.lanes(found, count), window), carry=True)
    assert scores["tokens"] == len(expected)
    assert scores["loss"] == pytest.approx(expected.mean(), rel=1e-5)


def test_documents_that_begin_with_a_call_are_read_whole() -> None:
    """Baka's: each begins with a batch, in whichever lane and place it comes."""
    model, params = tiny("baka")
    found = _documents((70, 2, 33, 1, 16, 50))
    expected = np.concatenate([_definition(model, params, document) for document in found])
    batches = list(documents.endless(documents.lanes(found, 3), 16, aligned=True))
    assert not any((batch["positions"][:, 1:] == 0).any() for batch in batches)
    scores = evaluate(model, params, batches, carry=True)
    assert scores["tokens"] == len(expected)
    assert scores["loss"] == pytest.approx(expected.mean(), rel=1e-5)


def test_losses_by_context_are_those_of_the_definition() -> None:
    model, params = tiny("mamba")
    found = _documents((70, 2, 33, 1, 16, 50))
    losses = [_definition(model, params, document) for document in found]
    scores = evaluate(model, params, documents.endless(documents.lanes(found, 2), 16), carry=True)
    assert [part["below"] for part in scores["by_context"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    for part in scores["by_context"]:
        inside = np.concatenate([loss[part["below"] // 2 : part["below"]] for loss in losses])
        assert part["tokens"] == len(inside)
        assert part["loss"] == pytest.approx(inside.mean(), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (16, 1), (100, 3)])
def test_sliding_windows_count_every_target_once_with_enough_context(window: int, stride: int) -> None:
    model, params = tiny("mamba")
    found = _documents((70, 2, 33, 16))
    expected = []
    for document in found:
        for target in range(1, len(document)):
            # The first of the windows [0, w), [s, s + w), ... that reads the token before the target.
            start = max(0, -(-(target - window) // stride) * stride)
            expected.append(_definition(model, params, document[start : target + 1])[-1])
    scores = evaluate(model, params, documents.sliding(found, window, stride, batch_size=4))
    assert scores["tokens"] == len(expected)
    assert scores["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_nothing_to_score_is_an_error() -> None:
    model, params = tiny("mamba")
    with pytest.raises(ValueError, match="no target"):
        evaluate(model, params, [])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        text = "".join(f"line {i} of {n} and {n * i}\n" for n in range(6 + i))
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    out = folder / "prepared"
    held_out = find_sources([folder / "10.txt", folder / "11.txt"])
    prepare(
        find_sources([folder / f"{i}.txt" for i in range(10)]),
        out,
        load_tokenizer("bytes"),
        Settings(seq_len=LENGTH),
        validation_files=held_out,
    )
    return out


@pytest.fixture(scope="module")
def run_folder(prepared: Path) -> Path:
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    folder = prepared.parent / "run"
    ssm_jax.save_pretrained(model, params, folder, layout="ssm_jax", tokenizer=ByteTokenizer())
    (folder / "config.yaml").write_text(f"data: {{path: {prepared}}}\n", encoding="utf-8")
    return folder


def test_model_and_baseline_count_the_same_targets(prepared: Path) -> None:
    held_out, tokenizer = open_dataset(prepared, "validation"), load_tokenizer(prepared)
    text = b"".join((prepared.parent / f"{i}.txt").read_bytes() for i in (10, 11))
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    scores = evaluate_split(model, params, held_out, batch_size=4)
    assert scores["tokens"] == len(text) + 2, "every byte and the end of both documents"
    assert scores["bytes"] == len(text)
    again = evaluate_split(model, params, held_out, batch_size=7)
    whole = evaluate_documents(model, params, held_out, batch_size=3)
    assert again["loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert whole["tokens"] == scores["tokens"]
    assert whole["loss"] != pytest.approx(scores["loss"], rel=1e-5), "rows are read afresh, documents are not"

    texts = list(byte_documents(held_out, tokenizer))
    assert sorted(len(document) - 1 for document in texts) == sorted(
        len((prepared.parent / f"{i}.txt").read_bytes()) + 1 for i in (10, 11)
    )
    train = open_dataset(prepared, "train")
    baseline = evaluate_baseline(train, held_out, tokenizer, 2)
    expected = ngram.bits(ngram.fit(byte_documents(train, tokenizer), 2), texts) / len(text)
    assert baseline == {"order": 2, "bits_per_byte": expected, "bytes": len(text)}
    assert 0 < expected < 2


def test_rows_of_several_documents_are_not_for_models_that_read_in_chunks(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = tiny("baka", ByteTokenizer.vocab_size)
    held_out = open_dataset(prepared, "validation")
    with pytest.raises(DataError, match="this model begins a document only with a call; score whole documents"):
        evaluate_split(model, params, held_out)
    call = ssm_jax.build(model.config, chunk_boundary="call")
    scores = [evaluate_documents(m, params, held_out, batch_size=3, window=11)["loss"] for m in (model, call)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5), "read in whole chunks, however calls are understood"
    ssm_jax.save_pretrained(model, params, tmp_path / "run", layout="ssm_jax", tokenizer=ByteTokenizer())
    script.run([str(tmp_path / "run"), "--data", str(prepared), "--no-baseline"])
    assert "whole documents" in (printed := capsys.readouterr().out)
    assert "rows" not in printed


def test_subword_data_is_scored_as_its_bytes(prepared: Path, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(prepared.parent / "5.txt")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = prepared.parent
    prepare(
        find_sources([source / f"{i}.txt" for i in range(10)]),
        tmp_path / "subword",
        load_tokenizer(tmp_path / "tokenizer.json"),
        Settings(seq_len=LENGTH),
        validation_files=find_sources([source / "10.txt", source / "11.txt"]),
    )

    def baseline(path: Path) -> dict[str, float]:
        return evaluate_baseline(open_dataset(path, "train"), open_dataset(path, "validation"), load_tokenizer(path))

    assert baseline(tmp_path / "subword") == baseline(prepared)


def test_the_script_writes_what_it_prints(
    run_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.run([str(run_folder), "--batch-size", "8", "--json", str(tmp_path / "scores.json")])
    printed = capsys.readouterr().out
    scores = json.loads((run_folder / "eval.json").read_text())
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (scores["split"], scores["step"]) == ("validation", 0)
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    held_out = open_dataset(prepared, "validation")
    expected = evaluate_documents(model, params, held_out)
    assert scores["model"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert scores["rows"]["loss"] == pytest.approx(evaluate_split(model, params, held_out)["loss"], rel=1e-6)
    script.run([str(run_folder), "--window", "16", "--stride", "8", "--no-baseline"])
    sliding = evaluate_documents(model, params, held_out, window=16, stride=8)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"windows of 16, stride 8 {sliding['bits_per_byte']:.4f}" in printed

    other = shutil.copytree(prepared, tmp_path / "other")
    for options in (["--data", str(other)], ["--split", "train"]):
        script.run([str(run_folder), *options, "--no-baseline"])
    assert json.loads((run_folder / "eval.json").read_text()) == scores, "other scores do not take its place"
    assert json.loads((run_folder / "eval-other.json").read_text())["model"] == scores["model"]
    assert json.loads((run_folder / "eval-train.json").read_text())["split"] == "train"


def test_a_limited_context_reads_windows_of_its_length(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = tiny("gpt2", ByteTokenizer.vocab_size)
    limit, held_out = 64, open_dataset(prepared, "validation")
    found = list(stored_documents(held_out))
    assert max(map(len, found)) > 2 * limit
    windows = [doc[start : start + limit + 1] for doc in found for start in range(0, len(doc) - 1, limit)]
    expected = np.concatenate([_definition(model, params, window) for window in windows])
    scores = evaluate_documents(model, params, held_out, batch_size=3)
    assert scores["tokens"] == len(expected) == held_out.split.targets
    assert scores["loss"] == pytest.approx(expected.mean(), rel=1e-5)

    ssm_jax.save_pretrained(model, params, tmp_path, layout="ssm_jax", tokenizer=ByteTokenizer())
    arguments = [str(tmp_path), "--data", str(prepared), "--no-baseline", "--json", str(tmp_path / "scores.json")]
    script.run(arguments)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["sliding"] == {"window": 64, "stride": 64}
    assert written["model"]["loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert written["rows"]["loss"] == pytest.approx(evaluate_split(model, params, held_out)["loss"], rel=1e-6)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"windows of 64, stride 64 {scores['bits_per_byte']:.4f}" in printed
    with pytest.raises(
        DataError, match="window is 65 and the model reads at most 64 tokens; choose --window 64 or less"
    ):
        script.run([*arguments, "--window", "65", "--stride", "8"])


def test_rows_longer_than_the_context_are_refused(prepared: Path, tmp_path: Path) -> None:
    model = ssm_jax.build("gpt2", vocab_size=257, d_model=8, n_layers=1, n_heads=2, n_positions=LENGTH - 1)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with pytest.raises(
        DataError, match=r"rows of 24 tokens and the model reads at most 23; prepare it with --seq-len 23"
    ):
        evaluate_split(model, params, open_dataset(prepared, "validation"))
    ssm_jax.save_pretrained(model, params, tmp_path, layout="ssm_jax", tokenizer=ByteTokenizer())
    script.run([str(tmp_path), "--data", str(prepared), "--no-baseline", "--json", str(tmp_path / "scores.json")])
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["sliding"] == {"window": 23, "stride": 23}
    assert math.isfinite(written["model"]["loss"])
    assert "rows" not in written


def test_the_script_refuses_what_does_not_fit(
    run_folder: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main(script.run)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "has no split 'test'" in error(str(run_folder), "--split", "test")
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    assert "name prepared data with --data" in error(str(tmp_path))
    with pytest.raises(DataError, match="has 257 token ids and the model 61"):
        evaluate_split(*tiny("mamba"), open_dataset(prepared, "validation"))
