"""Turns text into packed training rows.

    python -m train.prepare_data --out data/books books/ more.txt
    python -m train.prepare_data --out data/wiki train.jsonl.gz --validation valid.jsonl.gz --tokenizer tokenizer.json
    python -m train.prepare_data --out data/python --python-stdlib

An input is a text file, a .jsonl file with one JSON object per line, or a folder of them; .gz is read through. A file or JSON
line is one document. Identical documents are used once. The validation split is chosen by the hash of each document's content,
so it does not depend on order or names. The output folder holds ArrayRecord shards, the tokenizer and manifest.json; it
appears complete or not at all.
"""

import argparse
import platform
import time
from collections.abc import Sequence

from ssm_jax.config import main
from ssm_jax.data.prepare import prepare
from ssm_jax.data.shards import Manifest, verify_dataset
from ssm_jax.data.sources import Dropped, find_files, python_stdlib_files
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
    files = find_files(args.inputs, args.include, skip_bad=args.skip_bad)
    if args.python_stdlib:
        files += python_stdlib_files()
        sources.append(f"standard library of Python {platform.python_version()}")
    manifest, dropped = prepare(
        files,
        args.out,
        load_tokenizer(args.tokenizer, eos_token=args.eos_token),
        seq_len=args.seq_len,
        validation_percent=args.validation_percent,
        validation_files=find_files(args.validation, args.include, skip_bad=args.skip_bad),
        seed=args.seed,
        text_field=args.text_field,
        max_bytes=args.max_bytes,
        rows_per_shard=args.rows_per_shard,
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
    add("--tokenizer", default="bytes", metavar="T", help="bytes (default), a tokenizer.json, or a folder with one or with "
        "encoder.json and vocab.bpe")  # fmt: skip
    add("--eos-token", metavar="TEXT", help="end-of-text token, where the tokenizer's files do not name it")
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
    add("--max-bytes", type=int, metavar="N", help="use only the first N bytes of text")
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
            f"({split.text_bytes / split.tokens:.2f} bytes each), {split.rows:,} rows of {manifest.seq_len}"
        )
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in manifest.dropped.items() if count)
    if left_out:
        print(f"left out   {left_out}")
    if dropped is not None and dropped.first_bad:
        print(f"           first bad: {dropped.first_bad}")


if __name__ == "__main__":
    main(run)
