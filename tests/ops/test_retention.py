"""Retention against its oracle, against the formulas of the paper written out, and between its forms; memory and sharding."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax.ops import dispatch, retention
from ssm_jax.ops.retention import xla
from ssm_jax.ops.retention.inputs import Inputs, Memory, scale
from tests.conformance.compare import assert_close
from tests.conformance.jaxpr import array_sizes
from tests.conformance.op import ChunkedOpConformance, RaggedOpConformance

LOG_DECAY = np.log1p(-(2.0 ** -np.arange(2.0, 5.0)))


def arrays(batch: int, length: int, heads: int = 3, keys: int = 4, values: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng((seed, length))
    widths = {"q_BLHN": keys, "k_BLHN": keys, "v_BLHP": values}
    return {name: rng.normal(size=(batch, length, heads, width)) for name, width in widths.items()}


class TestRetention(RaggedOpConformance, ChunkedOpConformance):
    sequences = ("q_BLHN", "k_BLHN", "v_BLHP")
    output = "v_BLHP"

    @staticmethod
    def op(**inputs: Any) -> Any:
        return retention(**inputs, log_decay_H=LOG_DECAY)

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> dict[str, Any]:
        widths = {"q_BLHN": 4, "k_BLHN": 4, "v_BLHP": 5}
        return {name: rng.normal(size=(batch, length, 3, width)).astype(np.float32) for name, width in widths.items()}

    def initial_state(self, rng: np.random.Generator, batch: int) -> Any:
        kv = rng.normal(size=(batch, 3, 4, 5)).astype(np.float32)
        return Memory(kv, rng.integers(1, 50, size=batch).astype(np.int32))

    def test_no_state_is_a_zero_state(self, any_implementation: str) -> None:
        case = self.case(37)
        call = jax.jit(self.call(implementation=any_implementation))
        zeros = jax.tree.map(np.zeros_like, case.state)
        jax.tree.map(np.testing.assert_array_equal, call(case.inputs, None, {}), call(case.inputs, zeros, {}))


def in_parallel(q: Any, k: Any, v: Any, log_decay: Any, normaliser: str | None, *, scaled: bool = True) -> np.ndarray:
    """The parallel form of the paper, one query after the other, in float64."""
    batch, length, heads, _ = q.shape
    y = np.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            gamma = np.exp(log_decay[h])
            for n in range(length):
                decays = gamma ** np.arange(n, -1, -1)
                scores = k[b, : n + 1, h] @ q[b, n, h] * decays
                if scaled:
                    scores /= np.sqrt(sum(decays))
                z = {None: 1.0, "sum_abs": np.clip(sum(abs(scores)), 1, 5e4), "abs_sum": max(1, abs(sum(scores)))}
                y[b, n, h] = scores @ v[b, : n + 1, h] / z[normaliser]
    return y


@pytest.mark.parametrize("normaliser", [None, "abs_sum", "sum_abs"])
def test_values_are_those_of_the_paper(normaliser: str | None) -> None:
    inputs = arrays(2, 37)
    expected = in_parallel(*inputs.values(), LOG_DECAY, normaliser)
    with jax.enable_x64(True):
        y, _ = retention(**jax.tree.map(jnp.asarray, inputs), log_decay_H=LOG_DECAY, score_normaliser=normaliser)
        assert_close(y, expected, 1e-12)
    assert normaliser is None or np.abs(expected - in_parallel(*inputs.values(), LOG_DECAY, None)).max() > 0.1


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_without_the_scale_the_scores_are_left_as_they_are(chunk_size: int) -> None:
    """In one call and in two, and in the gradients."""
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arrays(2, 37).items()}
    how: dict[str, Any] = {"log_decay_H": LOG_DECAY, "score_scale": False, "chunk_size": chunk_size}
    expected = in_parallel(*(np.asarray(x, np.float64) for x in inputs.values()), LOG_DECAY, None, scaled=False)
    tolerance = 1e-5 * np.sqrt(np.mean(np.square(expected)))
    y, _ = retention(**inputs, **how)
    assert_close(y, expected, tolerance)
    first, memory = retention(**{name: x[:, :20] for name, x in inputs.items()}, **how)
    rest, _ = retention(**{name: x[:, 20:] for name, x in inputs.items()}, state=memory, **how)
    assert_close(np.concatenate([first, rest], axis=1), expected, tolerance)

    def total(inputs: Any, implementation: str) -> jax.Array:
        return jnp.sum(jnp.sin(retention(**inputs, **how, implementation=implementation)[0]))

    ours, oracle = (jax.grad(total)(inputs, name) for name in ("xla", "reference"))
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-4 * float(np.abs(y).max())), ours, oracle)


def test_no_token_leaves_the_memory_as_it_is() -> None:
    inputs = {name: jnp.asarray(x[:, :0], jnp.float32) for name, x in arrays(2, 3).items()}
    memory = Memory(jnp.ones((2, 3, 4, 5)), jnp.asarray([3, 7], jnp.int32))
    y, after = retention(**inputs, log_decay_H=LOG_DECAY, state=memory)
    assert y.shape == (2, 0, 3, 5)
    jax.tree.map(np.testing.assert_array_equal, after, memory)


def test_the_oracle_counts_where_nothing_decays() -> None:
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arrays(1, 9).items()}
    one, other = (retention(**inputs, log_decay_H=np.zeros(3), implementation=name)[0] for name in ("reference", "xla"))
    assert_close(one, other, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_BLHN": jnp.zeros((1, 3, 3, 4))}, r"\(1, 4, 3, 4\), \(1, 3, 3, 4\) and"),
        ({"log_decay_H": np.zeros(2)}, r"log_decay_H has the shape \(2,\); there must be one for each of 3 heads"),
        ({"log_decay_H": np.array([-0.1, 0.1, -0.2])}, "logarithms of decays are at most 0"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1, or None"),
        (
            {"state": Memory(jnp.zeros((2, 3, 4, 5)), jnp.zeros(2, jnp.int32))},
            r"of the shape \(1, 3, 4, 5\), of as many",
        ),
    ],
    ids=["lengths", "heads", "sign", "chunk", "lanes"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user has no checks of shapes at run time
    inputs: dict[str, Any] = {name: jnp.asarray(x, jnp.float32) for name, x in arrays(1, 4).items()}
    with pytest.raises(ValueError, match=message):
        retention(**{**inputs, "log_decay_H": LOG_DECAY, **change})


def test_normalisers_are_of_scaled_scores() -> None:
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arrays(1, 4).items()}
    with pytest.raises(ValueError, match="use it with score_scale=True"):
        retention(**inputs, log_decay_H=LOG_DECAY, score_normaliser="sum_abs", score_scale=False)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 300])
@pytest.mark.parametrize("double", [False, True])
def test_forms_are_one_function(chunk_size: int, double: bool) -> None:
    """Decays of the published models; a prompt in chunks, then tokens one by one."""
    log_decay = np.log1p(-(2.0 ** -np.arange(5.0, 8.0)))
    with jax.enable_x64(double):
        inputs = {name: jnp.asarray(x, jnp.float64 if double else jnp.float32) for name, x in arrays(1, 300).items()}
        whole, memory = retention(**inputs, log_decay_H=log_decay, chunk_size=300)
        prompt = {name: x[:, :290] for name, x in inputs.items()}
        outputs, state = retention(**prompt, log_decay_H=log_decay, chunk_size=chunk_size)
        parts = [outputs]
        for t in range(290, 300):
            y, state = retention(
                **{name: x[:, t : t + 1] for name, x in inputs.items()}, log_decay_H=log_decay, state=state
            )
            parts.append(y)
        tolerance = 1e-10 if double else 1e-5
        size = float(jnp.sqrt(jnp.mean(whole**2)))
        assert_close(jnp.concatenate(parts, axis=1) / size, whole / size, tolerance)
        assert_close(state.kv_BHNP / size, memory.kv_BHNP / size, tolerance)
        assert state.tokens_B.tolist() == memory.tokens_B.tolist() == [300]


@pytest.mark.parametrize("normaliser", ["abs_sum", "sum_abs"])
def test_normalised_documents_and_blocks_of_queries(normaliser: str) -> None:
    """Two packed documents of one row, over two blocks of queries, are what they are alone; the memory too."""
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arrays(2, 300).items()}
    reset = jnp.zeros((2, 300), bool).at[:, [0, 130]].set(True)
    packed, memory = retention(**inputs, log_decay_H=LOG_DECAY, reset=reset, score_normaliser=normaliser)
    for span in (slice(0, 130), slice(130, 300)):
        document = {name: x[:, span] for name, x in inputs.items()}
        alone, last = retention(**document, log_decay_H=LOG_DECAY, score_normaliser=normaliser)
        assert_close(packed[:, span], alone, 1e-5)
    assert_close(memory.kv_BHNP, last.kv_BHNP, 1e-5)
    assert_close(memory.kv_BHNP, retention(**document, log_decay_H=LOG_DECAY)[1].kv_BHNP, 1e-5)


@pytest.mark.parametrize("normaliser", ["abs_sum", "sum_abs"])
def test_the_normaliser_is_a_constant_for_gradients(normaliser: str) -> None:
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, arrays(1, 6))
        weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs["v_BLHP"].shape))

        def scaled(inputs: dict[str, Any], z: Any) -> Any:
            return jnp.sum(weights * retention(**inputs, log_decay_H=LOG_DECAY)[0] / z)

        def ours(inputs: dict[str, Any]) -> Any:
            return jnp.sum(weights * retention(**inputs, log_decay_H=LOG_DECAY, score_normaliser=normaliser)[0])

        z = (
            retention(**inputs, log_decay_H=LOG_DECAY)[0]
            / (retention(**inputs, log_decay_H=LOG_DECAY, score_normaliser=normaliser)[0])
        )
        expected, got = jax.grad(scaled)(inputs, z), jax.grad(ours)(inputs)
        for name, gradient in expected.items():
            assert_close(got[name], gradient, 1e-10)


@pytest.mark.parametrize("exponent", [2, 5, 12, 20, 36, 60])
def test_scales_of_every_decay(exponent: int) -> None:
    """Up to a decay that is 1 in float32, and one that is 1 in float64: there the tokens are counted."""
    log_decay = np.log1p(-(2.0**-exponent))
    places = jnp.asarray([[0, 1, 2, 100, 10_000]], jnp.int32)
    exact = [np.sum(np.exp(log_decay * np.arange(n + 1))) ** -0.5 for n in places[0].tolist()]
    got = scale(places, jnp.asarray([log_decay, 0.0], jnp.float32))
    assert_close(got[0, :, 0] / np.array(exact), np.ones(5), 1e-6)
    assert_close(got[0, :, 1], (np.asarray(places[0]) + 1.0) ** -0.5, 1e-6)


def test_what_needs_the_whole_sequence_refuses_a_state() -> None:
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arrays(1, 4).items()}
    _, state = retention(**inputs, log_decay_H=LOG_DECAY)
    with pytest.raises(ValueError, match="cannot go on from a state; use score_normaliser=None"):
        retention(**inputs, log_decay_H=LOG_DECAY, state=state, score_normaliser="sum_abs")


def shapes(batch: int, length: int, heads: int, keys: int, values: int) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct((batch, length, *x.shape[2:]), jnp.float32)
        for name, x in arrays(1, 1, heads, keys, values).items()
    }


def loss(inputs: dict[str, Any], **static: Any) -> Any:
    log_decay = np.log1p(-(2.0 ** -np.arange(5.0, 5.0 + inputs["q_BLHN"].shape[2])))
    y, state = retention(**inputs, log_decay_H=log_decay, **static)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state.kv_BHNP))


@pytest.mark.parametrize(("keys", "values"), [(64, 128), (384, 1536)], ids=["usual", "DenseRetNet-350M"])
def test_no_array_holds_a_state_per_token(keys: int, values: int) -> None:
    """The largest ones are a chunk's scores, or the states at its ends: both of v's order."""
    largest, *_ = array_sizes(jax.value_and_grad(loss), shapes(2, 2048, 2, keys, values))
    assert largest[0] <= 2.1 * 2 * 2048 * 2 * values, largest


def test_scores_exist_for_one_block_of_queries() -> None:
    gradient = jax.grad(lambda inputs: loss(inputs, score_normaliser="sum_abs"))
    largest, *_ = array_sizes(gradient, shapes(1, 4096, 2, 16, 16))
    assert largest[0] <= 256 * 4096 * 2, largest


def test_lanes_and_heads_are_split_without_gathering() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor")
    inputs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for name, x in shapes(4, 64, 8, 16, 16).items()
    }
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(inputs).compile()
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    for name in inputs:
        assert compiled.output_shardings[1][name].is_equivalent_to(NamedSharding(mesh, spec), 4)


def test_a_kernel_takes_over_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def forward(inputs: Inputs, **static: Any) -> Any:
        called.append("forward")
        return xla.forward(inputs, **static)

    def backward(inputs: Inputs, *cotangents: Any, **static: Any) -> Any:
        called.append("backward")
        return xla.backward(inputs, *cotangents, **static)

    monkeypatch.setitem(dispatch._implementations["retention"], "kernel", forward)
    monkeypatch.setitem(dispatch._implementations["retention_backward"], "kernel", backward)
    jax.eval_shape(jax.grad(lambda inputs: loss(inputs, implementation="kernel")), shapes(1, 9, 2, 2, 2))
    assert called == ["forward", "backward"]
