"""The kernels on an NVIDIA GPU: beside XLA's forms, mamba_ssm and flash-linear-attention, and whole models with and without them.

    python -m benchmarks.kernels_gpu [--only REGEX] [--torch-python PATH] [--output FOLDER]
    python -m benchmarks.kernels_gpu --dry-run     every code path at tiny shapes on a CPU, kernels interpreted
    python -m benchmarks.kernels_gpu --aot         every program compiled for an H200 that is not there: memory and time

Every implementation is first held against a float64 oracle, at the shape that is timed: outputs and all gradients, from eight
channels outside which the cotangent is zero. What is wrong is not timed; what is missing is named with the command that installs
it. Times are of kernels (CUPTI; PyTorch: do_bench), beside the least that the machine allows: what an op must move at the
measured copy bandwidth, or compute in exponentials and products. Then mamba-130m: training, decoding, and 50 losses with kernels
and without. Writes kernels_gpu.json, after every figure, and kernels_gpu.html into --output (default benchmarks/results); with
--only, other figures of the same machine and versions stay. Names: "scan (8, 2048, 4096, 16)", "scan step (...)",
"retention (...)", "models".
"""

import argparse
import os
import re
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes only where --output says")
    mode.add_argument("--aot", action="store_true", help="compile for an H200, run nothing")
    parser.add_argument("--only", metavar="REGEX", help="names to measure")
    parser.add_argument(
        "--torch-python", metavar="PATH", help="the Python that has torch, mamba_ssm, fla (default: this one)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.dry_run or args.aot:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )
    # The PyTorch side shares the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.aot:
        _compile(args.only, args.output)
    elif args.dry_run and args.output is None:
        with tempfile.TemporaryDirectory() as folder:
            _measure(args, Path(folder))
    else:
        _measure(args, args.output)


def _measure(args: argparse.Namespace, output: Path | None) -> None:
    from benchmarks.gpu import driver, page, table
    from benchmarks.timing import RESULTS

    folder = output or RESULTS
    results = driver.run(folder, tiny=args.dry_run, only=args.only, torch_python=args.torch_python)
    print(table.text(results.whole))
    results.save()
    path = folder / f"{driver.NAME}.html"
    path.write_text(page.render(results.whole))
    print("written:", results.path, path)


def _compile(only: str | None, output: Path | None) -> None:
    import json

    from benchmarks.gpu import aot
    from benchmarks.timing import RESULTS, conditions

    found = aot.compile_all(re.compile(only or "").search)
    described = conditions(command="python -m benchmarks.kernels_gpu --aot", compiled_for="H200 (not there)")
    path = (output or RESULTS) / "kernels_gpu_aot.json"
    path.write_text(json.dumps({"conditions": described, "programs": found}, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__":
    main()
