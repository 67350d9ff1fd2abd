"""Which implementation runs: by name, or by the platform that the computation is lowered for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from ssm_jax.errors import ImplementationError
from ssm_jax.ops import dispatch

# Each implementation leaves its own mark in the program.
MARKS: dict[str, Callable[..., Any]] = {"reference": jnp.sin, "xla": jnp.cos, "pallas": jnp.tanh, "triton": jnp.log}
PROGRAM_MARKS = {"reference": "sine", "xla": "cosine", "pallas": "tanh", "triton": "log"}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_implementations", {})
    monkeypatch.setattr(dispatch, "_unavailable", {})


def _register(*names: str) -> None:
    for name in names:
        dispatch.register("wave", name, lambda x, *, scale, mark=MARKS[name]: scale * mark(x))


def _program(platform: str, implementation: str | None = None) -> str:
    """The implementation whose mark is in the program for ``platform``, and no other's."""
    traced = jax.jit(lambda x: dispatch.call("wave", implementation, x, scale=2.0)).trace(jnp.ones(3))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    (found,) = (name for name, mark in PROGRAM_MARKS.items() if f"stablehlo.{mark} " in program)
    return found


@pytest.mark.parametrize(
    ("platform", "expected"), [("tpu", "pallas"), ("cuda", "triton"), ("rocm", "xla"), ("cpu", "xla")]
)
def test_lowering_platform_decides(platform: str, expected: str) -> None:
    _register(*MARKS)
    assert _program(platform) == dispatch.choice("wave", platform) == expected


def test_missing_kernel_falls_back() -> None:
    _register("reference", "xla", "triton")
    assert (_program("tpu"), _program("cuda")) == ("xla", "triton")


def test_no_kernels_no_branches() -> None:
    _register("reference", "xla")
    jaxpr = jax.make_jaxpr(lambda x: dispatch.call("wave", None, x, scale=2.0))(jnp.ones(3))
    assert "platform_index" not in str(jaxpr)
    assert _program("tpu") == "xla"


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_name_forces(name: str, platform: str) -> None:
    _register(*MARKS)
    assert _program(platform, implementation=name) == name


def test_runs_what_it_chose() -> None:
    _register(*MARKS)
    x = jnp.linspace(0.1, 0.9, 3)
    assert jnp.allclose(dispatch.call("wave", None, x, scale=2.0), 2 * jnp.cos(x))
    assert jnp.allclose(dispatch.call("wave", "reference", x, scale=2.0), 2 * jnp.sin(x))


def test_vmap_passes_through() -> None:
    _register(*MARKS)
    x = jnp.linspace(0.1, 0.9, 6).reshape(2, 3)
    assert jnp.allclose(jax.jit(jax.vmap(lambda row: dispatch.call("wave", None, row, scale=2.0)))(x), 2 * jnp.cos(x))


def test_only_what_is_lowered_is_traced() -> None:
    """A kernel that cannot even be traced harms nobody on another platform; under vmap neither."""
    _register("reference", "xla")

    def kernel(x: jax.Array, *, scale: float) -> jax.Array:
        raise RuntimeError("traced")

    dispatch.register("wave", "pallas", kernel)
    x = jnp.linspace(0.1, 0.9, 6).reshape(2, 3)
    traced = jax.jit(jax.vmap(lambda row: dispatch.call("wave", None, row, scale=2.0))).trace(x)
    assert "cosine" in traced.lower(lowering_platforms=("cpu",)).as_text()
    with pytest.raises(RuntimeError, match="traced"):
        traced.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_under_vmap_is_the_mapped_kernel(axis: int) -> None:
    """Twice mapped, over axes that are not the first ones, with an argument that is not mapped."""
    dispatch.register("outer", "xla", lambda x, by: x[:, None] * by)
    dispatch.register("outer", "triton", lambda x, by: jnp.tanh(x)[:, None] * by)
    x, by = jnp.ones((2, 3, 4)), jnp.ones(5)

    def mapped(x: jax.Array, by: jax.Array) -> jax.Array:
        inner = jax.vmap(lambda x: dispatch.call("outer", None, x, by), in_axes=axis)
        return jax.vmap(inner, in_axes=2)(x)

    lowered = jax.jit(mapped).trace(x, by).lower(lowering_platforms=("cuda",))
    assert "tanh" in lowered.as_text()
    assert lowered.out_info.shape == jax.eval_shape(mapped, x, by).shape


def test_absent_arrays_pass_through() -> None:
    """None is an argument like any other: an op's optional input."""
    for name in ("xla", "pallas"):
        dispatch.register("shift", name, lambda x, by: x if by is None else x + by)
    assert dispatch.call("shift", None, jnp.ones(()), None) == 1
    assert dispatch.call("shift", None, jnp.ones(()), jnp.ones(())) == 2


