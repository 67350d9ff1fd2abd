"""The learning rates of the originals, bit for bit, and where ours differ on purpose."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.errors import ConfigError
from ssm_jax.optim import relora
from tests.optim.relora import goldens

KEYS = {
    "num_training_steps": "total",
    "first_warmup_steps": "warmup",
    "restart_warmup_steps": "rewarmup",
    "cycle_length": "cycle",
    "min_lr_ratio": "floor",
    "adjust_step": "offset",
}
CURVES = [name for name in goldens.names("sched") if name not in ("sched_rejects", "sched_17_axolotl_jagged")]


def ours(case: dict[str, Any], **how: Any) -> relora.schedules.Schedule:
    fields = {KEYS[name]: value for name, value in case["params"].items()}
    if case["kind"] == "jagged_cosine":
        how.setdefault("compat", "reference")
        how["variant"] = "v1" if case["variant"] == "paperV1" else "v4"
    return relora.by_name(case["kind"], peak=case["peak_lr"], **fields, **how)


@pytest.mark.parametrize("name", CURVES)
def test_curves_of_the_reference(name: str) -> None:
    case = goldens.settings(name)
    schedule = ours(case)
    assert [schedule(step) for step in case["step"]] == case["lr"]


@pytest.mark.parametrize("name", CURVES)
def test_traced_is_the_same_curve(name: str) -> None:
    case = goldens.settings(name)
    traced = jax.jit(jax.vmap(ours(case)))(jnp.asarray(case["step"]))
    np.testing.assert_allclose(traced, case["lr"], rtol=2e-5, atol=2e-7 * case["peak_lr"])


def axolotl(case: dict[str, Any]) -> relora.schedules.Schedule:
    """The tooth over the cosine of transformers, which falls to 0."""
    p = case["params"]
    total, warmup = p["num_training_steps"], p["first_warmup_steps"]

    def cosine(t: int) -> float:
        if t < warmup:
            return t / warmup
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * ((t - warmup) / (total - warmup)))))

    return relora.jagged(cosine, p["cycle_length"], p["restart_warmup_steps"], p["anneal_steps"])


def test_a_tooth_over_any_schedule() -> None:
    case = goldens.settings("sched_17_axolotl_jagged")
    schedule = axolotl(case)  # the file counts from the first rate that its optimizer saw
    assert [case["peak_lr"] * schedule(step + 1) for step in case["step"]] == case["lr"]
    over_constant = jax.jit(jax.vmap(relora.jagged(lambda t: 2.0, cycle=10, rewarmup=4, anneal=2)))(jnp.arange(30))
    np.testing.assert_allclose(over_constant[:9], 2.0)
    tooth = 2 * (0.001 + 0.999 * np.array([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.5]))
    np.testing.assert_allclose(over_constant[10:20], tooth, rtol=1e-6)
    np.testing.assert_allclose(over_constant[20:], tooth, rtol=1e-6)


def test_settings_that_the_reference_refuses_are_refused() -> None:
    cases = goldens.settings("sched_rejects")["cases"]
    for case in cases:
        assert not case["accepted"]
        fields = {KEYS.get(name, name): value for name, value in case["params"].items() if value is not None}
        scheduler = {"cosine": "cyclic_cosine", None: "jagged_cosine"}.get(fields.pop("scheduler", None), "linear")
        if scheduler != "jagged_cosine":
            fields |= {"total": 90} | ({"cycle": 30} if scheduler == "cyclic_cosine" else {})
        with pytest.raises(ConfigError if scheduler == "linear" or "cycle" in fields else TypeError):
            relora.by_name(scheduler, peak=1.0, **fields)
    assert len(cases) == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total": 100, "cycle": 30}, "does not divide the 100 updates with adapters; set them to 90"),
        ({"total": 90, "cycle": 30, "warmup": 31}, "together exceed the cycle, 30"),
        ({"total": 90, "cycle": 30, "floor": 0.0}, "floor is 0.0 of the peak; it must be above 0"),
        ({"total": 90, "cycle": 30, "rewarmup": 31}, "re-warm-up, rewarmup, is 31 updates"),
    ],
)
def test_refusals_say_what_to_change(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        relora.jagged_cosine(1.0, **{"rewarmup": 5, **fields})


def test_unknown_names_and_a_tooth_without_room() -> None:
    with pytest.raises(ConfigError, match="did you mean 'jagged_cosine'"):
        relora.by_name("jaged_cosine", peak=1.0)
    with pytest.raises(ConfigError, match="no room for a re-warm-up of 8 and an annealing of 3"):
        relora.jagged(lambda t: 1.0, cycle=10, rewarmup=8, anneal=3)


def test_an_offset_moves_every_restart_and_the_end_is_the_floor() -> None:
    fields = {"total": 90, "cycle": 30, "warmup": 10, "rewarmup": 6, "floor": 0.1, "offset": 17}
    schedule, reference = relora.jagged_cosine(1.0, **fields), relora.jagged_cosine(1.0, **fields, compat="reference")
    assert [t for t in range(1, 90) if schedule(t) == 0] == [13, 43, 73]
    assert [t for t in range(1, 90) if reference(t) == 0] == [43, 73], "the reference skips the first"
    rates = [schedule(t) for t in range(79, 90)]
    assert all(late <= early for early, late in itertools.pairwise(rates)), "no rise at the end"
    assert max(schedule(t) for t in range(90, 200)) == pytest.approx(0.1)
    assert reference(89) > reference(82), "the reference rises again"
    assert schedule(85) == pytest.approx(0.1)


def test_the_total_may_be_traced() -> None:
    compiled = jax.jit(lambda t, total: relora.jagged_cosine(2.0, total, cycle=20, warmup=4, rewarmup=5)(t))
    for total in (40, 80):
        plain = relora.jagged_cosine(2.0, total, cycle=20, warmup=4, rewarmup=5)
        rates = [float(compiled(t, total)) for t in range(0, total, 3)]
        np.testing.assert_allclose(rates, [plain(t) for t in range(0, total, 3)], rtol=1e-5, atol=1e-6)
    assert compiled._cache_size() == 1
