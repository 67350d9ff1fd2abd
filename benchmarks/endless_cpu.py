"""One article of a million tokens, read in constant memory: time per token and resident memory along it, on this machine.

    python -m benchmarks.endless_cpu TEXT_FOLDER TOKENIZER [--model FOLDER] [--tokens 1048576] [--family NAME]

The text of the folder (as train.prepare_data finds it) is encoded, repeated or cut to as many tokens, and scored as a single
article in a single window by what ``train.evaluate --articles`` runs, in one lane, with the state carried to the end. Of every
sixteenth of the article: the tokens up to its end, seconds, microseconds per token by the clock and of the processor's cores
together, resident memory at its end and the most so far. None should grow. Without --model the weights are random, of a size in
SIZES: time and memory do not depend on them, the loss does.
Linux only (/proc). Writes benchmarks/results/endless_cpu.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ssm_jax
from benchmarks.timing import conditions, save
from ssm_jax.config import main as run_main
from ssm_jax.data.documents import Dropped, read_documents
from ssm_jax.data.sources import find_sources
from ssm_jax.data.tokenizers import Tokenizer, load_tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation.articles import PIECE, evaluate_articles
from ssm_jax.models.build import count_parameters
from ssm_jax.models.registry import config_to_dict
from train.progress import Progress
from train.source import load

SIZES: dict[str, dict[str, Any]] = {
    "baka": {"d_model": 128, "n_layers": 2, "n_heads": 4},
    "mamba": {"d_model": 128, "n_layers": 2},
}
PARTS = 16


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.tokens < 2 * PIECE:
        raise DataError(f"Option --tokens is {args.tokens}; it must be at least {2 * PIECE}.")
    tokenizer = load_tokenizer(args.tokenizer)
    model, params = _model(args, tokenizer)
    text = _encoded(args.text, tokenizer)
    article = np.resize(text, args.tokens)
    described = conditions(
        command=["python", "-m", "benchmarks.endless_cpu", *argv],
        model=args.model or "random weights",
        config=config_to_dict(model.config),
        parameters=count_parameters(model.config),
        piece=PIECE,
        lanes=1,
        tokens_of_text=len(text),
    )
    evaluate_articles(model, params, [article[: 2 * PIECE]], [2 * PIECE], lanes=1)  # the program is compiled before
    course = Course(args.model or args.family)
    found = evaluate_articles(model, params, [article], [len(article) + len(article) % 2], lanes=1, report=course)
    result = {"conditions": described, "sixteenths": course.parts, **found["rows"][0], "summary": course.summary()}
    for part in course.parts:
        times = f"{part['us_per_token']:>9.1f} us/token ({part['cpu_us_per_token']:.1f} of the cores)"
        memory = f"{part['resident_mib']:>9.1f} MiB resident, {part['peak_mib']:.1f} at most"
        print(f"{part['tokens']:>12,} tokens {times} {memory}")
    print(json.dumps(result["summary"], indent=2))
    print("written:", args.json or save("endless_cpu", result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


class Course:
    """Told the progress, writes down every sixteenth of the way."""

    def __init__(self, title: str) -> None:
        self.parts: list[dict[str, float]] = []
        self._progress = Progress(title)
        self._tokens, self._since, self._cpu = 0, time.perf_counter(), time.process_time()

    def __call__(self, done: int, total: int) -> None:
        self._progress(done, total)
        if done * PARTS < total * (len(self.parts) + 1):
            return
        now, cpu, tokens = time.perf_counter(), time.process_time(), done - self._tokens
        part: dict[str, float] = {"tokens": done, "seconds": now - self._since}
        part |= {
            "us_per_token": (now - self._since) / tokens * 1e6,
            "cpu_us_per_token": (cpu - self._cpu) / tokens * 1e6,
        }
        self.parts.append(part | _memory())
        self._tokens, self._since, self._cpu = done, now, cpu

    def summary(self) -> dict[str, float]:
        """Of the last sixteenth to the second (the first holds what is made once), and over all of them."""
        first, last = self.parts[1], self.parts[-1]
        times = [part["us_per_token"] for part in self.parts]
        return {
            "seconds": sum(part["seconds"] for part in self.parts),
            "us_per_token_least": min(times),
            "us_per_token_most": max(times),
            "time_last_to_second": last["us_per_token"] / first["us_per_token"],
            "cpu_time_last_to_second": last["cpu_us_per_token"] / first["cpu_us_per_token"],
            "resident_mib_last_less_second": last["resident_mib"] - first["resident_mib"],
            "peak_mib": last["peak_mib"],
        }


def _memory() -> dict[str, float]:
    """Resident memory of this process now, and the most it ever had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"resident_mib": kib["VmRSS"] / 1024, "peak_mib": kib["VmHWM"] / 1024}


def _model(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Any, Any]:
    if args.model is None:
        model = ssm_jax.build(args.family, vocab_size=tokenizer.vocab_size, **SIZES[args.family])
        return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    model, params, own = load(args.model)
    if own.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"Model {args.model} has another tokenizer than {args.tokenizer}; give {args.model} as TOKENIZER."
        )
    return model, params


def _encoded(folder: str, tokenizer: Tokenizer) -> np.ndarray:
    texts = [document.text for source in find_sources([folder]) for document in read_documents(source, Dropped())]
    ids = [tokenizer.encode(text) for text in texts]
    if not sum(map(len, ids)):
        raise DataError(f"Folder {folder} holds no text; give one with text files.")
    return np.concatenate(ids)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endless_cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", metavar="TEXT_FOLDER", help="folder of text, or a file")
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="as --tokenizer of train.prepare_data")
    parser.add_argument("--model", metavar="FOLDER", help="a model instead of random weights, with this tokenizer")
    parser.add_argument("--family", choices=list(SIZES), default="baka", help="of the random weights (default baka)")
    parser.add_argument("--tokens", type=int, default=2**20, metavar="N", help="of the article (default 2^20)")
    parser.add_argument("--json", metavar="FILE", help="write there instead of to benchmarks/results")
    return parser


if __name__ == "__main__":
    if sys.platform != "linux":
        raise SystemExit("Resident memory is read from /proc; run this on Linux.")
    run_main(run)
