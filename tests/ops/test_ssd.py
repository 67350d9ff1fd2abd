"""SSD against its oracle; and what it promises beside the numbers: memory, sharding, and a seam for kernels."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax.ops import dispatch, ssd
from ssm_jax.ops.ssd import xla
from ssm_jax.ops.ssd.inputs import Inputs
from tests.conformance.jaxpr import array_sizes
from tests.conformance.op import ChunkedOpConformance, RaggedOpConformance, assert_run_close


def arrays(
    rng: np.random.Generator, batch: int, length: int, heads: int, groups: int, keys: int, values: int
) -> dict[str, Any]:
    made = {
        "x_BLHP": rng.normal(size=(batch, length, heads, values)),
        "dt_BLH": rng.normal(size=(batch, length, heads)),
        "A_H": -rng.uniform(0.05, 2.0, heads),
        "B_BLGN": rng.normal(size=(batch, length, groups, keys)),
        "C_BLGN": rng.normal(size=(batch, length, groups, keys)),
        "D_H": rng.normal(size=heads),
        "dt_bias_H": rng.normal(size=heads),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


class TestSSD(RaggedOpConformance, ChunkedOpConformance):
    op = staticmethod(ssd)
    sequences = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")
    output = "x_BLHP"

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        return arrays(rng, batch, length, heads=4, groups=2, keys=3, values=5)

    def initial_state(self, rng: np.random.Generator, batch: int) -> Any:
        return rng.normal(size=(batch, 4, 3, 5)).astype(np.float32)

    @pytest.mark.parametrize(("groups", "length"), [(1, 1), (4, 37)])
    @pytest.mark.parametrize(
        "options", [{"dt_limit": (0.3, 0.9)}, {"dt_softplus": False}, {"D_H": None, "dt_bias_H": None}], ids=str
    )
    def test_options_match_oracle(self, options: dict[str, Any], groups: int, length: int) -> None:
        rng = np.random.default_rng(length)
        inputs = {**arrays(rng, 2, length, heads=4, groups=groups, keys=3, values=5), **options}
        static = {name: inputs.pop(name) for name in ("dt_limit", "dt_softplus") if name in inputs}
        inputs = {name: array for name, array in inputs.items() if array is not None}
        case = self.case(length)._replace(inputs=inputs)
        actual = self.run(self.call(implementation="xla", **static), case)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda array: array.astype(np.float64), case)
            expected = self.run(self.call(implementation="reference", **static), wide)
        assert_run_close(actual, expected, self.tolerance)


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    inputs = jax.tree.map(jnp.asarray, arrays(np.random.default_rng(0), 1, 4, heads=4, groups=3, keys=2, values=2))
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        ssd(**inputs)


def shapes(batch: int, length: int, heads: int, groups: int, keys: int, values: int) -> dict[str, Any]:
    made = arrays(np.random.default_rng(0), 1, 1, heads, groups, keys, values)
    return {
        name: jax.ShapeDtypeStruct((batch, length, *x.shape[2:]) if x.ndim > 1 else x.shape, x.dtype)
        for name, x in made.items()
    }


def loss(inputs: dict[str, Any]) -> Any:
    y, state = ssd(**inputs)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state))


def test_no_array_holds_a_state_per_token() -> None:
    """The largest ones are a chunk's scores per head, or the states at its ends: both of x's order."""
    batch, length, heads, keys, values = 2, 1024, 4, 64, 64
    inputs = shapes(batch, length, heads, 1, keys, values)
    largest, *_ = array_sizes(jax.value_and_grad(loss), inputs)
    assert largest[0] <= 1.2 * batch * length * heads * values, largest


@pytest.mark.parametrize("function", [loss, jax.grad(loss)], ids=["forward", "backward"])
def test_memory_is_linear_in_length(function: Any) -> None:
    short, long = (
        jax.jit(function).lower(shapes(1, length, 2, 1, 16, 16)).compile().memory_analysis().temp_size_in_bytes
        for length in (4096, 65536)
    )
    assert long <= 16 * short * 1.05


@pytest.mark.parametrize("groups", [1, 4])
def test_lanes_and_heads_are_split_without_gathering(groups: int) -> None:
    """Lanes over "data", heads over "tensor"; B and C over "tensor" too where there is a group per device."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    of_groups = P("data", None, "tensor" if groups == 4 else None)
    specs = {"x_BLHP": P("data", None, "tensor"), "dt_BLH": P("data", None, "tensor"), "B_BLGN": of_groups}
    specs = {"C_BLGN": of_groups, "A_H": P("tensor"), "D_H": P("tensor"), "dt_bias_H": P("tensor"), **specs}
    inputs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, x in shapes(4, 64, 8, groups, 16, 16).items()
    }
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(inputs).compile()
    assert "all-reduce" in compiled.as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    for name, spec in specs.items():
        assert compiled.output_shardings[1][name].is_equivalent_to(NamedSharding(mesh, spec), len(inputs[name].shape))


def test_a_kernel_takes_over_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def forward(inputs: Inputs, **static: Any) -> Any:
        called.append("forward")
        return xla.forward(inputs, **static)

    def backward(inputs: Inputs, *cotangents: Any, **static: Any) -> Any:
        called.append("backward")
        return xla.backward(inputs, *cotangents, **static)

    monkeypatch.setitem(dispatch._implementations["ssd"], "kernel", forward)
    monkeypatch.setitem(dispatch._implementations["ssd_backward"], "kernel", backward)
    inputs = shapes(1, 9, 2, 1, 2, 2)
    masks = {"lengths": jax.ShapeDtypeStruct((1,), jnp.int32), "reset": jax.ShapeDtypeStruct((1, 9), bool)}
    gradient = jax.grad(lambda inputs, masks: ssd(**inputs, **masks, implementation="kernel")[0].sum())
    jax.eval_shape(gradient, inputs, masks)
    assert called == ["forward", "backward"]
