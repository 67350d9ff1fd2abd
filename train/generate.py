"""Continues a prompt in the terminal.

    python -m train.generate runs/stdlib --prompt "def fibonacci(n):"
    python -m train.generate exported/stdlib --prompt-file start.txt --temperature 0 --max-new-tokens 500

MODEL is a run folder or any folder that ssm_jax.from_pretrained reads. The text goes to stdout as it is made, the speed to
stderr.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ssm_jax.config import main
from ssm_jax.errors import GenerationError


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    prompt = _prompt(args)
    import jax

    from ssm_jax.data.tokenizers import TextStream
    from ssm_jax.generation import generate, stream
    from train.source import load

    model, params, tokenizer = load(args.model, args.dtype)
    start = [] if args.no_start_mark else [tokenizer.eos_id]
    tokens = np.concatenate([start, tokenizer.encode(prompt)]).astype(np.int32)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "eos_id": tokenizer.eos_id,
        "key": jax.random.key(args.seed),
    }
    started = time.perf_counter()
    if args.no_stream:
        row = generate(model, params, tokens[None], **settings)[0]
        ends = np.flatnonzero(row == tokenizer.eos_id)
        blocks: Iterator[np.ndarray] = iter([row[: ends[0] + 1] if len(ends) else row])
    else:
        blocks = stream(model, params, tokens, **settings)
    _show(tokenizer.decode(tokens))
    text, times, counts = TextStream(tokenizer), [], []
    for block in blocks:
        _show(text.push(block[block != tokenizer.eos_id]))
        times.append(time.perf_counter())
        counts.append(len(block))
    _show(text.finish() + "\n")
    print(_speed(started, times, counts), file=sys.stderr)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _speed(started: float, times: list[float], counts: list[int]) -> str:
    """Compilation happens before the first token and in the first block of several; the rate leaves both out."""
    made = f"{sum(counts)} tokens in {times[-1] - started:.2f} s"
    if len(times) < 3 or times[-1] == times[1]:
        return f"{made}, compilation included"
    rate = sum(counts[2:]) / (times[-1] - times[1])
    return f"{made}; after the first {sum(counts[:2])} (compilation), {rate:,.0f} tokens/s"


def _prompt(args: argparse.Namespace) -> str | bytes:
    if args.prompt_file is None:
        return str(args.prompt)
    try:
        return Path(args.prompt_file).read_bytes()
    except OSError as error:
        raise GenerationError(
            f"Prompt file {args.prompt_file} cannot be read ({error.strerror}); check its path."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with the model and its tokenizer")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt", default="", metavar="TEXT", help="what to continue (default: nothing, a new document)"
    )
    text.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="stop after so many tokens (default 256)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (default 0.8)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the likeliest tokens of this probability (0.95)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the draws (default 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="type to compute in (default: the model's)")
    add("--no-stream", action="store_true", help="print the text when it is complete; the text is the same")
    add("--no-start-mark", action="store_true", help="do not put the end-of-text mark, which starts a document, first")
    return parser


if __name__ == "__main__":
    main(run)
