"""Distillation in chunks is the plain divergence of two distributions, and its gradient, on one device and on eight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssm_jax.ops import linear_cross_entropy, linear_distillation
from tests.conformance.compare import assert_close
from tests.conformance.jaxpr import array_sizes

VOCAB = 29


def _inputs(batch: int = 4, length: int = 37, rows: int = VOCAB, teacher_rows: int = VOCAB) -> tuple[jax.Array, ...]:
    """Features and readout of student and teacher, of different widths, and weights, a third of them zero."""
    keys = jax.random.split(jax.random.key(0), 5)
    features = jax.random.normal(keys[0], (batch, length, 8))
    readout = jax.random.normal(keys[1], (8, rows))
    teacher_features = jax.random.normal(keys[2], (batch, length, 12))
    teacher_readout = jax.random.normal(keys[3], (12, teacher_rows))
    weights = jnp.where(jax.random.uniform(keys[4], (batch, length)) < 0.3, 0.0, 0.7)
    return features, readout, teacher_features, teacher_readout, weights


def _definition(
    features: Any,
    readout: Any,
    teacher_features: Any,
    teacher_readout: Any,
    weights: Any,
    temperature: float = 1.0,
    vocab_size: int = VOCAB,
) -> tuple[Any, Any]:
    def probabilities(features: Any, readout: Any) -> Any:
        powers = jnp.exp(jnp.einsum("bld,dv->blv", features, readout)[..., :vocab_size] / temperature)
        return powers / jnp.sum(powers, axis=-1, keepdims=True)

    p, q = probabilities(teacher_features, teacher_readout), probabilities(features, readout)
    return jnp.sum(weights * temperature**2 * jnp.sum(p * jnp.log(p / q), axis=-1)), jnp.sum(weights)


@functools.partial(jax.jit, static_argnames=("loss", "temperature", "vocab_size", "chunk_size", "batch_shards"))
def _mean_and_gradients(
    loss: Any, features: Any, readout: Any, teacher_features: Any, teacher_readout: Any, weights: Any, **options: Any
) -> Any:
    """The mean loss, and its gradients with respect to features, readout and weights."""

    def mean(features: Any, readout: Any, weights: Any) -> Any:
        total, weight = loss(features, readout, teacher_features, teacher_readout, weights, **options)
        return total / weight

    return jax.value_and_grad(mean, argnums=(0, 1, 2))(features, readout, weights)


def _assert_exact(actual: Any, *arrays: Any, tolerance: float = 5e-6, **options: Any) -> None:
    """``actual`` is the mean and the gradients of the definition in float64, within ``tolerance`` of each largest entry."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        expected = jax.device_get(_mean_and_gradients(_definition, *wide, **options))
    for got, target in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(got, target, tolerance * float(np.abs(target).max()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 37, None])
def test_is_the_definition_in_chunks_of_any_size(chunk_size: int | None, temperature: float) -> None:
    arrays = _inputs()
    actual = _mean_and_gradients(linear_distillation, *arrays, chunk_size=chunk_size, temperature=temperature)
    _assert_exact(actual, *arrays, temperature=temperature)


@pytest.mark.parametrize(("rows", "teacher_rows"), [(32, 32), (32, 40), (40, 32), (VOCAB, 32), (32, VOCAB)])
def test_rows_that_are_no_tokens_have_no_probability_on_either_side(rows: int, teacher_rows: int) -> None:
    arrays = _inputs(rows=rows, teacher_rows=teacher_rows)
    actual = _mean_and_gradients(linear_distillation, *arrays, vocab_size=VOCAB, temperature=2.0, chunk_size=7)
    _assert_exact(actual, *arrays, vocab_size=VOCAB, temperature=2.0)
    d_readout = actual[1][1]
    assert d_readout.shape == (8, rows)
    assert not d_readout[:, VOCAB:].any()


def test_the_gradient_keeps_its_size_at_any_temperature() -> None:
    """The reason for T^2: with small logits d loss / d logits is their difference over V, at every temperature."""
    small = [0.01 * x for x in _inputs()[:4]]
    weights = _inputs()[4]
    sizes = []
    for temperature in (1.0, 10.0, 100.0):
        _, gradients = _mean_and_gradients(linear_distillation, *small, weights, temperature=temperature)
        sizes.append(float(jnp.linalg.norm(gradients[0])))
    assert sizes == pytest.approx([sizes[0]] * 3, rel=2e-3)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    features, readout, _, _, weights = _inputs(rows=32)
    wide = jnp.pad(readout, ((0, 0), (0, 8)), constant_values=5.0)
    total, gradients = _mean_and_gradients(
        linear_distillation, features, readout, features, wide, weights, vocab_size=VOCAB
    )
    assert total == 0
    assert not any(x.any() for x in gradients)


def test_a_certain_teacher_is_a_target() -> None:
    """KL from a one-hot distribution is the cross entropy of its token; its other probabilities, all zero, do no harm."""
    features, readout, _, _, weights = _inputs()
    targets = jax.random.randint(jax.random.key(9), weights.shape, 0, VOCAB)
    certain = 1e4 * jax.nn.one_hot(targets, VOCAB)
    got = jax.value_and_grad(lambda f: linear_distillation(f, readout, certain, jnp.eye(VOCAB), weights)[0])(features)
    expected = jax.value_and_grad(lambda f: linear_cross_entropy(f, readout, targets, weights)[0])(features)
    assert_close(got[0], expected[0], 1e-4)
    assert_close(got[1], expected[1], 1e-6)


