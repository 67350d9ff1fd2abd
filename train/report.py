"""Writes report.html, one self-contained page about a run, into its folder: ``python -m train.report RUN``."""

import argparse
from collections.abc import Sequence

from ssm_jax.config import main
from ssm_jax.evaluation.report import write_report


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    print(f"written to {write_report(parser.parse_args(argv).run)}")


if __name__ == "__main__":
    main(run)
