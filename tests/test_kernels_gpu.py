"""The benchmark of the GPU kernels, as far as no GPU is needed: oracles, floors, clock, bookkeeping, and the PyTorch side."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import baselines, cases, clock, driver, floors, models, oracle, page, table
from benchmarks.gpu.cases import Case

ROOT = Path(__file__).parents[1]


def _case(title: str) -> Case:
    return next(case for case in cases.all_cases(tiny=True) if case.title == title)


def _given(case: Case) -> tuple[Any, Any]:
    """In float32, so that outputs are not rounded."""
    given = case.inputs(jax.random.key(0)), case.cotangent(jax.random.key(1), True)
    return jax.tree.map(lambda x: x.astype(jnp.float32), given)


@pytest.mark.parametrize("title", ["scan", "scan step", "retention"])
def test_oracles_equal_the_ops(title: str) -> None:
    """Values and every gradient, those that are sums over all channels too, from the channels that are looked at."""
    case = _case(title)
    inputs, dy = _given(case)
    passes = list(case.walks)[-1]
    found = jax.jit(cases.program(lambda i: case.run(i, implementation="xla"), passes))(inputs, dy)
    y, gradients = found if "backward" in passes else (found, None)
    expected = case.expected(inputs, dy)
    errors = oracle.errors(case.looked_at(y, gradients), expected)
    assert set(errors) == set(expected)
    assert max(errors.values()) < 1e-5, errors


def test_the_oracle_of_retention_does_not_depend_on_its_blocks() -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(20, 3)) for name in ("q", "k", "v", "dy")}
    whole, parts = (oracle.retention(**arrays, log_decay=-0.1, rows=rows) for rows in (32, 6))
    assert max(oracle.errors(parts, whole).values()) < 1e-12


def test_the_oracle_looks_at_few_channels_of_many() -> None:
    assert oracle.some(4096).tolist() == [0, 585, 1170, 1755, 2340, 2925, 3510, 4095]
    dy = _case("scan").cotangent(jax.random.key(0), True)
    assert np.flatnonzero(np.asarray(dy).any((0, 1))).tolist() == oracle.some(20).tolist()


def test_errors_that_are_no_numbers_are_wrong() -> None:
    assert oracle.verdict({"y": 1e-3}) is None
    for error in (0.5, float("nan"), float("inf")):
        assert "'y'" in str(oracle.verdict({"y": error, "x": 1e-3}))


def test_floors_of_an_h200() -> None:
    """Counted by hand from bytes and exponentials; the scan is bound by its exponentials, retention by memory."""
    scan = floors.selective_scan(8, 2048, 4096, 16)
    (forward,), (_, backward) = scan["forward"], scan["forward+backward"]
    assert forward.milliseconds(floors.H200)["memory"] == pytest.approx(0.094, abs=1e-3)
    assert backward.milliseconds(floors.H200)["memory"] == pytest.approx(0.156, abs=1e-3)
    assert floors.floor(scan["forward"], floors.H200) == (pytest.approx(0.257, abs=1e-3), "exponentials")
    assert floors.floor(scan["forward+backward"], floors.H200)[0] == pytest.approx(0.257 + 0.514, abs=1e-3)
    for shape, forward_ms, backward_ms in (
        ((1, 8192, 96, 128, 128), 0.187, 0.328),
        ((4, 2048, 16, 128, 128), 0.031, 0.055),
        ((8, 2048, 32, 256, 256), 0.250, 0.437),
    ):
        walks = floors.retention(*shape)
        assert floors.floor(walks["forward"], floors.H200) == (pytest.approx(forward_ms, abs=1e-3), "memory")
        whole = floors.floor(walks["forward+backward"], floors.H200)[0]
        assert whole == pytest.approx(forward_ms + backward_ms, abs=2e-3)
    ((step,),) = floors.scan_step(64, 4096, 16).values()
    assert step.bytes == pytest.approx(8 * 64 * 4096 * 16, rel=0.1)


def _profiler(monkeypatch: pytest.MonkeyPatch, records: list[tuple[str, float]]) -> None:
    from jax.experimental.mosaic.gpu import profiler

    extension = SimpleNamespace(_cupti_init=lambda: None, _cupti_get_timings=lambda finalize: records)
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", SimpleNamespace(_mosaic_gpu_ext=extension))


def test_kernel_times_are_the_median_sum_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's profiler, given the records of a GPU that is not there."""
    monkeypatch.setattr(clock, "CALLS", 3)
    _profiler(monkeypatch, [("a", 1.0), ("b", 2.0), ("a", 1.0), ("b", 7.0), ("a", 2.0), ("b", 2.0)])
    seen = []
    measured = clock.measure(lambda x: seen.append(float(x[0])) or x, [(jnp.full(2, i),) for i in range(2)])
    assert (measured["ms"], measured["kernel_ms"], measured["kernel_ms_min"]) == (4.0, 4.0, 3.0)
    assert measured["timer"] == "kernels"
    assert measured["wall_ms"] > 0
    assert seen == [0.0, 1.0] * (len(seen) // 2) + [0.0] * (len(seen) % 2), "inputs take turns in every part of it"


def test_without_a_profiler_the_wall_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    _profiler(monkeypatch, [("a", 1.0)] * 4)
    monkeypatch.setattr(clock, "CALLS", 3)
    measured = clock.measure(lambda x: x, [(jnp.ones(2),)])
    assert (measured["timer"], measured["ms"]) == ("wall", measured["wall_ms"])
    assert "not divisible" in measured["no_kernel_ms"]


def test_inputs_take_turns_only_where_they_would_stay_in_the_cache() -> None:
    def sets(megabytes: int) -> int:
        return len(clock.sets_of(lambda i: (SimpleNamespace(nbytes=megabytes * 2**20),)))

    assert [sets(size) for size in (1, 30, 100, 180, 400)] == [16, 6, 2, 1, 1]


def _results(folder: Path, **described: Any) -> driver.Results:
    return driver.Results(folder, {"gpu": "H200", "jax": "1", **described}, keep=True)


def test_what_is_wrong_is_not_timed_and_what_breaks_is_named(tmp_path: Path) -> None:
    case = _case("scan step")
    right = case.run

    def wrong(inputs: Any, implementation: str | None) -> Any:
        return {name: 1.05 * array for name, array in right(inputs, implementation).items()}

    def broken(inputs: Any) -> Any:
        raise ValueError("out of registers")

    case = dataclasses.replace(case, run=wrong, others={"broken": broken}, implementations=("xla", "vulkan"))
    results = _results(tmp_path)
    results.floors(case, floors.H200)
    driver._measure(case, results, jax.devices()[0], tiny=True)
    rows = json.loads((tmp_path / "kernels_gpu.json").read_text())["kernels"][case.name]["rows"]
    assert rows["ssm_jax xla"]["step"]["failed"].startswith("wrong: relative error")
    assert rows["ssm_jax xla"]["step"]["errors"]["y"] == pytest.approx(0.05, rel=0.1)
    assert "ms" not in rows["ssm_jax xla"]["step"]
    assert rows["broken"]["step"] == {"failed": "ValueError: out of registers"}
    assert "'vulkan' cannot run here" in rows["ssm_jax vulkan"]["all"]["missing"]
    shown = table.text(results.whole)
    assert "failed: wrong" in shown
    assert "missing: selective_scan: implementation 'vulkan'" in shown


def test_a_run_on_a_gpu_played_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a dry run leaves out: profiled kernels, inputs that take turns, memory that is too small, the machine's own rates."""
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132)
    gpu.memory_stats = lambda: {"bytes_limit": 2**21}
    rates = clock.machine
    monkeypatch.setattr(clock, "machine", lambda device, tiny: rates(device, True))
    monkeypatch.setattr(clock, "_describe", lambda: {"driver": "1", "max_clock_mhz": 1980.0})
    monkeypatch.setattr(clock, "OUT_OF_CACHE", 10_000)
    monkeypatch.setattr(clock, "CALLS", 3)
    _profiler(monkeypatch, [("kernel", 0.25)] * 3)
    tiny = [_case("scan step"), _case("retention")]
    large = dataclasses.replace(tiny[0], others={"large": lambda inputs: jnp.cumsum(jnp.zeros(2**22))}, baselines=())
    monkeypatch.setattr(driver, "all_cases", lambda _: [large, dataclasses.replace(tiny[1], baselines=())])
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    results = driver.run(tmp_path, tiny=False, only="scan|retention", torch_python=None)
    described, kernels = results.whole["conditions"], results.whole["kernels"]
    assert described["exponentials_t_per_s"] == pytest.approx(4.18, abs=0.01)
    assert described["gpu"] == "NVIDIA H200"
    assert not described["dry_run"]
    rows = {row: cells for entry in kernels.values() for row, cells in entry["rows"].items()}
    assert rows["large"]["step"]["failed"].startswith("does not fit")
    for name, passes in (("scan step", "step"), ("retention", "forward"), ("retention", "forward+backward")):
        entry = next(entry for case, entry in kernels.items() if case.startswith(name + " ("))
        found = entry["rows"]["ssm_jax xla"][passes]
        assert (found["ms"], found["timer"]) == (0.25, "kernels"), found
        assert found["floor_over_measured"] == pytest.approx(entry["floors"][passes]["ms"] / 0.25)
    assert "NVIDIA H200" in page.render(results.whole)


