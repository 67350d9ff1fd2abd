"""The GPU benchmark's dry run: a process that goes through all of it with interpreted kernels."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_dry_run(tmp_path: Path) -> None:
    """Every row has a figure or says why not; kernels are right in every output and gradient, and reach the models."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels_gpu", "--dry-run", "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "kernels_gpu.json").read_text())
    assert found["conditions"]["dry_run"]
    rows = {(case, row): cells for case, entry in found["kernels"].items() for row, cells in entry["rows"].items()}
    assert {case.split(" (")[0] for case, _ in rows} == {"scan", "scan step", "retention"}
    for cells in rows.values():
        for cell in cells.values():
            assert "failed" not in cell, cells
            assert cell.get("ms", 0) > 0 or "pip install" in cell["missing"], cells
    ours = {case.split(" (")[0]: cells for (case, row), cells in rows.items() if row == "ssm_jax triton"}
    assert set(ours) == {"scan", "scan step", "retention"}
    scan = ours["scan"]
    assert set(scan["forward+backward"]["errors"]) == {"y", "x", "dt", "A", "B", "C", "D", "dt_bias"}
    models = found["models"]
    for what in ("train", "decode, batch 1"):
        kernels, without = (models[what][f"ssm_jax {name}"] for name in ("triton", "xla"))
        assert kernels["ms"] > 5 * without["ms"], "interpreted kernels are slow: they were not what ran"
    losses = models["loss"]["both"]["losses"]
    assert set(losses) == {"triton", "xla", "xla, other order"}
    assert 0 < models["loss"]["both"]["largest_difference_from_xla"]["triton"] < 1e-2
    assert "<svg" in (tmp_path / "kernels_gpu.html").read_text()
    assert "mamba_ssm" in run.stdout
