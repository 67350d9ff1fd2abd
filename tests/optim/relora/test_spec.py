"""What is selected, and what is refused, with the reason."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.errors import ConfigError
from ssm_jax.optim import relora


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


SHAPES = {
    "attn": {"q": {"kernel": shape(16, 24), "bias": shape(24)}, "heads": {"kernel": shape(16, 2, 12)}},
    "mlp": {"up": {"kernel": shape(16, 64), "bias": shape(64)}, "w": shape(64, 16)},
    "layers": {"proj": {"kernel": shape(3, 16, 2, 8), "bias": shape(3, 16)}},
    "norm": {"scale": shape(16)},
}
HEADS, STACK = relora.Kernel("heads/kernel"), relora.Kernel(r"layers/.*kernel", (0,), (1,))


@pytest.mark.parametrize(
    ("select", "paths"),
    [
        ("mlp", ["mlp/up/kernel"]),
        (("attn/q", r"^mlp"), ["attn/q/kernel", "mlp/up/kernel"]),
        ((relora.Kernel("mlp/w"), "q"), ["attn/q/kernel", "mlp/w"]),
        (relora.Kernel("heads/kernel", outputs=(1, 2)), ["attn/heads/kernel"]),
        (STACK, ["layers/proj/kernel"]),
        (lambda path, leaf: leaf.ndim == 2 and leaf.shape[1] == 64, ["mlp/up/kernel"]),
        (lambda path, leaf: STACK if "proj/kernel" in path else None, ["layers/proj/kernel"]),
    ],
)
def test_selections(select: object, paths: list[str]) -> None:
    assert [leaf.path for leaf in relora.plan(SHAPES, select, 4).leaves] == paths


def test_shapes_of_the_factors() -> None:
    (leaf,) = relora.plan(SHAPES, STACK, 4, 8.0).leaves
    assert (leaf.batch, leaf.inputs, leaf.outputs) == ((0,), (1,), (2, 3))
    assert (leaf.a_shape(4), leaf.b_shape(4)) == ((3, 16, 4), (3, 4, 2, 8))
    assert (leaf.width_in, leaf.width_out) == (16, 16)


def test_published_defaults() -> None:
    spec = relora.plan({"kernel": shape(256, 512)}, "kernel")
    assert (spec.rank, spec.alpha, spec.scale) == (128, 32.0, 0.25)
    assert (relora.KEEP, relora.REWARMUP_STEPS, relora.WARM_START_STEPS) == ((0.0, 0.1), (10, 50), (3000, 5000))
    assert relora.REWARMUP_STEPS_PAPER == (50, 100)


@pytest.mark.parametrize(
    ("select", "settings", "message"),
    [
        ("attention", {}, r"'attention' matches no kernel"),
        ("mlp/upp/kernel", {}, "did you mean 'mlp/up/kernel'"),
        ("(", {}, "not a regular expression"),
        ((), {}, "takes no kernel; widen it"),
        (lambda path, leaf: False, {}, "takes no kernel"),
        (
            "mlp",
            {"rank": 17},
            "rank is 17, above the width of mlp/up/kernel, which maps 16 numbers to 64; lower it to at most 16",
        ),
        ("mlp", {"rank": 0}, "rank is 0; it must be an integer of at least 1"),
        ("mlp", {"alpha": 0.0}, "alpha is 0.0"),
        ("heads", {}, r"attn/heads/kernel has 3 axes.*which are stacked, inputs and outputs"),
        (relora.Kernel("heads", (0,), (1,), (2, 3)), {}, "has 3 axes"),
        (relora.Kernel("heads", inputs=(0, 1, 2)), {}, "has 3 axes"),
    ],
)
def test_refusals(select: object, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        relora.plan(SHAPES, select, **{"rank": 4, **settings})


def test_wrapping_twice_is_refused() -> None:
    params = {"kernel": jnp.ones((4, 4))}
    frozen, trainable, _ = relora.split(params, "kernel", 2)
    with pytest.raises(ConfigError, match=r"an adapter already \(kernel:a\); export them first"):
        relora.split(relora.combine(trainable, frozen), "kernel", 2)


def test_a_plan_is_stored_and_compared() -> None:
    spec = relora.plan(SHAPES, ("mlp", STACK), 4, 8.0)
    stored = relora.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert stored == spec
    assert hash(stored) == hash(spec)
    spec.require_same(stored)
    for other, message in (
        (relora.plan(SHAPES, ("mlp", STACK), 8, 8.0), "rank is 8, and the stored adapters have 4: set it to 4"),
        (relora.plan(SHAPES, ("mlp", STACK), 4, 16.0), "alpha is 16.0, and the stored adapters have 8.0"),
        (relora.plan(SHAPES, "mlp", 4, 8.0), "layers/proj/kernel has a low-rank path only in the stored state"),
        (relora.plan(SHAPES, ("mlp", "attn/q", STACK), 4, 8.0), "attn/q/kernel has a low-rank path only now"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.require_same(stored)


@pytest.mark.parametrize(("compat", "a", "b"), [(None, True, False), ("reference", False, False), ("v1", True, True)])
def test_initial_factors(compat: str | None, a: bool, b: bool) -> None:
    """Kaiming A and zero B; the reference's newest code draws neither, that of the first paper both."""
    params = {"kernel": jnp.ones((64, 2, 48))}
    _, trainable, spec = relora.split(params, relora.Kernel("kernel", outputs=(1, 2)), 16, compat=compat)
    A, B = trainable["kernel:a"], trainable["kernel:b"]
    assert (np.any(A != 0), np.any(B != 0)) == (a, b)
    if a:
        assert np.abs(A).max() <= 64**-0.5
        np.testing.assert_allclose(np.std(A), (3 * 64) ** -0.5, rtol=0.05)
    if b:
        assert np.abs(B).max() <= spec.rank**-0.5


def test_trees_that_do_not_belong_to_the_plan() -> None:
    _, trainable, spec = relora.split({"kernel": jnp.ones((4, 4))}, "kernel", 2)
    with pytest.raises(ConfigError, match="kernel is not among the parameters"):
        relora.export({}, trainable, spec)
