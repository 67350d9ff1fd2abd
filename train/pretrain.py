"""Trains a model from scratch: ``python -m train.pretrain --config configs/run/demo.yaml [key.sub=value ...]``.

The same command again goes on from the last checkpoint. See ``ssm_jax/training/config.py`` for every key.
"""

import argparse
from collections.abc import Sequence

from ssm_jax.config import main


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", metavar="YAML", help="run config, see configs/run/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single keys of it")
    arguments = parser.parse_args(argv)
    from ssm_jax.training import load_run_config, train

    train(load_run_config(arguments.config, arguments.overrides))


if __name__ == "__main__":
    main(run)
