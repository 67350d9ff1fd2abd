"""Trains a model from scratch on prepared data.

    python -m train.pretrain --config configs/run/demo.yaml
    python -m train.pretrain --config configs/run/demo.yaml output=runs/wide model.d_model=256 optim.lr=2e-3

The config is a YAML file; key.sub=value changes single keys of it (all keys: ssm_jax/training/config.py). The same command
again goes on from the last checkpoint, also after SIGTERM or Ctrl-C, which save first.
"""

import argparse
from collections.abc import Sequence

from ssm_jax.config import main


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="YAML", help="run config, see configs/run/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes single keys")
    args = parser.parse_args(argv)
    if not argv:
        parser.error("give --config YAML, such as configs/run/demo.yaml, or every needed key as key.sub=value")
    from ssm_jax import distributed
    from ssm_jax.training import load_run_config, train

    config = load_run_config(args.config, args.overrides)
    distributed.initialize()
    with distributed.failing_alone():
        train(config)


if __name__ == "__main__":
    main(run)
