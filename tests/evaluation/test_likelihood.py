"""Likelihoods and LAMBADA against plain logits; the harness's own tasks on local data."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.data.tokenizers import ByteTokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation.lambada import lambada, read_passages
from ssm_jax.evaluation.likelihood import likelihoods
from ssm_jax.models import LanguageModel
from tests.generation.tiny import FAMILIES, full_logits, tiny
from train import evaluate as script

PASSAGES = ["the cat sat on the mat", "one two", "a longer passage that ends with a word"]


def definition(model: LanguageModel, params: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = [*context, *continuation]
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    logits = np.asarray(full_logits(model, params, tokens), np.float64)[0, len(context) - 1 : len(ids) - 1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    greedy = logits[:, : model.config.vocab_size].argmax(-1).tolist()
    return float(log_p[np.arange(len(continuation)), continuation].sum()), greedy == continuation


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_the_definition_in_any_batch(family: str) -> None:
    model, params = tiny(family)
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (5, 3), (30, 1), (2, 20), (17, 0), (9, 4), (1, 33)]
    pairs = [tuple(rng.integers(0, 61, n).tolist() for n in pair) for pair in lengths]
    greedy = ssm_jax.generate(model, params, [pairs[1][0]], max_new_tokens=4)[0].tolist()
    pairs.append((pairs[1][0], greedy))
    expected = [definition(model, params, *pair) for pair in pairs]
    assert expected[-1][1]
    for batch_size in (1, 3, 16):
        found = likelihoods(model, params, pairs, batch_size)
        assert [result.logprob for result in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-5)
        assert [result.is_greedy for result in found] == [is_greedy for _, is_greedy in expected]
    with pytest.raises(ValueError, match="a context is empty"):
        likelihoods(model, params, [([], [1])])


def test_a_limited_context_keeps_what_stands_last() -> None:
    model, params = tiny("gpt2")  # 64 positions
    rng = np.random.default_rng(1)
    lengths = [(64, 1), (65, 1), (100, 3), (200, 64), (60, 10), (70, 0)]
    pairs = [tuple(rng.integers(0, 61, n).tolist() for n in pair) for pair in lengths]

    def in_sixty_five(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """By the definition: of the last 65 tokens, 64 are read and the last is only scored."""
        ids = [*context, *continuation][-65:]
        logits = np.asarray(full_logits(model, params, np.asarray([ids[:-1]], np.int32)), np.float64)[0]
        logits = logits[len(logits) - len(continuation) :]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total = log_p[np.arange(len(continuation)), continuation].sum()
        return float(total), logits[:, :61].argmax(-1).tolist() == continuation

    for batch_size in (1, 4):
        found = likelihoods(model, params, pairs, batch_size)
        expected = [in_sixty_five(*pair) for pair in pairs]
        assert [x.logprob for x in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-5)
        assert [x.is_greedy for x in found] == [greedy for _, greedy in expected]
    with pytest.raises(DataError, match="Continuation 1 has 65 tokens and the model reads at most 64"):
        likelihoods(model, params, [([1], [1]), ([1], [2] * 65)])
    small = ssm_jax.build("gpt2", vocab_size=61, d_model=8, n_layers=1, n_heads=2, n_positions=8)
    weights = small.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    (result,) = likelihoods(small, weights, [(list(range(30)), [1, 2])])
    assert math.isfinite(result.logprob), "no row is padded beyond the limit"


def test_lambada_is_the_last_word_with_its_space() -> None:
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    tokenizer = ByteTokenizer()
    losses = []
    for text in PASSAGES:
        context, word = text.rsplit(" ", 1)
        ids = [tokenizer.eos_id, *context.encode()]
        losses.append(-definition(model, params, ids, list(f" {word}".encode()))[0])
    scores = lambada(model, params, tokenizer, PASSAGES, batch_size=2)
    assert scores["passages"] == 3
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    spread = 1.959964 * np.std(losses, ddof=1) / math.sqrt(3)
    assert scores["perplexity_interval"] == pytest.approx(
        np.exp([np.mean(losses) - spread, np.mean(losses) + spread]), rel=1e-4
    )
    assert scores["accuracy"] == 0
    # Wilson's interval for 0 of 3: [0, z^2 / (3 + z^2)].
    assert scores["accuracy_interval"] == pytest.approx([0.0, 1.959964**2 / (3 + 1.959964**2)])
    assert lambada(model, params, tokenizer, PASSAGES, start_mark=False)["perplexity"] != scores["perplexity"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b'{"text": "a b"}\n{"passage": "a b"}\n',
            r"line 2, has no passage in field 'text' \(its keys: passage\); .*--text-field",
        ),
        (b'{"text": "word"}\n', "line 1, has no passage"),
        (b'{"text": "a', "line 1, is not JSON"),
    ],
)
def test_bad_evaluation_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_passages(tmp_path / "f.jsonl")
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read"):
        read_passages(tmp_path / "nowhere.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    path = tmp_path_factory.mktemp("model") / "run"
    ssm_jax.save_pretrained(model, params, path, layout="ssm_jax", tokenizer=ByteTokenizer())
    (path / "config.yaml").write_text("data: {path: nowhere}\n")
    return path


def test_the_script_scores_lambada(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps({"passage": text}) + "\n" for text in PASSAGES)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    arguments = [str(folder), "--task", "lambada", "--file", str(tmp_path / "f.jsonl.gz"), "--text-field", "passage"]
    script.run(arguments)
    scores = json.loads((folder / "lambada.json").read_text())
    expected = lambada(*tiny("mamba", ByteTokenizer.vocab_size), ByteTokenizer(), PASSAGES)
    assert scores["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert f"{scores['accuracy']:.4f}  [{scores['accuracy_interval'][0]:.4f}" in capsys.readouterr().out
    with pytest.raises(DataError, match="needs --file"):
        script.run([str(folder), "--task", "lambada"])


@pytest.mark.torch  # the harness depends on it
@pytest.mark.filterwarnings("ignore")  # theirs: the harness and what it imports warn of deprecations and open files
def test_the_harness_runs_its_tasks_on_our_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    from ssm_jax.evaluation.harness import HarnessModel

    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\ntest_split: test\n"
        "metadata: {version: 1}\n"
    )
    tasks = {
        "cloze": "output_type: loglikelihood\ndoc_to_text: \"{{text.rsplit(' ', 1)[0]}}\"\n"
        "doc_to_target: \"{{' ' + text.rsplit(' ', 1)[1]}}\"\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
        "writing": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "x"\n'
        'generation_kwargs: {until: ["e"], max_gen_toks: 20, do_sample: false}\nmetric_list: [{metric: exact_match}]\n',
    }
    for name, content in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}{content}")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wrapped = HarnessModel.from_folder(str(folder))
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    scores, samples = results["results"], results["samples"]

    model, params = tiny("mamba", ByteTokenizer.vocab_size)
    tokenizer = ByteTokenizer()
    ours = lambada(model, params, tokenizer, PASSAGES)
    assert scores["cloze"]["perplexity,none"] == pytest.approx(ours["perplexity"], rel=1e-4)
    assert scores["cloze"]["acc,none"] == ours["accuracy"]
    total = sum(definition(model, params, [tokenizer.eos_id], list(text.encode()))[0] for text in PASSAGES)
    size = sum(len(text.encode()) for text in PASSAGES)
    assert scores["rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    for sample, text in zip(samples["writing"], PASSAGES, strict=True):
        prompt = [tokenizer.eos_id, *text.encode()]
        ids = ssm_jax.generate(model, params, [prompt], 20, eos_id=tokenizer.eos_id)[0]
        ends = [*np.flatnonzero(ids == tokenizer.eos_id), len(ids)]
        expected = tokenizer.decode(ids[: ends[0]])
        assert sample["resps"][0][0] == expected.split("e")[0]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # theirs, as above
def test_the_harness_reads_no_further_than_the_model_does() -> None:
    from lm_eval.api.instance import Instance

    from ssm_jax.evaluation.harness import HarnessModel

    model, params = tiny("gpt2", ByteTokenizer.vocab_size)  # 64 positions
    wrapped = HarnessModel(model, params, ByteTokenizer())

    def request(kind: Any, *arguments: Any) -> Instance:
        return Instance(kind, {}, arguments, 0)

    texts = ["", "short", "a text of many words, " * 7]
    found = wrapped.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
    for text, total in zip(texts, found, strict=True):
        ids = [ByteTokenizer().eos_id, *text.encode()]
        parts = [ids[start : start + 65] for start in range(0, len(ids) - 1, 64)]
        logprobs = []
        for part in parts:
            (whole,) = likelihoods(model, params, [(part[:1], part[1:])])
            logprobs.append(whole.logprob)
        assert total == pytest.approx(sum(logprobs), rel=1e-5)
    (written,) = wrapped.generate_until([request("generate_until", texts[2], {"max_gen_toks": 10})])
    ids = ssm_jax.generate(model, params, [list(texts[2].encode())[-54:]], 10, eos_id=ByteTokenizer().eos_id)[0]
    ends = [*np.flatnonzero(ids == ByteTokenizer().eos_id), len(ids)]
    assert written == ByteTokenizer().decode(ids[: ends[0]])
