"""Scores a model on held-out text, beside an interpolated byte-level n-gram model.

    python -m train.evaluate runs/stdlib
    python -m train.evaluate exported/stdlib --data data/stdlib --json scores.json
    python -m train.evaluate runs/wiki --task lambada --file lambada_test.jsonl.gz
    python -m train.evaluate runs/wiki --lengths                # from the training length to 64 times it
    python -m train.evaluate runs/wiki --lengths 512,2048,8192
    python -m train.evaluate runs/wiki --articles 512,2048,1048576 --beside pythia-70m

MODEL is a run folder or any folder that ssm_jax.from_pretrained reads; in a run folder the scores are kept in eval.json (those of
other data, another split, sliding windows, lengths and articles in files of their own: eval-DATA.json, lengths.json,
articles-512_2048.json). DATA is prepared data (train.prepare_data), by default what the run was trained on.

A document is read from its start to its end, the state carried: every target sees all that stands before it. (A model whose
context has a limit reads it in windows of that length, each afresh, as the table says.) Beside that stands the score of the data's
rows, each read afresh, which is what training sees; of a run with data.joined, each as one document.

With --lengths the same targets of long documents are scored at every length of context, in windows that are read afresh, and a page
with the curves stands beside the scores.

With --articles each document is scored alone by BakaLLM's protocol: windows of N tokens start every N/2, each is read from an empty
state, and every token but the first counts in one of them; the loss is the mean over windows of their means, and beside it stands
the mean over all targets.
"""

import argparse
import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_jax.config import main, read_yaml
from ssm_jax.errors import DataError

if TYPE_CHECKING:
    from ssm_jax.data.shards import PackedDataset
    from ssm_jax.data.tokenizers import Tokenizer
    from ssm_jax.models import LanguageModel
    from ssm_jax.typing import Params

ORDER, WINDOW = 3, 1024


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.batch_size < 1 or (args.window is not None and args.window < 1):
        raise DataError("Options --batch-size and --window must be at least 1.")
    if args.window is not None and args.stride is None:
        raise DataError("Option --window needs --stride; without it the context has no end.")
    from ssm_jax.data.shards import open_dataset
    from ssm_jax.evaluation import evaluate_baseline, evaluate_documents, evaluate_split
    from ssm_jax.evaluation.lengths import context_limit
    from ssm_jax.evaluation.split import windows_of
    from ssm_jax.models.registry import restarts_within_calls

    if args.task is None and args.file is not None:
        raise DataError("Option --file needs --task lambada.")
    if args.lengths is not None and (args.task is not None or args.window is not None or args.stride is not None):
        raise DataError("Option --lengths goes with neither --task nor --window nor --stride; leave one of them out.")
    if args.articles is not None and any(x is not None for x in (args.task, args.window, args.stride, args.lengths)):
        raise DataError(
            "Option --articles goes with neither --task nor --window nor --stride nor --lengths; leave one of them out."
        )
    if args.articles is None and (args.beside is not None or args.keep_marks):
        raise DataError("Options --beside and --keep-marks need --articles.")
    if args.task is not None:
        _run_task(args)
        return
    if args.articles is not None:
        _run_articles(args)
        return
    if args.lengths is not None:
        _run_lengths(args)
        return
    model, params, tokenizer, dataset, result = _load(args)
    started = time.perf_counter()
    limit = context_limit(model)
    window = args.window or min(dataset.seq_len or WINDOW, limit or WINDOW)
    windows = windows_of(model, window, args.stride)
    if windows is not None:
        result["sliding"] = windows._asdict()
    result["model"] = evaluate_documents(model, params, dataset, args.batch_size, *(windows or ()))
    joined = bool(_data_config(Path(args.model)).get("joined"))
    fits = (limit is None or dataset.seq_len <= limit) and (joined or restarts_within_calls(model.config))
    if args.stride is None and dataset.manifest.form == "rows" and fits:
        result |= {"joined": True} if joined else {}
        result["rows"] = evaluate_split(model, params, dataset, args.batch_size, joined)
    result["seconds"] = time.perf_counter() - started
    if not args.no_baseline:
        result["baseline"] = evaluate_baseline(open_dataset(dataset.path, "train"), dataset, tokenizer, ORDER)
    options = [f"window{window}", f"stride{args.stride}"] if args.stride is not None else []
    targets = _write(args, _name_of_scores("eval", args, dataset.path, options), result)
    print(table(result))
    for target in targets:
        print(f"written to {target}")


