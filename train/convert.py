"""Converts weights between our checkpoints and the folders that PyTorch programs load.

    python -m train.convert runs/books exported/books
    python -m train.convert downloads/mamba-130m runs/mamba-130m --layout ssm_jax
    python -m train.convert downloads/mamba-130m-hf mamba-130m-original --layout mamba_ssm

SRC is a run folder or checkpoint of ours, a Hugging Face folder or a mamba_ssm folder; what it is, is recognised from its
files. DST appears complete or not at all, and carries the tokenizer and parity.json, a report of what was checked.
"""

import argparse
from collections.abc import Sequence

import jax

from ssm_jax.config import main
from ssm_jax.interop import LAYOUTS, convert


def run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    convert(
        args.source, args.target, args.layout, dtype=args.dtype, overwrite=args.overwrite, check=args.check, say=print
    )


def layouts_of(family: str) -> list[str]:
    """The layouts that a family can be written in, the most native one first."""
    return [row.name for row in LAYOUTS if row.family == family and row.write_files]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("target", metavar="DST", help="folder to make")
    families = sorted({row.family for row in LAYOUTS})
    known = (f"{family}: {', '.join(layouts_of(family))}" for family in families)
    parser.add_argument(
        "--layout",
        help=f"one that the model's family has, the first by default ({'; '.join(known)}); ssm_jax for a checkpoint of ours",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type to store (default: float32, or SRC's own)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of weights that DST already holds")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare logits with PyTorch's (default: when torch and transformers are there and the model is small)",
    )
    return parser


if __name__ == "__main__":
    # Conversion is copying; an accelerator would only be in the way of a run that uses it.
    jax.config.update("jax_platforms", "cpu")
    main(run)