def test_a_part_is_measured_again_beside_the_rest(tmp_path: Path) -> None:
    """Of the same machine and versions; figures of others are not mixed, nor lost."""
    first = _results(tmp_path)
    for title in ("scan", "scan step"):
        first.floors(_case(title), floors.H200)
        first.kernel(_case(title).name, "a", next(iter(_case(title).walks)), {"ms": 2.0})
    again = _results(tmp_path)
    again.floors(_case("scan"), floors.H200)
    again.kernel(_case("scan").name, "a", "forward", {"ms": 4.0})
    kept = json.loads(again.path.read_text())["kernels"]
    assert kept[_case("scan").name]["rows"]["a"]["forward"]["ms"] == 4.0
    assert kept[_case("scan step").name]["rows"]["a"]["step"]["ms"] == 2.0
    with pytest.raises(SystemExit, match=r"figures of another gpu and jax: choose another --output"):
        _results(tmp_path, gpu="A100", jax="2")
    assert json.loads(again.path.read_text())["kernels"] == kept


def test_rows_are_compared_with_ours_and_with_the_floor(tmp_path: Path) -> None:
    case, results = _case("scan step"), _results(tmp_path, triton="3", date="today", copy_tb_per_s=4.0)
    results.whole["conditions"]["bf16_matmul_tflop_per_s"] = 800.0
    results.floors(case, floors.H200)
    floor = results.whole["kernels"][case.name]["floors"]["step"]["ms"]
    results.kernel(case.name, "mamba_ssm", "step", {"ms": 8 * floor, "timer": "do_bench"})
    results.kernel(case.name, "ssm_jax xla", "step", {"ms": 2 * floor, "timer": "kernels"})
    results.kernel(case.name, "<fla>", "all", {"missing": "pip install it"})
    losses = {"losses": {"xla": [3.0, 2.0]}, "largest_difference_from_xla": {}, "kernels_over_spread": None}
    results.model("loss", "both", losses)
    rows = table.text(results.whole).splitlines()
    assert "0.125 of the floor" in rows[3]
    assert rows[3].endswith("| 4.00 |")
    html = page.render(results.whole)
    assert html.count("<circle") >= 2
    assert "8.00 times the least possible" in html
    assert "&lt;fla&gt;" in html
    assert not {"http", "<script", "<fla>"} & {word for word in ("http", "<script", "<fla>") if word in html}


