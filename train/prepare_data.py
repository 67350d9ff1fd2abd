"""Turns text into packed training rows.

    python -m train.prepare_data --out data/books books/ more.txt
    python -m train.prepare_data --out data/wiki train.jsonl.gz --validation valid.jsonl.gz --tokenizer tokenizer.json
    python -m train.prepare_data --out data/c4 hf:allenai/c4/en --max-bytes 10000000000 --tokenizer EleutherAI/gpt-neox-20b
    python -m train.prepare_data --out data/python --python-stdlib

An input is a text file, a .jsonl file with one JSON object per line, a .parquet file, a folder of them (.gz and .zst are read
through), or a data set of the Hugging Face hub by name, streamed. A file, line, row or record is one document. Identical documents
are used once. The validation split is chosen by the hash of each document's content, so it does not depend on order or names.

The output folder holds ArrayRecord shards, the tokenizer and manifest.json; it appears complete or not at all. The same command
again goes on where an interrupted one stopped.
"""

import argparse
import os
import platform
import time
from collections.abc import Sequence

from ssm_jax.config import main
from ssm_jax.data.documents import Dropped
from ssm_jax.data.prepare import Settings, prepare
from ssm_jax.data.shards import Manifest, verify_dataset
from ssm_jax.data.sources import find_sources, python_stdlib_files
from ssm_jax.data.tokenizers import load_tokenizer


def run(argv: Sequence[str]) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.check:
        _print_summary(verify_dataset(args.check))
        print(f"every shard of {args.check} is intact")
        return
    if not args.out or not (args.inputs or args.python_stdlib):
        parser.error("give --out and at least one INPUT or --python-stdlib")
    started = time.perf_counter()
    sources = list(args.inputs)
    files = find_sources(args.inputs, args.include, skip_bad=args.skip_bad)
    if args.python_stdlib:
        files += python_stdlib_files()
        sources.append(f"standard library of Python {platform.python_version()}")
    settings = Settings(
        form=args.form,
        seq_len=args.seq_len,
        validation_percent=args.validation_percent,
        seed=args.seed,
        text_field=args.text_field,
        max_bytes=args.max_bytes,
        rows_per_shard=args.rows_per_shard,
    )
    manifest, dropped = prepare(
        files,
        args.out,
        load_tokenizer(args.tokenizer, eos_token=args.eos_token),
        settings,
        validation_files=find_sources(args.validation, args.include, skip_bad=args.skip_bad),
        workers=args.workers,
        overwrite=args.overwrite,
        sources=sources,
    )
    _print_summary(manifest, dropped)
    print(f"written to {args.out} in {time.perf_counter() - started:.1f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text file, .jsonl file, or folder (read recursively, in sorted order); before --validation and --include",
    )
    add("--out", metavar="DIR", help="folder to make")
    add("--python-stdlib", action="store_true", help="add the sources of this Python's standard library (about 9 MB)")
    add("--tokenizer", default="bytes", metavar="T", help="bytes (default), a tokenizer.json, a SentencePiece tokenizer.model, a "
        "folder with one or with encoder.json and vocab.bpe, or a name on the hub")  # fmt: skip
    add("--eos-token", metavar="TEXT", help="end-of-text token, where the tokenizer's files do not name it")
    add(
        "--form",
        choices=("rows", "documents"),
        default="rows",
        help="packed rows to train on (default), or whole documents",
    )
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that read and encode (default: one per core); "
        "the result does not depend on it")  # fmt: skip
    add("--seq-len", type=int, default=512, metavar="N", help="tokens per row (default 512)")
    add("--validation-percent", type=float, default=5.0, metavar="P", help="share of documents for validation (default 5; a "
        "corpus of one document is cut at its end)")  # fmt: skip
    add(
        "--validation",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="validation inputs, instead of a share of the others",
    )
    add("--include", action="append", default=[], metavar="GLOB", help="files to read in folders, such as '*.py'; may be "
        "repeated (default: usual text suffixes)")  # fmt: skip
    add("--text-field", default="text", metavar="KEY", help="field of a JSON line that holds the text (default text)")
    add(
        "--max-bytes",
        type=int,
        metavar="N",
        help="read only the first N bytes of INPUT; --validation is read whole",
    )
    add("--skip-bad", action="store_true", help="leave out and count what cannot be read, instead of refusing")
    add("--seed", type=int, default=0, metavar="N", help="of the order of documents (default 0)")
    add("--rows-per-shard", type=int, default=65536, metavar="N", help="rows per shard file (default 65536)")
    add("--overwrite", action="store_true", help="replace an earlier output of this script")
    add("--check", metavar="DIR", help="only check the shards of a prepared folder against their checksums")
    return parser


def _print_summary(manifest: Manifest, dropped: Dropped | None = None) -> None:
    for name, split in manifest.splits.items():
        print(
            f"{name:<10} {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} tokens "
            f"({split.text_bytes / split.tokens:.2f} bytes each), {split.rows:,} "
            + (f"rows of {manifest.seq_len}" if manifest.form == "rows" else "records")
        )
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in manifest.dropped.items() if count)
    if left_out:
        print(f"left out   {left_out}")
    if dropped is not None and dropped.first_bad:
        print(f"           first bad: {dropped.first_bad}")


if __name__ == "__main__":
    main(run)
