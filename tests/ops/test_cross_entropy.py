"""The linear cross entropy in chunks is the plain one without its memory, on one device and on eight."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssm_jax.ops.cross_entropy import cross_entropy, linear_cross_entropy, linear_token_nll
from tests.conformance.compare import assert_close
from tests.conformance.jaxpr import array_sizes

VOCAB = 29


def _inputs(batch: int = 4, length: int = 37, width: int = 8, vocab: int = VOCAB) -> tuple[jax.Array, ...]:
    """features, readout, targets, weights; a third of the weights are zero."""
    keys = jax.random.split(jax.random.key(0), 4)
    features = jax.random.normal(keys[0], (batch, length, width))
    readout = jax.random.normal(keys[1], (width, vocab))
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    weights = jnp.where(jax.random.uniform(keys[3], (batch, length)) < 0.3, 0.0, 0.7)
    return features, readout, targets, weights


def _definition(features: Any, readout: Any, targets: Any, weights: Any, z_loss: float = 0.0) -> tuple[Any, Any]:
    logits = jnp.einsum("bld,dv->blv", features, readout)
    z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    nll = z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * z**2)), jnp.sum(weights)


@functools.partial(jax.jit, static_argnames=("loss", "chunk_size", "batch_shards", "z_loss"))
def _mean_and_gradients(loss: Any, features: Any, readout: Any, targets: Any, weights: Any, **options: Any) -> Any:
    """The mean loss, and its gradients with respect to features, readout and weights."""

    def mean(features: Any, readout: Any, weights: Any) -> Any:
        total, weight = loss(features, readout, targets, weights, **options)
        return total / weight

    return jax.value_and_grad(mean, argnums=(0, 1, 2))(features, readout, weights)


def _assert_exact(actual: Any, *arrays: Any, tolerance: float = 5e-6, z_loss: float = 0.0) -> None:
    """``actual`` is the mean and the gradients of the definition in float64, within ``tolerance`` of each largest entry."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x) for x in arrays]
        expected = jax.device_get(_mean_and_gradients(_definition, *wide, z_loss=z_loss))
    for got, target in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(got, target, tolerance * float(np.abs(target).max()))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_is_the_definition(z_loss: float) -> None:
    def loss(features: Any, readout: Any, targets: Any, weights: Any, **options: Any) -> Any:
        return cross_entropy(jnp.einsum("bld,dv->blv", features, readout), targets, weights, **options)

    arrays = _inputs()
    _assert_exact(_mean_and_gradients(loss, *arrays, z_loss=z_loss), *arrays, z_loss=z_loss)


def test_large_logits_do_not_overflow() -> None:
    features, readout, targets, weights = _inputs()
    total, _ = linear_cross_entropy(1e3 * features, readout, targets, weights)
    assert jnp.isfinite(total)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [1, 7, 37, 64, None])
def test_chunks_equal_whole(chunk_size: int | None, z_loss: float) -> None:
    arrays = _inputs()
    actual = _mean_and_gradients(linear_cross_entropy, *arrays, chunk_size=chunk_size, z_loss=z_loss)
    _assert_exact(actual, *arrays, z_loss=z_loss)


def test_value_alone_equals_differentiated_value() -> None:
    arrays = _inputs()
    total, weight = linear_cross_entropy(*arrays, chunk_size=7)
    differentiated, _ = _mean_and_gradients(linear_cross_entropy, *arrays, chunk_size=7)
    assert_close(differentiated, total / weight, 1e-6)


def test_token_nll_is_the_loss_of_each_token() -> None:
    features, readout, targets, _ = _inputs()
    nll = linear_token_nll(features, readout, targets, chunk_size=7)
    log_probabilities = jax.nn.log_softmax(jnp.einsum("bld,dv->blv", features, readout))
    expected = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    assert nll.dtype == jnp.float32
    assert_close(nll, expected, 1e-5)


def test_bfloat16_features() -> None:
    """The loss is a float32 sum; a gradient too, of factors rounded to 2^-9, itself rounded once or twice."""
    features, readout, targets, weights = _inputs()
    arrays = features.astype(jnp.bfloat16), readout.astype(jnp.bfloat16).astype(jnp.float32), targets, weights
    mean, gradients = _mean_and_gradients(linear_cross_entropy, *arrays)
    assert (mean.dtype, *(x.dtype for x in gradients)) == (jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32)
    _assert_exact((mean, gradients), *arrays, tolerance=2**-7)
    in_float32 = _mean_and_gradients(linear_cross_entropy, *(x.astype(jnp.float32) for x in arrays[:2]), *arrays[2:])
    assert_close(mean, in_float32[0], 1e-5)