def test_value_alone_equals_differentiated_value() -> None:
    arrays = _inputs()
    total, weight = linear_distillation(*arrays, chunk_size=7)
    differentiated, _ = _mean_and_gradients(linear_distillation, *arrays, chunk_size=7)
    assert (total.dtype, weight.dtype) == (jnp.float32, jnp.float32)
    assert_close(differentiated, total / weight, 1e-6)


def test_the_teacher_has_no_gradient() -> None:
    arrays = _inputs()
    gradients = jax.grad(lambda *x: linear_distillation(*x)[0], argnums=(2, 3))(*arrays)
    assert not any(x.any() for x in gradients)


def test_bfloat16_features() -> None:
    """The loss is a float32 sum; a gradient too, of factors rounded to 2^-9, itself rounded once or twice."""
    low = [x.astype(jnp.bfloat16) for x in _inputs()[:4]]
    arrays = low[0], low[1].astype(jnp.float32), low[2], low[3].astype(jnp.float32), _inputs()[4]
    mean, gradients = _mean_and_gradients(linear_distillation, *arrays)
    assert (mean.dtype, *(x.dtype for x in gradients)) == (jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32)
    _assert_exact((mean, gradients), *arrays, tolerance=2**-7)
    in_float32 = _mean_and_gradients(linear_distillation, *(x.astype(jnp.float32) for x in arrays))
    assert_close(mean, in_float32[0], 1e-5)


def test_large_logits_do_not_overflow() -> None:
    features, *others = _inputs()
    value, gradients = _mean_and_gradients(linear_distillation, 1e3 * features, *others)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(x).all() for x in gradients)


def test_tokens_without_weight_change_nothing() -> None:
    """Whatever the features of either side are, NaN included; and no weight at all is a loss of zero, not of NaN."""
    features, readout, teacher_features, teacher_readout, weights = _inputs()
    expected, gradients = _mean_and_gradients(
        linear_distillation, features, readout, teacher_features, teacher_readout, weights, chunk_size=7
    )
    ignored = (weights == 0)[..., None]
    assert not jnp.where(ignored, gradients[0], 0).any()
    bad = jnp.where(jnp.arange(features.shape[1])[:, None] % 2 == 0, jnp.nan, 3e38)
    spoiled = (
        jnp.where(ignored, bad, features),
        readout,
        jnp.where(ignored, bad, teacher_features),
        teacher_readout,
    )
    mean, others = _mean_and_gradients(linear_distillation, *spoiled, weights, chunk_size=7)
    jax.tree.map(np.testing.assert_array_equal, others[:2], gradients[:2])
    assert_close(mean, expected, 1e-5)
    assert linear_distillation(*spoiled, jnp.zeros_like(weights)) == (0, 0)


@pytest.mark.parametrize("differentiated", [False, True])
def test_never_holds_the_logits_of_more_than_a_chunk(differentiated: bool) -> None:
    batch, length, vocab = 2, 64, 512
    features, readout, *others = _inputs(batch, length, vocab, vocab)

    def largest(chunk_size: int) -> int:
        def loss(features: Any, readout: Any) -> Any:
            return linear_distillation(features, readout, *others, chunk_size=chunk_size)[0]

        return array_sizes(jax.grad(loss, argnums=(0, 1)) if differentiated else loss, features, readout)[0][0]

    assert largest(chunk_size=8) == batch * 8 * vocab
    assert largest(chunk_size=length) == batch * length * vocab


@pytest.mark.parametrize(
    ("options", "teacher_rows", "message"),
    [
        ({"temperature": 0.0}, VOCAB, r"temperature is 0\.0; it must be above 0"),
        ({"temperature": float("nan")}, VOCAB, "temperature is nan"),
        ({}, 32, "have 29 and 32 rows; give vocab_size"),
        ({"vocab_size": 30}, 32, "vocab_size is 30; the tables have 29 and 32 rows"),
    ],
)
def test_refused(options: dict[str, Any], teacher_rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_distillation(*_inputs(teacher_rows=teacher_rows), **options)


MESHES = {"data": (8, 1, 1, 1), "tensor": (1, 1, 8, 1), "all": (2, 2, 2, 1), "sequence": (2, 1, 2, 2)}


@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
def test_sharded_equals_unsharded(mesh_shape: tuple[int, ...]) -> None:
    """Rows over data and fsdp, both vocabularies over tensor, with different numbers of rows after the 60 tokens."""
    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 4)
    tokens, table = PartitionSpec(("data", "fsdp"), "sequence"), PartitionSpec("fsdp", "tensor")
    placed = tuple(NamedSharding(mesh, spec) for spec in (tokens, table, tokens, table, tokens))
    arrays = _inputs(batch=8, length=32, rows=64, teacher_rows=72)
    options = {"vocab_size": 60, "temperature": 2.0}
    chunks = {"chunk_size": 8, "batch_shards": mesh_shape[0] * mesh_shape[1]}
    actual = _mean_and_gradients(linear_distillation, *jax.device_put(arrays, placed), **options, **chunks)
    _assert_exact(actual, *arrays, **options)
