"""A controlled study: the same run for several models and seeds, one after another, and a table of what came out.

    python -m benchmarks.study configs/study/dense.yaml

A study file has ``output``, ``run`` (a run config without output, model and seed), ``arms``, ``seeds`` and ``pairs`` of arms to
compare. An arm is a model section, or a section with the keys ``model``; ``run``, what it changes in the run; ``from``, an earlier
arm with whose weights it begins. Every finished run is one line of ``output``/results.jsonl; a study that is started again leaves
those out, and refuses lines of other configs. Arms of a pair must not differ in parameters by more than 2 %. The same seed means
the same rows in the same order for every arm, so differences are taken seed by seed.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TOLERANCE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study file")
    study = yaml.safe_load(parser.parse_args().study.read_text())
    output = Path(study["output"])
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    check(study, read(results), results)
    for seed in study["seeds"]:
        for arm in study["arms"]:
            if not any((line["arm"], line["seed"]) == (arm, seed) for line in read(results)):
                scores = train(study, arm, output, seed)
                line = {"arm": arm, "seed": seed, "of": fingerprint(study, arm), **scores}
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                check_sizes(read(results), study["pairs"])
    print(table(read(results), study["pairs"]))


def fingerprint(study: dict[str, Any], arm: str) -> str:
    """What tells the runs of one config from those of another."""
    content = [study["run"], study["arms"][arm]]
    source = source_of(study, arm)
    content += [] if source is None else [fingerprint(study, source)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def source_of(study: dict[str, Any], arm: str) -> str | None:
    """The arm with whose weights this one begins."""
    source: str | None = study["arms"][arm].get("from")
    return source


def run_of(study: dict[str, Any], arm: str, output: Path, seed: int) -> dict[str, Any]:
    """The run config of one arm with one seed."""
    section = study["arms"][arm]
    nested = bool({"model", "run", "from"} & set(section))
    run = merged(study["run"], section.get("run", {}) if nested else {})
    run |= {
        "output": str(output / f"{arm}-{seed}"),
        "model": section.get("model", {}) if nested else section,
        "seed": seed,
    }
    run["data"] = {**run["data"], "seed": seed}
    source = source_of(study, arm)
    return run if source is None else {**run, "init_from": str(output / f"{source}-{seed}")}


def merged(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``whole`` with what ``changes`` says in its place, section by section."""
    result = dict(whole)
    for key, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(whole.get(key), dict)
        result[key] = merged(whole[key], value) if deeper else value
    return result


def check(study: dict[str, Any], lines: list[dict[str, Any]], results: Path) -> None:
    """Before anything is trained. Raises ValueError: a pair of arms that are not there, finished runs of another config."""
    for arm in {arm for pair in study["pairs"] for arm in pair} - set(study["arms"]):
        raise ValueError(f"pairs name the arm {arm!r}; the arms are {', '.join(study['arms'])}")
    names = list(study["arms"])
    for number, arm in enumerate(names):
        source = source_of(study, arm)
        if source is not None and source not in names[:number]:
            raise ValueError(f"the arm {arm!r} begins with the weights of {source!r}; put that arm before it")
    for line in lines:
        if line["arm"] in study["arms"] and line["of"] != fingerprint(study, line["arm"]):
            raise ValueError(
                f"{results} has a run of the arm {line['arm']!r} with another config; remove its lines, or choose another output"
            )


def check_sizes(lines: list[dict[str, Any]], pairs: list[list[str]]) -> None:
    """Raises ValueError: the arms of a pair differ in size. Arms that have not run yet are left out."""
    sizes = {line["arm"]: line["parameters"] for line in lines}
    for one, other in pairs:
        if {one, other} <= set(sizes) and abs(sizes[other] / sizes[one] - 1) > TOLERANCE:
            raise ValueError(f"{one} has {sizes[one]:,} parameters and {other} {sizes[other]:,}: more than 2 % apart")


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(study: dict[str, Any], arm: str, folder: Path, seed: int) -> dict[str, float]:
    """Trains one arm with one seed, and returns its last scores."""
    run = run_of(study, arm, folder, seed)
    output = Path(run["output"])
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(run))
    subprocess.run([sys.executable, "-m", "train.pretrain", "--config", str(config)], check=True)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(steps) if "eval/loss" in line)
    speeds = [line["tokens_per_s"] for line in steps if "tokens_per_s" in line]
    summary = json.loads((output / "summary.json").read_text())
    return {
        "bits_per_byte": last["eval/bits_per_byte"],
        "perplexity": last["eval/perplexity"],
        "step": last["step"],
        "tokens_per_s": statistics.median(speeds),
        "parameters": summary["parameters"],
        "trained": summary["trainable_parameters"],
        "seconds": summary["seconds"],
        "tflop": summary["model_tflops_per_s"] * summary["seconds"],
        "step_bytes": step_bytes(summary["memory"]),
    }


def step_bytes(memory: dict[str, int]) -> int:
    """What a step needs at once, arguments and results included: of the last phase, where a run has two."""
    kinds = ("argument", "temp", "output")
    return sum(memory[f"step_{kind}_bytes"] for kind in kinds) - memory["step_alias_bytes"]


def table(lines: list[dict[str, Any]], pairs: list[list[str]]) -> str:
    """Per arm: parameters, mean and spread of the score, speed; per pair: the differences seed by seed.

    Raises:
        ValueError: the arms of a pair differ in size.
    """
    check_sizes(lines, pairs)
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], {})[line["seed"]] = line
    rows = [
        f"{'arm':24}{'parameters':>12}{'bits per byte':>22}{'trained':>12}{'MiB a step':>12}{'Tflop':>9}{'tokens/s':>12}"
    ]
    for arm, runs in by_arm.items():
        scores = [run["bits_per_byte"] for run in runs.values()]
        speed = statistics.median(run["tokens_per_s"] for run in runs.values())
        first = next(iter(runs.values()))
        cost = f"{first['trained']:>12,}{first['step_bytes'] / 2**20:>12.1f}{first['tflop']:>9.2f}"
        rows.append(f"{arm:24}{first['parameters']:>12,}{spread(scores):>22}{cost}{speed:>12,.0f}")
    for one, other in pairs:
        seeds = sorted(set(by_arm[one]) & set(by_arm[other]))
        changes = [by_arm[other][seed]["bits_per_byte"] - by_arm[one][seed]["bits_per_byte"] for seed in seeds]
        listed = ", ".join(f"{change:+.4f}" for change in changes)
        rows.append(f"{other} - {one}: {spread(changes, '+')} bits per byte, mean and deviation of {listed}")
    return "\n".join(rows)


def spread(values: list[float], sign: str = "") -> str:
    """Mean and sample deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} +- {deviation:.4f}"


if __name__ == "__main__":
    main()
