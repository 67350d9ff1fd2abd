"""Scores a model on held-out text, beside an interpolated byte-level n-gram model.

    python -m train.evaluate runs/stdlib
    python -m train.evaluate exported/stdlib --data data/stdlib --json scores.json

MODEL is a run folder or any folder that ssm_jax.from_pretrained reads; in a run folder the scores are kept in eval.json. DATA
is prepared data (train.prepare_data), by default what the run was trained on.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssm_jax.config import main, read_yaml
from ssm_jax.errors import DataError

ORDER = 3


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    from ssm_jax import checkpoint, files
    from ssm_jax.data.shards import open_dataset
    from ssm_jax.evaluation import evaluate_baseline, evaluate_split
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
    started = time.perf_counter()
    result["model"] = evaluate_split(model, params, dataset, args.batch_size)
    result["seconds"] = time.perf_counter() - started
    if not args.no_baseline:
        result["baseline"] = evaluate_baseline(open_dataset(data, "train"), dataset, tokenizer, ORDER)
    text = json.dumps(result, indent=2) + "\n"
    targets = [Path(args.json)] if args.json else []
    targets += [folder / "eval.json"] if (folder / "config.yaml").is_file() else []
    for target in targets:
        files.write_text(target, text)
    print(table(result))
    for target in targets:
        print(f"written to {target}")


def table(result: dict[str, Any]) -> str:
    """The scores as lines for a terminal."""
    scores, baseline = result["model"], result.get("baseline")
    lines = [
        f"{result['split']} split of {result['data']}: {scores['bytes']:,.0f} bytes, {scores['tokens']:,.0f} targets",
        "",
        f"{'':34}{'bits/byte':>10}{'bits/token':>12}{'perplexity':>12}",
        f"{'this model':34}{scores['bits_per_byte']:>10.4f}{scores['bits_per_token']:>12.4f}{scores['perplexity']:>12.3f}",
    ]
    if baseline:
        name = f"interpolated order-{baseline['order']} byte model"
        lines.append(f"{name:34}{baseline['bits_per_byte']:>10.4f}")
    return "\n".join(lines)


def _training_data(folder: Path) -> str:
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    path = config.get("data", {}).get("path")
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
    add("--dtype", choices=("float32", "bfloat16"), help="type to compute in (default: the model's)")
    add("--json", metavar="FILE", help="write the scores there too")
    add("--no-baseline", action="store_true", help=f"leave out the order-{ORDER} byte model")
    return parser


if __name__ == "__main__":
    main(run)
