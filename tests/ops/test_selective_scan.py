"""The selective scan against its oracle, and what is peculiar to it: memory, sharding over channels, the decoding step."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssm_jax.ops.selective_scan import selective_scan
from tests.conformance.compare import assert_trees_close
from tests.conformance.jaxpr import array_sizes
from tests.conformance.op import Arrays, Case, ChunkedOpConformance, RaggedOpConformance, assert_run_close

OPTIONAL = ("D_E", "z_BLE", "dt_bias_E")


class TestSelectiveScan(RaggedOpConformance, ChunkedOpConformance):
    op = staticmethod(selective_scan)
    sequences = ("x_BLE", "dt_BLE", "B_BLN", "C_BLN", "z_BLE")
    output = "x_BLE"
    channels, entries = 12, 3

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        return {
            "x_BLE": normal(batch, length, self.channels),
            "dt_BLE": normal(batch, length, self.channels),
            "A_EN": -rng.uniform(0.05, 2.0, (self.channels, self.entries)).astype(np.float32),
            "B_BLN": normal(batch, length, self.entries),
            "C_BLN": normal(batch, length, self.entries),
            "D_E": normal(self.channels),
            "z_BLE": normal(batch, length, self.channels),
            "dt_bias_E": normal(self.channels),
        }

    def initial_state(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        return rng.normal(size=(batch, self.entries, self.channels)).astype(np.float32)

    @pytest.mark.parametrize("absent", [*[(name,) for name in OPTIONAL], OPTIONAL])
    def test_without_optional_inputs(self, absent: tuple[str, ...]) -> None:
        """And with step sizes that are given, not made by softplus."""
        case = self.case(37, "ragged")
        inputs = {name: x for name, x in case.inputs.items() if name not in absent}
        case = case._replace(inputs={**inputs, "dt_BLE": np.abs(inputs["dt_BLE"])})
        expected, actual = (
            self.run(self.call(implementation=name, dt_softplus=False), case) for name in ("reference", "xla")
        )
        assert_run_close(actual, expected, self.tolerance)

    def test_a_broken_state_ends_at_a_reset(self, any_implementation: str) -> None:
        """Not even infinities and NaNs cross into the next document, nor do their gradients."""
        case = self.case(5)
        case = case._replace(
            state=np.where(case.state > 0, np.inf, np.nan).astype(np.float32),
            masks={"reset": np.arange(5)[None].repeat(2, 0) == 0},
        )
        broken = self.run(self.call(implementation=any_implementation), case)
        sound = self.run(self.call(implementation=any_implementation), case._replace(state=np.zeros_like(case.state)))
        assert_run_close(broken, sound, 0.0)

    def test_huge_steps_forget_everything(self, any_implementation: str) -> None:
        """exp(dt A) underflows to an exact zero; nothing divides by it, and no logarithm of it is summed."""
        case = self.case(37)
        case.inputs["dt_BLE"][:, 20:] = 1e4
        case.cotangents[0][:, :20] = 0
        run = self.run(self.call(implementation=any_implementation), case)
        assert run["d_x_BLE"][:, 20:].any()
        assert not run["d_x_BLE"][:, :20].any()
        assert not run["d_state"][0].any()

    @pytest.mark.parametrize("length", [1, 37])
    def test_step_sizes_of_low_rank_equal_their_product(self, length: int, any_implementation: str) -> None:
        """With the gradients of both factors: those that the product passes on."""
        case, rng = jax.tree.map(jnp.asarray, self.case(length, "ragged")), np.random.default_rng(1)
        low, up = (rng.normal(size=shape).astype(np.float32) for shape in ((4, length, 3), (3, self.channels)))
        rest = {name: x for name, x in case.inputs.items() if name != "dt_BLE"}

        def both(scan: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]) -> Any:
            (y, state), pull_back = jax.vjp(scan, jnp.asarray(low), jnp.asarray(up))
            present = jnp.asarray(np.arange(length) < case.masks["lengths"][:, None])[..., None]
            return (
                jnp.where(present, y, 0),
                state,
                pull_back((jnp.where(present, case.cotangents[0], 0), case.cotangents[1])),
            )

        def run(dt: jax.Array, dt_up: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            how: dict[str, Any] = {"implementation": any_implementation, "dt_up_RE": dt_up, **case.masks}
            return selective_scan(dt_BLE=dt, state=case.state, **rest, **how)

        got, expected = both(run), both(lambda low, up: run(low @ up, None))
        assert_trees_close(got, expected, 1e-5, relative=True)


class OnTPU(TestSelectiveScan):
    """The kernels of TPUs, interpreted. Interpreting takes time: one case stands for several of the promises."""

    def run_kernel(self, case: Case, **static: Any) -> Arrays:
        return self.run(self.call(implementation="pallas", **static), case)


@pytest.mark.parametrize(
    ("length", "masks", "chunk_size"),
    [(1, "none", None), (2, "ragged", 2), (37, "ragged", 7), (100, "documents", 32), (300, "ragged", 32)],
)
def test_tpu_kernels_match_oracle(length: int, masks: str, chunk_size: int | None) -> None:
    """With chunks that fill tiles and chunks that do not, one or many of them, and more than one step of a program.

    Absent tokens have gradients of exactly zero.
    """
    case = OnTPU().case(length, masks)
    run = OnTPU().run_kernel(case, chunk_size=chunk_size)
    assert_run_close(run, OnTPU().oracle(length, masks), OnTPU.tolerance)
    if masks == "ragged":
        present = (np.arange(length) < case.masks["lengths"][:, None])[..., None]
        assert not any((run[f"d_{name}"] * ~present).any() for name in OnTPU.sequences)


def test_tpu_kernels_are_deaf_to_absent_tokens() -> None:
    """Whatever stands there, and whatever comes back from there: not even NaN times zero."""
    case = OnTPU().case(37, "ragged")
    absent = (np.arange(37) >= case.masks["lengths"][:, None])[..., None]
    noise = {name: np.where(absent, np.nan, case.inputs[name]) for name in ("x_BLE", "dt_BLE", "z_BLE")}
    loud = case._replace(
        inputs={**case.inputs, **noise}, cotangents=(np.where(absent, 1e3, case.cotangents[0]), case.cotangents[1])
    )

    def evaluate(case: Case) -> Any:
        (_, state), pull_back = jax.vjp(
            lambda inputs, state: OnTPU().call(implementation="pallas")(inputs, state, case.masks),
            case.inputs,
            case.state,
        )
        return state, pull_back(case.cotangents)

    compiled = jax.jit(evaluate)
    quiet_state, (quiet, quiet_d_state) = compiled(case)
    loud_state, (found, loud_d_state) = compiled(loud)
    np.testing.assert_array_equal(loud_state, quiet_state)
    np.testing.assert_array_equal(loud_d_state, quiet_d_state)
    for name in quiet:
        np.testing.assert_array_equal(found[name], quiet[name], name)


def test_tpu_kernels_read_and_write_bfloat16() -> None:
    case = OnTPU().case(37, "documents", jnp.bfloat16)
    run, expected = OnTPU().run_kernel(case), dict(OnTPU().oracle(37, "documents", jnp.bfloat16))
    assert run["d_x_BLE"].dtype == run["d_B_BLN"].dtype == run["y"].dtype == jnp.bfloat16
    assert_run_close({"state": run.pop("state")}, {"state": expected.pop("state")}, OnTPU.bfloat16_state_tolerance)
    assert_run_close(run, expected, OnTPU.bfloat16_tolerance)


def test_tpu_kernels_of_a_sequence_in_pieces() -> None:
    """The state goes from one call to the next, through pieces of one token too."""
    pieces = OnTPU().call_in_pieces((1, 20, 16), implementation="pallas")
    run = OnTPU().run(pieces, OnTPU().case(37, "ragged"))
    assert_run_close(run, OnTPU().oracle(37, "ragged"), OnTPU.tolerance)


def test_tpu_kernels_under_vmap() -> None:
    """Some arguments mapped, the parameters and the masks not."""
    case = jax.tree.map(jnp.asarray, OnTPU().case(20, "ragged"))
    x = jnp.stack([case.inputs["x_BLE"], 2 * case.inputs["x_BLE"]])

    def evaluate(x: jax.Array) -> Any:
        def scan(inputs: Arrays) -> Any:
            return OnTPU().call(implementation="pallas")(inputs, case.state, case.masks)

        result, pull_back = jax.vjp(scan, {**case.inputs, "x_BLE": x})
        return result, pull_back(case.cotangents)

    together, alone = jax.jit(jax.vmap(evaluate))(x), jax.jit(evaluate)
    for i in range(2):
        assert_trees_close(jax.tree.map(lambda v, i=i: v[i], together), alone(x[i]), 1e-5, relative=True)


def test_tpu_kernels_end_a_broken_state_at_a_reset() -> None:
    TestSelectiveScan.test_a_broken_state_ends_at_a_reset(OnTPU(), "pallas")


class WideOnTPU(OnTPU):
    """More channels than one program has registers for, no multiple of 128, and more state entries than stay in them at once."""

    channels, entries = 1030, 21


def test_tpu_kernels_of_many_channels_and_entries() -> None:
    run = WideOnTPU().run_kernel(WideOnTPU().case(5, "documents"))
    assert_run_close(run, WideOnTPU().oracle(5, "documents"), WideOnTPU.tolerance)


def test_tpu_kernels_without_optional_inputs() -> None:
    case = OnTPU().case(20)
    inputs = {name: x for name, x in case.inputs.items() if name not in OPTIONAL}
    case = case._replace(inputs={**inputs, "dt_BLE": np.abs(inputs["dt_BLE"])})
    expected, actual = (
        OnTPU().run(OnTPU().call(implementation=name, dt_softplus=False), case) for name in ("reference", "pallas")
    )
    assert_run_close(actual, expected, OnTPU.tolerance)


@pytest.mark.parametrize(("entries", "masks", "kernels"), [(16, "none", 2), (16, "ragged", 2), (200, "none", 0)])
def test_lowers_for_a_tpu(entries: int, masks: str, kernels: int) -> None:
    """Forward and backward are a kernel each, for the program of a TPU only; 200 entries are more than stay in fast memory."""
    test = WideOnTPU()
    test.entries = entries
    traced = jax.jit(
        lambda case: jax.vjp(lambda i, s: test.call()(i, s, case.masks), case.inputs, case.state)[1](case.cotangents)
    )
    case = test.case(70, masks)
    for platform, expected in (("tpu", kernels), ("cpu", 0)):
        program = traced.trace(case).lower(lowering_platforms=(platform,)).as_text()
        assert program.count("@tpu_custom_call") == expected


def test_what_no_tpu_kernel_is_written_for_runs_anyway() -> None:
    """A chunk of more tokens than its kernel's registers have lanes."""
    case = OnTPU().case(150)
    lowered = jax.jit(OnTPU().call(implementation="pallas", chunk_size=150)).lower(*case[:3])
    assert "tpu_custom_call" not in lowered.as_text()
    y, state = lowered.compile()(*case[:3])
    assert_run_close({"y": y, "state": state}, {name: OnTPU().oracle(150)[name] for name in ("y", "state")}, 1e-5)