def test_tokens_without_weight_change_nothing() -> None:
    """Whatever their targets and features are, NaN included; and no weight at all is a loss of zero, not of NaN."""
    features, readout, targets, weights = _inputs()
    _, gradients = _mean_and_gradients(linear_cross_entropy, features, readout, targets, weights, chunk_size=7)
    assert not gradients[0][weights == 0].any()
    ignored = weights == 0
    bad = jnp.where(jnp.arange(features.shape[1])[:, None] % 2 == 0, jnp.nan, 3e38)
    others = (jnp.where(ignored[..., None], bad, features), readout, jnp.where(ignored, -100, targets), weights)
    _, others_gradients = _mean_and_gradients(linear_cross_entropy, *others, chunk_size=7)
    jax.tree.map(np.testing.assert_array_equal, others_gradients[:2], gradients[:2])
    logits = others[0] @ readout
    expected = linear_cross_entropy(features, readout, targets, weights)
    for loss in (cross_entropy(logits, *others[2:]), linear_cross_entropy(*others)):
        assert_close(loss[0], expected[0], 1e-3)
        assert loss[1] == expected[1]
    assert linear_cross_entropy(features, readout, targets, jnp.zeros_like(weights)) == (0, 0)


@pytest.mark.parametrize("differentiated", [False, True])
def test_never_holds_the_logits_of_more_than_a_chunk(differentiated: bool) -> None:
    batch, length, vocab = 2, 64, 512
    features, readout, targets, weights = _inputs(batch, length, 4, vocab)

    def largest(chunk_size: int) -> int:
        def loss(features: Any, readout: Any) -> Any:
            return linear_cross_entropy(features, readout, targets, weights, chunk_size=chunk_size)[0]

        return array_sizes(jax.grad(loss, argnums=(0, 1)) if differentiated else loss, features, readout)[0][0]

    assert largest(chunk_size=8) == batch * 8 * vocab
    assert largest(chunk_size=length) == batch * length * vocab


def test_token_nll_never_holds_the_logits_of_more_than_a_chunk() -> None:
    features, readout, targets, _ = _inputs(2, 64, 4, 512)
    sizes = array_sizes(functools.partial(linear_token_nll, chunk_size=8), features, readout, targets)
    assert sizes[0][0] == 2 * 8 * 512


MESHES = {"data": (8, 1, 1, 1), "tensor": (1, 1, 8, 1), "all": (2, 2, 2, 1), "sequence": (2, 1, 2, 2)}


def _shardings(mesh_shape: tuple[int, ...]) -> tuple[NamedSharding, ...]:
    """Of features, readout, targets and weights: rows over data and fsdp, the vocabulary over tensor."""
    axes = ("data", "fsdp", "tensor", "sequence")
    mesh = jax.make_mesh(mesh_shape, axes, axis_types=(AxisType.Auto,) * 4)
    tokens = PartitionSpec(("data", "fsdp"), "sequence")
    return tuple(NamedSharding(mesh, spec) for spec in (tokens, PartitionSpec("fsdp", "tensor"), tokens, tokens))


@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
def test_sharded_equals_unsharded(mesh_shape: tuple[int, ...]) -> None:
    arrays = _inputs(batch=8, length=32, vocab=64)
    options = {"chunk_size": 8, "batch_shards": mesh_shape[0] * mesh_shape[1]}
    sharded = jax.device_put(arrays, _shardings(mesh_shape))
    _assert_exact(_mean_and_gradients(linear_cross_entropy, *sharded, **options), *arrays)


@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
def test_tokens_stay_on_their_devices(mesh_shape: tuple[int, ...]) -> None:
    """Only the readout is ever gathered, and the batch shards' parts of its gradient are summed once, after the loop."""
    width, vocab = 16, 64
    arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(_inputs(8, 256, width, vocab), _shardings(mesh_shape), strict=True)
    ]
    options = {"chunk_size": 32, "batch_shards": mesh_shape[0] * mesh_shape[1]}
    program = _mean_and_gradients.lower(linear_cross_entropy, *arrays, **options).compile().as_text()
    gathered_readout = f"[{width},{vocab // mesh_shape[2]}]"
    assert all(gathered_readout in line for line in re.findall(r" = .* all-gather\(", program))
    if mesh_shape[3] == 1:
        in_loops = [computation for computation in program.split("\n\n") if not computation.startswith("ENTRY")]
        for line in re.findall(r" = .* all-reduce\(", "".join(in_loops)):
            assert f"{width},{vocab // mesh_shape[2]}]" not in line