def test_unknown_implementation() -> None:
    _register("reference", "xla")
    with pytest.raises(ImplementationError, match=r"wave: implementation 'vulkan' .*no such.*'reference', 'xla'"):
        dispatch.call("wave", "vulkan", jnp.ones(3), scale=2.0)


def test_unavailable_implementation_says_why() -> None:
    _register("reference", "xla")
    dispatch.register_unavailable("wave", "triton", "jax-triton is not installed")
    with pytest.raises(ImplementationError, match="'triton' cannot run here .*jax-triton is not installed"):
        dispatch.call("wave", "triton", jnp.ones(3), scale=2.0)
    assert dispatch.explain("wave", "cuda") == "wave on cuda: xla (triton: jax-triton is not installed)"


def _called(x: jax.Array) -> Any:
    return dispatch.call("wave", None, x, scale=2.0)


def test_preference_gives_none_another_meaning() -> None:
    """Wherever the computation is lowered for; a name still forces, the platform decides again afterwards and within None."""
    _register(*MARKS)
    with dispatch.prefer("triton"):
        assert [_program(platform) for platform in ("cpu", "tpu", "cuda")] == ["triton"] * 3
        assert _program("cpu", implementation="pallas") == "pallas"
        with dispatch.prefer(None):
            assert _program("tpu") == "pallas"
        with dispatch.prefer("xla"):
            assert _program("cuda") == "xla"
        assert _program("cpu") == "triton"
    assert _program("cpu") == "xla"


def test_preference_ends_with_an_error() -> None:
    _register(*MARKS)
    with pytest.raises(KeyError), dispatch.prefer("triton"):
        raise KeyError
    assert _program("cpu") == "xla"


def test_a_compiled_function_follows_the_preference() -> None:
    """One jitted function, called with and without: no program of the other meaning is used again."""
    _register(*MARKS)
    x = jnp.linspace(0.1, 0.9, 3)
    run = jax.jit(_called)
    for _ in range(2):
        assert jnp.allclose(run(x), 2 * jnp.cos(x))
        with dispatch.prefer("triton"):
            assert jnp.allclose(run(x), 2 * jnp.log(x))


def test_ops_without_the_preferred_implementation_choose_by_platform() -> None:
    _register("reference", "xla", "pallas")
    with dispatch.prefer("triton"):
        assert (_program("tpu"), _program("cuda")) == ("pallas", "xla")


def test_a_preferred_implementation_that_cannot_run_says_why() -> None:
    _register("reference", "xla")
    dispatch.register_unavailable("wave", "triton", "jax-triton is not installed")
    with dispatch.prefer("triton"), pytest.raises(ImplementationError, match="jax-triton is not installed"):
        _called(jnp.ones(3))


@pytest.mark.parametrize("name", ["vulkan", "reference"])
def test_preference_of_an_unknown_name(name: str) -> None:
    with pytest.raises(ImplementationError, match=rf"named '{name}'.*'pallas', 'triton', 'xla'"), dispatch.prefer(name):
        raise AssertionError("nothing runs under an unknown name")


def test_explain() -> None:
    _register("reference", "xla", "pallas")
    assert dispatch.implementations("wave") == ("reference", "xla", "pallas")
    assert dispatch.explain("wave").splitlines() == [
        "wave on tpu: pallas",
        "wave on cuda: xla (triton: not written for this op)",
        "wave on rocm: xla",
        "wave on cpu: xla",
    ]
    with pytest.raises(ImplementationError, match="No op is named 'wavy'; the ops are .*'wave'"):
        dispatch.explain("wavy")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_inside_shard_map_results_vary_as_their_inputs_do(platform: str) -> None:
    """Also under vmap, and with an argument that every device has whole."""
    dispatch.register("scaled", "xla", lambda x, by: (jnp.cos(x) * by, by + 1))
    dispatch.register("scaled", "pallas", lambda x, by: (jnp.tanh(x) * by, by + 1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=(PartitionSpec("data"), PartitionSpec()),
    )
    def run(x: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
        mapped = jax.vmap(lambda x: dispatch.call("scaled", None, x, by), out_axes=0)(x)[0]
        alone, whole = dispatch.call("scaled", None, x, by)
        return mapped - alone, whole

    x, by = jnp.linspace(0.1, 0.9, 6).reshape(2, 3), jnp.ones(3)
    assert ("tanh" in run.trace(x, by).lower(lowering_platforms=(platform,)).as_text()) == (platform == "tpu")
    difference, whole = run(x, by)
    assert not difference.any()
    assert (whole == 2).all()


def test_nothing_is_launched_over_no_tokens() -> None:
    _register("reference", "xla", "pallas")
    traced = jax.jit(lambda x: dispatch.call("wave", None, x, scale=2.0)).trace(jnp.ones((2, 0)))
    assert "tanh" not in traced.lower(lowering_platforms=("tpu",)).as_text()