def _shapes(length: int, variant: str) -> tuple[Arrays, dict[str, Any]]:
    """Abstract arguments at a size where a chunk, the kept states and all states differ widely."""
    batch, channels, entries = 2, 256, 16

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    sequence, maps = float32(batch, length, channels), float32(batch, length, entries)
    inputs = {
        "x_BLE": sequence,
        "dt_BLE": sequence,
        "A_EN": float32(channels, entries),
        "B_BLN": maps,
        "C_BLN": maps,
        "D_E": float32(channels),
        "z_BLE": sequence,
        "dt_bias_E": float32(channels),
    }
    masks: dict[str, Any] = {}
    if variant in ("state", "all"):
        inputs["state"] = float32(batch, entries, channels)
    if variant in ("reset", "all"):
        masks["reset"] = jax.ShapeDtypeStruct((batch, length), bool)
    if variant in ("lengths", "all"):
        masks["lengths"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return inputs, masks


def _value_and_grad(inputs: Arrays, masks: Arrays) -> Any:
    def loss(inputs: Arrays) -> jax.Array:
        y, state = selective_scan(**inputs, **masks, chunk_size=16)
        return jnp.sum(y**2) + jnp.sum(state**2)

    return jax.value_and_grad(loss)(inputs)


@pytest.mark.parametrize("variant", ["plain", "state", "reset", "lengths", "all"])
@pytest.mark.parametrize("length", [512, 509])
def test_no_array_of_all_states(length: int, variant: str) -> None:
    """Forward and backward hold one chunk of states and one state per chunk."""
    inputs, masks = _shapes(length, variant)
    all_states = 2 * length * 256 * 16
    size, shape, primitive = array_sizes(_value_and_grad, inputs, masks)[0]
    assert size <= all_states / 4, (shape, primitive)


def test_memory_grows_with_kept_states_and_activations_only() -> None:
    """Compiled, for the CPU: what a token adds to the memory of a training step, and to that of a prefill."""

    def temporary_bytes(function: Any, length: int) -> int:
        analysis = jax.jit(function).lower(*_shapes(length, "all")).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    def prefill(inputs: Arrays, masks: Arrays) -> Any:
        return selective_scan(**inputs, **masks, chunk_size=16)

    short, long, longer = (temporary_bytes(_value_and_grad, length) for length in (256, 512, 1024))
    kept_states = 256 * 16 // 16
    sums_over_channels = 2 * 16
    assert longer - long <= 2 * 512 * 4 * (kept_states + 2 * sums_over_channels + 3 * 256)
    assert longer - long <= 2.1 * (long - short)
    short, long = (temporary_bytes(prefill, length) for length in (256, 1024))
    assert long - short <= 2 * 768 * 4 * 8


def test_backward_keeps_inputs_and_one_state_per_chunk() -> None:
    inputs = jax.tree.map(jnp.asarray, TestSelectiveScan().case(64).inputs)
    _, pullback = jax.vjp(lambda inputs: selective_scan(**inputs, chunk_size=16), inputs)
    state = 2 * 3 * 12
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept <= sum(x.size for x in inputs.values()) + state * (64 // 16 + 1)


@pytest.mark.parametrize("masked", [False, True])
def test_one_token_takes_no_loop(masked: bool) -> None:
    inputs, masks = _shapes(1, "all")
    primitives = {
        name for _, _, name in array_sizes(lambda i, m: selective_scan(**i, **m), inputs, masks if masked else {})
    }
    assert not primitives & {"scan", "while"}


class Wide(TestSelectiveScan):
    """Only for its inputs: enough channels for a mesh."""

    channels, entries = 512, 4


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("masks", ["none", "ragged"])
def test_shards_over_lanes_and_channels_without_moving_sequences(masks: str, length: int) -> None:
    """Forward, the devices exchange nothing. Backward, they add up the gradients of what they share, after all loops."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    case = Wide().case(length, "ragged")
    case = case._replace(masks=case.masks if masks == "ragged" else {})
    specs = {"B_BLN": ("data",), "C_BLN": ("data",), "A_EN": ("tensor",), "D_E": ("tensor",), "dt_bias_E": ("tensor",)}

    def sharding(*spec: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = (
        {name: sharding(*specs.get(name, ("data", None, "tensor"))) for name in case.inputs},
        sharding("data", None, "tensor"),
        {name: sharding("data") for name in case.masks},
        (sharding("data", None, "tensor"), sharding("data", None, "tensor")),
    )
    op = Wide().call()

    def forward(inputs: Arrays, state: Any, masks: Arrays, cotangents: Any) -> Any:
        del cotangents
        return op(inputs, state, masks)

    def backward(inputs: Arrays, state: Any, masks: Arrays, cotangents: Any) -> Any:
        return jax.vjp(lambda inputs, state: op(inputs, state, masks), inputs, state)[1](cotangents)

    for function, expected_exchanges in ((forward, set()), (backward, {("all-reduce", "main")})):
        compiled = jax.jit(function, in_shardings=shardings).lower(*case).compile()
        assert _exchanges(compiled.as_text()) == expected_exchanges
        actual, expected = compiled(*jax.device_put(tuple(case), shardings)), jax.jit(function)(*case)
        for leaf, like in zip(
            actual, (shardings[0], shardings[1]) if function is backward else shardings[3], strict=True
        ):
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), leaf, like))
        for leaf, target in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, target, atol=1e-5 * np.abs(target).max())


def _exchanges(hlo: str) -> set[tuple[str, str]]:
    """(collective, "main" or the name of the inner computation it is in) of a compiled module."""
    found = set()
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(", line):
            computation = "main" if header[1] else header[2]
        elif exchange := re.search(r" (all-\w+|collective-\w+|reduce-scatter)[\w-]*\(", line):
            found.add((exchange[1], computation))
    return found
