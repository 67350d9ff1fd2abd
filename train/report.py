"""Writes report.html, one self-contained page about a run, into its folder; or one page that compares several runs.

python -m train.report runs/books
python -m train.report runs/wide runs/deep --baseline runs/books --out comparison.html
"""

import argparse
from collections.abc import Sequence

from ssm_jax.config import main
from ssm_jax.evaluation.compare import COMPARISON, write_comparison
from ssm_jax.evaluation.report import write_report


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run; several are compared")
    parser.add_argument(
        "--baseline", metavar="RUN", help="compare with this run: losses and figures also as differences to it"
    )
    parser.add_argument("--out", metavar="FILE", help=f"with several runs: the page to write (default {COMPARISON})")
    args = parser.parse_args(argv)
    if len(args.runs) == 1 and args.baseline is None:
        if args.out is not None:
            parser.error("--out is for several runs; the page of one run is report.html in its folder")
        print(f"written to {write_report(args.runs[0])}")
        return
    print(f"written to {write_comparison(args.runs, args.out or COMPARISON, args.baseline)}")


if __name__ == "__main__":
    main(run)