def _load(args: argparse.Namespace) -> "tuple[LanguageModel, Params, Tokenizer, PackedDataset, dict[str, Any]]":
    """The model and the data, which must fit each other, and the first lines of the result."""
    from ssm_jax import checkpoint
    from ssm_jax.data.shards import open_dataset
    from train.source import load

    folder = Path(args.model)
    data = args.data or _training_data(folder)
    dataset = open_dataset(data, args.split)
    model, params, tokenizer = load(args.model, args.dtype)
    if tokenizer.fingerprint != dataset.manifest.tokenizer.get("fingerprint"):
        raise DataError(
            f"Data {data} was prepared with another tokenizer than the model's; prepare it with {args.model}."
        )
    result: dict[str, Any] = {"split": args.split, "data": str(data)}
    if checkpoint.is_checkpoint(folder):
        result["step"] = int(checkpoint.find_checkpoint(folder).name)
    return model, params, tokenizer, dataset, result


def _name_of_scores(kind: str, args: argparse.Namespace, data: Path, options: list[str]) -> str:
    """``kind``.json for the run's own held-out text and no options; a name of its own for anything else."""
    own = _data_config(Path(args.model)).get("path")
    parts = [kind]
    parts += [data.resolve().name] if own is None or Path(own).resolve() != data.resolve() else []
    parts += [args.split] if args.split != "validation" else []
    return "-".join(parts + options) + ".json"


def _write(args: argparse.Namespace, name: str, result: dict[str, Any]) -> list[Path]:
    """Writes the result to --json and, in a run folder, to ``name``; returns the files."""
    from ssm_jax import files

    targets = [Path(args.json)] if args.json else []
    targets += [Path(args.model) / name] if (Path(args.model) / "config.yaml").is_file() else []
    for target in targets:
        files.write_text(target, json.dumps(result, indent=2) + "\n")
    return targets


def _run_lengths(args: argparse.Namespace) -> None:
    from ssm_jax import files
    from ssm_jax.evaluation.length_charts import Lengths, length_charts, length_table
    from ssm_jax.evaluation.lengths import evaluate_lengths, parse_lengths
    from ssm_jax.evaluation.report import page

    lengths = parse_lengths(args.lengths)
    if args.json and Path(args.json).suffix == ".html":
        raise DataError(f"Option --json {args.json} names the page beside the scores; let it end in .json.")
    model, params, _, dataset, result = _load(args)
    training = _data_config(Path(args.model)).get("seq_len") or dataset.seq_len or None
    started = time.perf_counter()
    result |= evaluate_lengths(model, params, dataset, lengths, training_length=training, batch_size=args.batch_size)
    result["seconds"] = time.perf_counter() - started
    print(length_table(result))
    name = Path(args.model).resolve().name
    sections = {"Longer contexts": length_charts([Lengths(name, "a", result)])}
    lead = f"Loss by the length of the context, {args.split} split of {escape(str(dataset.path))}"
    asked = [] if args.lengths == "auto" else [args.lengths.replace(",", "_")]
    for target in _write(args, _name_of_scores("lengths", args, dataset.path, asked), result):
        shown = target.with_suffix(".html")
        files.write_text(shown, page(name, f'<p class="lead">{lead}</p>', sections))
        print(f"written to {target} and {shown}")


def _run_articles(args: argparse.Namespace) -> None:
    from ssm_jax.evaluation.article_table import article_table
    from ssm_jax.evaluation.articles import StoredArticles, evaluate_articles, parse_contexts, readable_contexts
    from ssm_jax.evaluation.split import require_vocabulary
    from train.progress import Progress

    contexts = parse_contexts(args.articles)
    model, params, tokenizer, dataset, result = _load(args)
    sources = [(args.model, model, params)]
    sources += [(args.beside, *_load_beside(args, tokenizer))] if args.beside is not None else []
    for _, model, _ in sources:
        require_vocabulary(model, dataset)
        readable_contexts(model, contexts)
    options = ["_".join(map(str, contexts))]
    options += [f"beside_{Path(args.beside).resolve().name}"] if args.beside is not None else []
    options += ["marks"] if args.keep_marks else []
    name, targets = _name_of_scores("articles", args, dataset.path, options), []
    result |= {"marks": args.keep_marks, "models": []}
    for path, model, params in sources:
        started = time.perf_counter()
        articles = StoredArticles(dataset, args.keep_marks)
        found = evaluate_articles(model, params, articles, contexts, lanes=args.batch_size, report=Progress(path))
        result["models"].append({"model": path, **found, "seconds": time.perf_counter() - started})
        targets = _write(args, name, result)
    marks = "with" if args.keep_marks else "without"
    print(f"{result['split']} split of {result['data']}, articles {marks} end-of-text marks")
    print(article_table(result["models"]))
    for target in targets:
        print(f"written to {target}")


def _load_beside(args: argparse.Namespace, tokenizer: "Tokenizer") -> "tuple[LanguageModel, Params]":
    """The second model, which must read the same tokens."""
    from train.source import load

    model, params, other = load(args.beside, args.dtype)
    if other.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"Model {args.beside} has another tokenizer than {args.model}, so the same articles are other tokens and their losses "
            "cannot be compared. Train on data prepared with that model's tokenizer (train.prepare_data --tokenizer "
            f"{args.beside}); or score each on data of its own and compare bits per byte, without --articles."
        )
    return model, params


