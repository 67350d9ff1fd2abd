"""Articles by BakaLLM's protocol: against one whole model call per window, against PyTorch, in any lanes and pieces; the script."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.config import main
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import open_dataset
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation import evaluate_articles
from ssm_jax.evaluation.article_windows import Window, batches, spans
from ssm_jax.evaluation.articles import StoredArticles, parse_contexts
from ssm_jax.evaluation.perplexity import _token_nll
from ssm_jax.models import LanguageModel
from tests.conformance.transformers import random_model
from tests.generation.tiny import full_logits, tiny
from train import evaluate as script
from train.progress import Progress

N = 16
LENGTHS = (53, 1, N, 0, 2, N // 2, N + 1, 53 - N // 2)
CONTEXTS = (N, 2, 64)
IGNORED = -100


def _articles(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 61, length).astype(np.int32) for length in lengths]


def _model(family: str, vocab_size: int = 61) -> tuple[LanguageModel, Any]:
    if family == "baka":  # it closes a chunk with every call, so that pieces must hold whole ones
        model, params = tiny("baka", vocab_size)
        return ssm_jax.build(model.config, chunk_boundary="call"), params
    if family == "mamba":
        return tiny("mamba", vocab_size)
    size = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_positions": 64}
    return random_model(ssm_jax.build("gpt_neox", vocab_size=vocab_size, **size).config)


def _labelled(article: np.ndarray, n_ctx: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The protocol as a loop over an article: tokens and labels of each window, those that do not count ignored."""
    for start in range(0, len(article), n_ctx // 2):
        tokens = article[start : start + n_ctx]
        labels = tokens.astype(np.int64)
        if start:
            labels[: n_ctx // 2] = IGNORED
            if (labels == IGNORED).all():
                break
        yield tokens, labels


def _means(articles: list[np.ndarray], n_ctx: int, losses_of: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """A row, from the losses of each window's labels but the first."""
    means, every, without = [], [], 0
    for article in articles:
        for tokens, labels in _labelled(article, n_ctx):
            losses = losses_of(tokens)[labels[1:] != IGNORED]
            means += [losses.mean()] if len(losses) else []
            every += losses.tolist()
            without += not len(losses)
    return {
        "n_ctx": n_ctx,
        "loss": np.mean(means),
        "perplexity": math.exp(np.mean(means)),
        "token_loss": np.mean(every),
        "token_perplexity": math.exp(np.mean(every)),
        "windows": len(means),
        "targets": len(every),
        "windows_without_target": without,
        "articles": len(articles),
        "empty_articles": sum(not len(article) for article in articles),
        "tokens": sum(map(len, articles)),
    }


def _direct(model: LanguageModel, params: Any, tokens: np.ndarray) -> np.ndarray:
    """-log p of all tokens of one window but the first, read in one call, float64 from the logits on."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(full_logits(model, params, padded), np.float64)[0, : len(tokens) - 1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens[1:, None].astype(np.int64), axis=1)[:, 0]


@functools.cache
def _expected(family: str) -> list[dict[str, Any]]:
    model, params = _model(family)
    return [_means(_articles(), n_ctx, functools.partial(_direct, model, params)) for n_ctx in CONTEXTS]


def _assert_rows(got: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float = 1e-5) -> None:
    assert len(got) == len(expected)
    for row, other in zip(got, expected, strict=True):
        assert row == {name: pytest.approx(value, rel=rel) for name, value in other.items()}


@pytest.mark.parametrize("family", ["mamba", "gpt_neox", "baka"])
def test_rows_are_those_of_whole_windows(family: str) -> None:
    found = evaluate_articles(*_model(family), _articles(), CONTEXTS, lanes=3, piece=8)
    _assert_rows(found["rows"], _expected(family))
    assert found["left_out"] == []
    row = found["rows"][0]
    assert row["targets"] == sum(max(length - 1, 0) for length in LENGTHS), "every token but the first, once"
    assert (row["windows_without_target"], row["empty_articles"]) == (1, 1)
    assert abs(row["loss"] - row["token_loss"]) > 1e-3, "the two means differ"


def test_a_call_that_closes_a_chunk_reads_the_last_token_too() -> None:
    """How many tokens are in a chunk that is not full says where its pauses stand: 24 of 32 with a pause at every eighth place have
    one more than 23, before the last two targets."""
    model = ssm_jax.build("baka", **{"vocab_size": 61, "d_model": 16, "n_heads": 2, "n_layers": 1, "mamba_every": 0,
                                     "n_ctx": 32, "n_pauses": 4, "n_rmt_tokens": 2, "chunk_boundary": "call"})  # fmt: skip
    model, params = random_model(model.config)
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    read = jax.jit(model.apply)
    article = _articles((24,))[0]

    def loss_of(inputs: np.ndarray) -> float:
        scores = jax.nn.log_softmax(read({"params": params}, jnp.asarray(inputs[None]))[0][0, :23])
        return -float(jnp.mean(jnp.take_along_axis(scores, jnp.asarray(article[1:, None]), axis=1)))

    found = evaluate_articles(model, params, [article], [64], lanes=1, piece=32)["rows"][0]["loss"]
    assert found == pytest.approx(loss_of(article), rel=1e-5)
    assert found != pytest.approx(loss_of(article[:-1]), rel=1e-4)


@pytest.mark.parametrize(("lanes", "piece"), [(1, 64), (5, 7), (1000, 1000)])
def test_neither_lanes_nor_pieces_change_a_score(lanes: int, piece: int) -> None:
    found = evaluate_articles(*_model("mamba"), _articles(), CONTEXTS, lanes=lanes, piece=piece)
    _assert_rows(found["rows"], _expected("mamba"))


def test_one_program_reads_every_length() -> None:
    model, params = _model("mamba")
    articles = _articles((300, 40, 41))
    told: list[tuple[int, int]] = []
    before = _token_nll._cache_size()

    def score(contexts: tuple[int, ...]) -> dict[int, dict[str, Any]]:
        rows = evaluate_articles(
            model, params, articles, contexts, lanes=2, piece=11, report=lambda *x: told.append(x)
        )["rows"]
        return {row["n_ctx"]: row for row in rows}

    short = score((32, 64))
    read = [done for done, _ in told]
    assert read == sorted(read)
    assert told[-1] == (sum(s.inputs for a in articles for n in (32, 64) for s in spans(len(a), n)),) * 2
    long = score((32, 2**20))
    assert _token_nll._cache_size() == before + 1
    assert long[32] == {name: pytest.approx(value, rel=1e-6) for name, value in short[32].items()}
    assert long[2**20]["windows"] == 3
    assert long[2**20]["targets"] == short[64]["targets"] == 378
    whole = [_long(model, params, article).mean() for article in articles]
    assert long[2**20]["loss"] == pytest.approx(np.mean(whole), rel=1e-5)


def _long(model: LanguageModel, params: Any, article: np.ndarray) -> np.ndarray:
    padded = np.zeros((1, 304), np.int32)
    padded[0, : len(article)] = article
    logits = np.asarray(full_logits(model, params, padded), np.float64)[0, : len(article) - 1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, article[1:, None].astype(np.int64), axis=1)[:, 0]


@pytest.mark.parametrize("n_ctx", [2, 4, 6, 10, 64])
def test_every_target_counts_in_one_window_with_half_a_window_before_it(n_ctx: int) -> None:
    for length in range(70):
        article, counted = np.arange(length), []
        protocol = list(_labelled(article, n_ctx))
        found = list(spans(length, n_ctx))
        assert [(span.start, span.stop) for span in found] == [
            (int(tokens[0]), int(tokens[-1]) + 1) for tokens, _ in protocol
        ]
        for span, (_, labels) in zip(found, protocol, strict=True):
            targets = range(span.start + span.first, span.stop)
            assert list(targets) == [label for label in labels[1:] if label != IGNORED]
            assert span.targets == len(targets)
            assert not span.start or span.first >= n_ctx // 2
            counted += targets
        assert counted == list(range(1, length))


@pytest.mark.parametrize(("lanes", "piece"), [(1, 4), (3, 4), (4, 1), (2, 50)])
def test_lanes_begin_windows_at_the_start_of_a_batch(lanes: int, piece: int) -> None:
    articles = [np.arange(100 * i, 100 * i + length) for i, length in enumerate(LENGTHS)]
    windows = [
        Window(article[span.start : span.stop], span, i)
        for i, article in enumerate(articles)
        for span in spans(len(article), N)
    ]
    read: list[list[Any]] = [[] for _ in range(lanes)]
    pieces = 0
    for batch in batches(windows, lanes, piece):
        pieces += 1
        assert batch["positions"].shape == (lanes, piece)
        for lane, part in enumerate(batch["parts"]):
            positions = batch["positions"][lane]
            present = positions[positions >= 0]
            assert (positions[len(present) :] == -1).all()
            if part is None:
                assert present.tolist() == [0], "an idle lane stands where it could begin"
                continue
            if present[0] == 0:
                read[lane].append((part.window, [], []))
            window, inputs, targets = read[lane][-1]
            assert window is part.window
            read_here = min(part.size + part.is_last, piece)
            assert present.tolist() == list(range(len(inputs), len(inputs) + read_here))
            assert batch["tokens"][lane, :read_here].tolist() == window.tokens[len(inputs) :][:read_here].tolist()
            assert part.is_last or part.size == piece, "only the end of a window is ragged"
            inputs += batch["tokens"][lane, : part.size].tolist()
            targets += batch["targets"][lane, part.scored].tolist()
    done = sorted((entry for lane in read for entry in lane), key=lambda entry: (entry[0].owner, entry[0].span.start))
    expected = [window for window in windows if window.span.targets]
    assert [entry[0] for entry in done] == expected
    for window, inputs, targets in done:
        assert inputs == window.tokens[:-1].tolist()
        assert targets == window.tokens[window.span.first :].tolist()
    most = max(sum(-(-entry[0].span.inputs // piece) for entry in lane) for lane in read)
    assert pieces == most, "no lane waits while there is a window to read"


def test_a_limited_context_leaves_out_what_it_cannot_read() -> None:
    model, params = _model("gpt_neox")
    found = evaluate_articles(model, params, _articles(), (66, N, 2**20), lanes=3, piece=8)
    assert [row["n_ctx"] for row in found["rows"]] == [N]
    assert found["rows"][0]["loss"] == pytest.approx(_expected("gpt_neox")[0]["loss"], rel=1e-5)
    assert found["left_out"] == [
        {"n_ctx": n_ctx, "reason": "beyond the model's context of 64 tokens"} for n_ctx in (66, 2**20)
    ]
    with pytest.raises(
        DataError, match=r"gpt_neox model reads at most 64 tokens, and every n_ctx \(66, 128\) is above"
    ):
        evaluate_articles(model, params, _articles(), (66, 128))


def test_what_is_not_finite_is_none() -> None:
    model, params = _model("mamba")
    broken = {**params, "norm_f": {"scale": params["norm_f"]["scale"] * np.nan}}
    (row,) = evaluate_articles(model, broken, _articles(), (N,), lanes=3, piece=8)["rows"]
    assert {row[name] for name in ("loss", "perplexity", "token_loss", "token_perplexity")} == {None}
    assert row["windows"] == _expected("mamba")[0]["windows"], "a broken model's windows have targets"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("512;2048", "is no list of whole numbers"),
        ("", "is no list of whole numbers"),
        ("511", "n_ctx is 511; .* Choose 510 or 512"),
        ("512,1", "n_ctx is 1, and a window needs a token and its target"),
        ("0", "choose 2 or more"),
        ("-4", "choose 2 or more"),
        ("8,16,8", "n_ctx 8 is named twice"),
    ],
)
def test_lengths_that_the_protocol_does_not_have_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_contexts(text)


def test_what_cannot_be_scored_is_refused() -> None:
    assert parse_contexts("512, 2048,1048576") == (512, 2048, 1048576)
    model, params = _model("mamba")
    with pytest.raises(DataError, match="None of the 3 articles has two tokens"):
        evaluate_articles(model, params, _articles((1, 0, 1)), (N,))
    with pytest.raises(DataError, match="There is no n_ctx"):
        evaluate_articles(model, params, _articles(), ())
    with pytest.raises(DataError, match="n_ctx is 7"):
        evaluate_articles(model, params, _articles(), (7,))
    with pytest.raises(ValueError, match="only once"):
        evaluate_articles(model, params, iter(_articles()), (N,))
    with pytest.raises(ValueError, match="lanes is 0"):
        evaluate_articles(model, params, _articles(), (N,), lanes=0)


@pytest.mark.torch
def test_rows_are_those_of_pythia_in_transformers(tmp_path: Path) -> None:
    """A random GPT-NeoX as transformers saves it, driven there through the protocol, its own loss of each window."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    from ssm_jax.interop.layouts.transformers import quiet

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=61, max_position_embeddings=64, initializer_range=0.3, **size)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    articles = _articles()
    found = evaluate_articles(*ssm_jax.from_pretrained(tmp_path), articles, CONTEXTS, lanes=3, piece=8)
    for row in found["rows"]:
        losses = []
        for article in articles:
            for tokens, labels in _labelled(article, row["n_ctx"]):
                with torch.no_grad():
                    ids = torch.tensor(tokens[None], dtype=torch.int64)
                    loss = theirs(input_ids=ids, labels=torch.tensor(labels[None])).loss
                losses.append(loss.item())
        counted = [loss for loss in losses if not math.isnan(loss)]
        assert row["loss"] == pytest.approx(np.mean(counted), abs=1e-5)
        assert row["windows"] == len(counted)
        assert row["windows_without_target"] == len(losses) - len(counted) == 1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same articles as rows and as documents."""
    folder = tmp_path_factory.mktemp("articles")
    texts = ["x" * 40 + "training", "a" * 50 + "bc" * 20, "q", "some words of an article", "0123456789abcdef" * 2]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    for form in ("rows", "documents"):
        prepare(
            find_sources([folder / "0.txt"]),
            folder / form,
            load_tokenizer("bytes"),
            Settings(form=form, seq_len=24),
            validation_files=find_sources([folder / f"{i}.txt" for i in range(1, len(texts))]),
        )
    return folder


@pytest.fixture(scope="module")
def run_folder(prepared: Path) -> Path:
    model, params = _model("mamba", ByteTokenizer.vocab_size)
    ssm_jax.save_pretrained(model, params, prepared / "run", layout="ssm_jax", tokenizer=ByteTokenizer())
    (prepared / "run" / "config.yaml").write_text(f"data: {{path: {prepared / 'rows'}}}\n", encoding="utf-8")
    return prepared / "run"


@pytest.fixture(scope="module")
def beside(prepared: Path) -> Path:
    model, params = _model("gpt_neox", ByteTokenizer.vocab_size)
    ssm_jax.save_pretrained(
        model, params, prepared / "pythia", layout="transformers", tokenizer=ByteTokenizer(), check=False
    )
    return prepared / "pythia"


def test_the_script_scores_two_models_on_the_same_articles(
    prepared: Path,
    run_folder: Path,
    beside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    out = tmp_path / "scores.json"
    script.run([str(run_folder), "--articles", "16,128", "--beside", str(beside), "--json", str(out)])
    streams = capsys.readouterr()
    assert f"{run_folder}: " in streams.err
    assert "tokens, " in streams.err
    printed = [" ".join(line.split()) for line in streams.out.splitlines()]
    scores = json.loads((run_folder / "articles-16_128-beside_pythia.json").read_text())
    assert json.loads(out.read_text()) == scores
    assert (scores["split"], scores["step"], scores["marks"]) == ("validation", 0, False)

    held_out = {form: open_dataset(prepared / form, "validation") for form in ("rows", "documents")}
    articles = {form: list(StoredArticles(dataset)) for form, dataset in held_out.items()}
    texts = sorted((prepared / f"{i}.txt").read_bytes() for i in range(1, 5))
    for found in articles.values():
        assert sorted(bytes(article.tolist()) for article in found) == texts, "no marks"
    assert [found["model"] for found in scores["models"]] == [str(run_folder), str(beside)]
    for found, family, contexts in zip(scores["models"], ("mamba", "gpt_neox"), ((16, 128), (16,)), strict=True):
        model, params = _model(family, ByteTokenizer.vocab_size)
        expected = evaluate_articles(model, params, articles["documents"], contexts)["rows"]
        _assert_rows(found["rows"], expected)
        assert (expected[0]["windows_without_target"], expected[0]["articles"]) == (1, 4)
        for row in expected:
            figures = f"{row['loss']:.4f} {row['perplexity']:.3f} {row['token_loss']:.4f} {row['token_perplexity']:.3f}"
            line = f"{found['model']} {row['n_ctx']} {figures} {row['windows']} 1 4 {row['tokens']}"
            assert line in printed
    assert scores["models"][1]["left_out"] == [{"n_ctx": 128, "reason": "beyond the model's context of 64 tokens"}]
    assert f"{beside}: n_ctx 128 left out, beyond the model's context of 64 tokens." in printed

    script.run([str(run_folder), "--articles", "16,128", "--data", str(prepared / "documents"), "--keep-marks"])
    marked = json.loads((run_folder / "articles-documents-16_128-marks.json").read_text())
    row = marked["models"][0]["rows"][0]
    assert (row["tokens"], row["windows_without_target"]) == (sum(map(len, texts)) + 8, 0)
    assert "with end-of-text marks" in capsys.readouterr().out


def test_the_script_refuses_what_does_not_fit(
    run_folder: Path, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate", str(run_folder), *arguments])
        with pytest.raises(SystemExit) as stopped:
            main(script.run)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "need --articles" in error("--beside", str(beside))
    assert "need --articles" in error("--keep-marks")
    assert "goes with neither --task" in error("--articles", "16", "--lengths", "8,16")
    assert "n_ctx is 7" in error("--articles", "7")
    before = sorted(run_folder.iterdir())
    assert "gpt_neox model reads at most 64" in error("--articles", "128", "--beside", str(beside))
    import tokenizers

    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    plain.add_special_tokens(["<|endoftext|>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    model, params = _model("mamba", ByteTokenizer.vocab_size)
    other = load_tokenizer(tmp_path / "tokenizer.json")
    ssm_jax.save_pretrained(model, params, tmp_path / "other", layout="ssm_jax", tokenizer=other)
    message = error("--articles", "16", "--beside", str(tmp_path / "other"))
    assert "has another tokenizer than" in message
    assert f"--tokenizer {tmp_path / 'other'}" in message
    assert sorted(run_folder.iterdir()) == before