def test_a_pytorch_side_that_dies_keeps_what_it_found(tmp_path: Path) -> None:
    script = tmp_path / "python"
    line = json.dumps({"case": "c", "row": "r", "passes": "forward", "ms": 1.0})
    script.write_text(f"#!/bin/sh\necho '{line}' > $4\necho 'CUDA error: no device' >&2\nexit 3\n")
    script.chmod(0o755)
    found = list(baselines.rows([_case("scan")], None, "cpu", str(script)))
    assert found[0] == json.loads(line)
    assert found[1]["failed"] == "exit 3: CUDA error: no device"


def test_baselines_that_are_not_installed_are_named() -> None:
    """In the very process: on a machine with a GPU and without them."""
    found = _torch_side(
        "cuda",
        "import builtins as b; real = b.__import__\n"
        "def no(name, *a, **k):\n"
        "    if name.split('.')[0] in ('torch',): raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "    return real(name, *a, **k)\n"
        "b.__import__ = no\n",
    )
    rows = {(line["case"], line["row"]): line["missing"] for line in found if "versions" not in line}
    assert len(rows) == 5 + 2
    assert all(reason.endswith("pip install torch") for reason in rows.values())


@pytest.mark.torch
def test_the_pytorch_side_on_a_cpu() -> None:
    """Layouts, oracles and gradients of every row, plain PyTorch in place of CUDA kernels; the model with transformers'."""
    found = _torch_side("cpu", "")
    assert found.pop(0)["versions"]["torch"] != "not installed"
    kernels = {
        (line["case"].split(" (")[0], line["row"].removeprefix("plain PyTorch in place of "), line["passes"]): line
        for line in found
        if line["passes"] != "model"
    }
    both = ("forward", "forward+backward")
    rows = (
        ("scan", "mamba_ssm"),
        ("scan", "mamba_ssm with transposes"),
        ("retention", "fla chunk"),
        ("retention", "fla fused_chunk"),
    )
    assert set(kernels) == {(*row, passes) for row in rows for passes in both} | {("scan step", "mamba_ssm", "step")}
    for line in found:
        assert line["ms"] > 0, line
    for (case, _, passes), line in kernels.items():
        names = {"scan": {"y", "x", "dt", "A", "B", "C", "D", "dt_bias"}, "retention": {"y", "q", "k", "v"}}
        expected = {"y", "state"} if case == "scan step" else names[case] if "backward" in passes else {"y"}
        assert set(line["errors"]) == expected
        assert max(line["errors"].values()) < 4e-3
    assert [line["case"] for line in found[-2:]] == ["train", "decode, batch 1"]


def _torch_side(device: str, before: str) -> list[dict[str, Any]]:
    """Its lines, from a process that runs ``before`` first."""
    program = f"import runpy, sys\n{before}\nsys.argv[0] = 'x'\nrunpy.run_module('benchmarks.gpu.torch_side', run_name='__main__')"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "python"
        start = f"#!{sys.executable}\nimport sys\nsys.argv = sys.argv[2:]\nsys.path.insert(0, {str(ROOT)!r})\n"
        script.write_text(start + program)
        script.chmod(0o755)
        return list(baselines.rows(cases.all_cases(tiny=True), models.TINY, device, str(script)))


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels_gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "sees no NVIDIA GPU" in run.stderr
    assert "--dry-run" in run.stderr
    assert "Traceback" not in run.stderr