def _run_task(args: argparse.Namespace) -> None:
    from ssm_jax import files
    from ssm_jax.evaluation.lambada import lambada, read_passages
    from train.source import load

    if args.file is None:
        raise DataError(f"Option --task {args.task} needs --file, a .jsonl(.gz) file of passages.")
    passages = read_passages(args.file, args.text_field)
    model, params, tokenizer = load(args.model, args.dtype)
    result = lambada(model, params, tokenizer, passages, args.batch_size, not args.no_start_mark)
    targets = [Path(args.json)] if args.json else []
    targets += [Path(args.model) / f"{args.task}.json"] if (Path(args.model) / "config.yaml").is_file() else []
    for target in targets:
        files.write_text(target, json.dumps({"task": args.task, "file": str(args.file), **result}, indent=2) + "\n")
    print(f"{result['passages']:,} passages; 95 % intervals in brackets")
    print(
        "accuracy of the last word    {:.4f}  [{:.4f}, {:.4f}]".format(result["accuracy"], *result["accuracy_interval"])
    )
    print(
        "perplexity of the last word  {:.2f}  [{:.2f}, {:.2f}]".format(
            result["perplexity"], *result["perplexity_interval"]
        )
    )
    for target in targets:
        print(f"written to {target}")


def table(result: dict[str, Any]) -> str:
    """The scores as lines for a terminal."""
    scores, baseline = result["model"], result.get("baseline")
    context = "whole documents"
    if "sliding" in result:
        context = "windows of {window}, stride {stride}".format(**result["sliding"])
    lines = [
        f"{result['split']} split of {result['data']}: {scores['bytes']:,.0f} bytes, {scores['tokens']:,.0f} targets",
        "",
        f"{'':38}{'bits/byte':>10}{'bits/token':>12}{'perplexity':>12}",
        _line(f"this model, {context}", scores),
    ]
    if "rows" in result:
        name = "every row as one document" if result.get("joined") else "every row read afresh"
        lines.append(_line(f"the same, {name}", result["rows"]))
    if baseline:
        decoded = "" if baseline["bytes"] == scores["bytes"] else ", of the decoded text"
        name = f"order-{baseline['order']} byte model{decoded}"
        lines.append(f"{name:38}{baseline['bits_per_byte']:>10.4f}")
    return "\n".join(lines)


def _line(name: str, scores: dict[str, Any]) -> str:
    return f"{name:38}{scores['bits_per_byte']:>10.4f}{scores['bits_per_token']:>12.4f}{scores['perplexity']:>12.3f}"


def _data_config(folder: Path) -> dict[str, Any]:
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return config.get("data", {})


def _training_data(folder: Path) -> str:
    data = _data_config(folder)
    path = data.get("path")
    if path is None and data.get("mixture"):
        corpora = ", ".join(str(corpus["path"]) for corpus in data["mixture"])
        raise DataError(f"Run {folder} was trained on several corpora ({corpora}); name one with --data.")
    if path is None:
        raise DataError(f"Folder {folder} does not say what it was trained on; name prepared data with --data.")
    return str(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with the model and its tokenizer")
    add("--data", metavar="DATA", help="prepared data (default: the run's)")
    add("--split", default="validation", help="split to score (default validation)")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="B",
        help="rows at once; the scores do not depend on it (default 16)",
    )
    add("--window", type=int, metavar="N", help="with --stride: tokens per window (default: those of the data's rows)")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="score sliding windows instead of endless context: start one every N tokens",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="type to compute in (default: the model's)")
    add("--task", choices=("lambada",), help="score a task instead: lambada, the last word of passages")
    add("--file", metavar="FILE", help="with --task: its .jsonl(.gz) file, one passage per line")
    add(
        "--text-field",
        default="text",
        metavar="KEY",
        help="with --task: field of a line that holds the passage (default text)",
    )
    add(
        "--no-start-mark",
        action="store_true",
        help="with --task: do not put the end-of-text mark first (published weights)",
    )
    add(
        "--lengths",
        nargs="?",
        const="auto",
        metavar="N,N,...",
        help="after MODEL: score the same targets at these lengths of context, each a divisor of the last; auto, or nothing: the "
        "length of the training rows times 1, 2, 4, ... 64, as far as the documents reach",
    )
    add(
        "--articles",
        metavar="N,N,...",
        help="after MODEL: score articles in windows of N tokens that start every N/2, as BakaLLM does; N is even",
    )
    add(
        "--beside",
        metavar="FOLDER",
        help="with --articles: score this model too, on the same articles; it has the same tokenizer",
    )
    add(
        "--keep-marks",
        action="store_true",
        help="with --articles: keep the end-of-text marks around each article (BakaLLM's have none)",
    )
    add("--json", metavar="FILE", help="write the scores there too")
    add("--no-baseline", action="store_true", help=f"leave out the order-{ORDER} byte model")
    return parser


if __name__ == "__main__":
    main(run)
