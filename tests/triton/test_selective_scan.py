"""The selective scan's Triton kernels, interpreted, against the oracle; and what is theirs alone: segments, lanes, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ssm_jax.ops.selective_scan import selective_scan, triton
from tests.conformance.op import Arrays, assert_run_close
from tests.ops import test_selective_scan as base


class TestSelectiveScan(base.TestSelectiveScan):
    implementations = ("triton",)

    def test_segments_equal_the_oracle(self, monkeypatch: pytest.MonkeyPatch, masks: str) -> None:
        """A length that is cut into segments which run at once: 37 tokens in 5 chunks, 3 segments, the last one shorter."""
        monkeypatch.setattr(triton, "MIN_SEGMENT", 13)
        assert triton._segment(2, self.channels, 5, 8, triton.TUNING["forward"]) == 2
        actual = self.run(self.call(implementation="triton", chunk_size=8), self.case(37, masks))
        assert_run_close(actual, self.oracle(37, masks), self.tolerance)

    def test_a_broken_state_ends_at_a_reset_between_segments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton, "MIN_SEGMENT", 8)
        case = self.case(24)
        case.inputs["x_BLE"][:, 3] = np.nan
        case = case._replace(masks={"reset": np.arange(24)[None].repeat(2, 0) == 12})
        y, state = jax.jit(self.call(implementation="triton", chunk_size=8))(*case[:3])
        sound = {name: x[:, 12:] if name in self.sequences else x for name, x in case.inputs.items()}
        expected, last = jax.jit(self.call(implementation="xla"))(sound, np.zeros_like(case.state), {})
        assert np.isnan(y[:, 3:12]).all()
        assert_run_close({"y": y[:, 12:], "state": state}, {"y": expected, "state": last}, self.tolerance)


class TestWide(base.TestSelectiveScan):
    """More channels than a program has, and not a whole number of programs; entries that fill their registers."""

    __test__ = False
    channels, entries = 40, 4


@pytest.mark.parametrize("masks", ["none", "ragged"])
def test_channels_beyond_one_program(masks: str) -> None:
    wide = TestWide()
    actual = wide.run(wide.call(implementation="triton"), wide.case(9, masks))
    assert_run_close(actual, wide.oracle(9, masks), wide.tolerance)


def test_shared_parameters_are_not_repeated_under_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped over the sequences alone, and over the parameters alone: lanes of the kernel either way, in three segments."""
    monkeypatch.setattr(triton, "MIN_SEGMENT", 2)
    wide = TestWide()
    case = jax.tree.map(jnp.asarray, wide.case(5))
    parameters = ("A_EN", "D_E", "dt_bias_E")

    def loss(mapped: Arrays, shared: Arrays, implementation: str) -> jax.Array:
        y, state = selective_scan(**mapped, **shared, chunk_size=2, implementation=implementation)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + jnp.sum(state)

    for mapped_names in (parameters, tuple(set(case.inputs) - set(parameters))):
        # No lane's is the mean of all: what uses one lane's parameters for all of them has wrong sums.
        scales = jnp.asarray([1.0, 0.5, 2.0])
        mapped = {n: jnp.einsum("v,...->v...", scales, case.inputs[n]) for n in mapped_names}
        shared = {n: x for n, x in case.inputs.items() if n not in mapped_names}

        def gradients(implementation: str, mapped: Arrays = mapped, shared: Arrays = shared) -> Arrays:
            def total(mapped: Arrays, shared: Arrays) -> jax.Array:
                return jax.vmap(lambda m: loss(m, shared, implementation))(mapped).sum()

            d_mapped, d_shared = jax.jit(jax.grad(total, argnums=(0, 1)))(mapped, shared)
            return {**d_mapped, **d_shared}

        assert_run_close(gradients("triton"), gradients("xla"), 1e-5)


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_each_device_runs_its_own_lanes_and_channels(shape: tuple[int, int]) -> None:
    """On a mesh: values and gradients of one device, also where 2 lanes do not divide over 4."""
    wide = TestWide()
    case = wide.case(9, "documents")
    expected = wide.run(wide.call(implementation="triton"), case)
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert_run_close(wide.run(wide.call(implementation="triton"), case), expected, 1e-6)
