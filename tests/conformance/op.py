"""What every recurrent op promises, as one test class: an op's test subclasses ``OpConformance`` and gives random inputs.

The promises: every implementation equals the float64 oracle, in values and in gradients with respect to every input and the
incoming state, through the output and the final state; splitting a sequence anywhere changes nothing; a reset hides everything
before it, exactly; absent tokens do nothing, exactly; vmap, jit, checkpointing and chunk sizes change nothing; low precision stops
at the inputs and outputs.

A run is a flat dict of arrays: ``y``, ``state``, and a gradient ``d_<input>`` per input and ``d_state`` for random cotangents.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ssm_jax.errors import ImplementationError

LENGTHS = (1, 2, 37, 64, 100)
PIECES = (1, 5, 1, 1, 28, 1)
DOCUMENTS = (1, 5, 13, 18)

Arrays = dict[str, Any]
Call = Callable[..., tuple[Any, Any]]
"""call(inputs, state, masks) -> (y, state), where masks is a dict with some of ``reset`` and ``lengths``."""


class Case(NamedTuple):
    inputs: Arrays
    state: Any
    masks: Arrays
    cotangents: tuple[Any, Any]


class OpConformance:
    """Subclass as ``class TestX(OpConformance)``.

    ``op`` (a staticmethod) takes the keys of ``inputs`` as keywords. ``sequences`` names the inputs with a length axis, which is
    axis 1; the others are parameters. ``output`` names the input whose shape and dtype the output has.
    ``reference`` must compute in float64 when its inputs are float64, by plain autodiff.
    """

    op: Callable[..., Any]
    sequences: tuple[str, ...]
    output: str
    implementations: tuple[str, ...] = ("reference", "xla")
    masks: tuple[str, ...] = ("none", "documents")
    # Of the largest entry of each array. bfloat16: outputs and input gradients are rounded once, to 2^-9 of themselves.
    tolerance = 1e-5
    bfloat16_tolerance = 4e-3
    # Of the largest entry of the final state, which is float32 whatever the inputs.
    bfloat16_state_tolerance = 1e-5

    def inputs(self, rng: np.random.Generator, batch: int, length: int) -> Arrays:
        raise AssertionError("a subclass gives the inputs")

    def initial_state(self, rng: np.random.Generator, batch: int) -> Any:
        raise AssertionError("a subclass gives the state")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """``implementation`` runs over those compared with the oracle, ``any_implementation`` over the reference too."""
        values = {
            "implementation": [name for name in self.implementations if name != "reference"],
            "any_implementation": self.implementations,
            "masks": self.masks,
        }
        for name in values:
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values[name])

    # How a case is made and run.

    def case(self, length: int, masks: str = "none", dtype: Any = np.float32, seed: int = 0) -> Case:
        """Random inputs, state, masks and cotangents.

        ``masks``: none; documents (resets anywhere); packed (``DOCUMENTS`` in every row); ragged (documents, and unequal rows).
        ``dtype`` is that of real sequences; parameters and state stay float32.
        """
        rng = np.random.default_rng((length, seed))
        batch = 4 if masks == "ragged" else 2
        inputs = self.inputs(rng, batch, length)
        for name in self.sequences:
            if not np.iscomplexobj(inputs[name]):
                inputs[name] = inputs[name].astype(dtype)
        state = self.initial_state(rng, batch)
        like = inputs[self.output]
        cotangent_y = _normal(rng, like.shape, like.dtype)
        cotangent_state = jax.tree.map(lambda leaf: _normal(rng, leaf.shape, leaf.dtype), state)
        made: Arrays = {}
        if masks == "packed":
            made["reset"] = np.isin(np.arange(length), np.cumsum((0, *DOCUMENTS)))[None].repeat(batch, 0)
        elif masks in ("documents", "ragged"):
            made["reset"] = rng.random((batch, length)) < 0.2
        if masks == "ragged":
            made["lengths"] = np.array([length, 0, 1, (2 * length) // 3], np.int32)
            cotangent_y = cotangent_y * _present(made["lengths"], cotangent_y)
        return Case(inputs, state, made, (cotangent_y, cotangent_state))

    def call(self, **static: Any) -> Call:
        """The op on a whole sequence."""
        return lambda inputs, state, masks: self.op(**inputs, state=state, **masks, **static)

    def call_in_pieces(self, pieces: tuple[int, ...], **static: Any) -> Call:
        """The op on consecutive pieces of a sequence, the state carried from one to the next."""
        ends = np.cumsum(pieces)

        def call(inputs: Arrays, state: Any, masks: Arrays) -> tuple[Any, Any]:
            outputs = []
            for start, end in zip(ends - pieces, ends, strict=True):
                piece = {name: x[:, start:end] if name in self.sequences else x for name, x in inputs.items()}
                piece_masks = {}
                if "reset" in masks:
                    piece_masks["reset"] = masks["reset"][:, start:end]
                if "lengths" in masks:
                    piece_masks["lengths"] = jnp.clip(masks["lengths"] - start, 0, end - start)
                y, state = self.op(**piece, state=state, **piece_masks, **static)
                outputs.append(y)
            return jnp.concatenate(outputs, axis=1), state

        return call

    def call_separately(self, documents: tuple[int, ...], **static: Any) -> Call:
        """The op on each document on its own, from no state. The incoming state is ignored."""
        ends = np.cumsum(documents)

        def call(inputs: Arrays, state: Any, masks: Arrays) -> tuple[Any, Any]:
            del state, masks
            outputs = []
            for start, end in zip(ends - documents, ends, strict=True):
                document = {name: x[:, start:end] if name in self.sequences else x for name, x in inputs.items()}
                y, final = self.op(**document, **static)
                outputs.append(y)
            return jnp.concatenate(outputs, axis=1), final

        return call

    def run(self, call: Call, case: Case) -> Arrays:
        """Values and gradients of ``call`` as a dict of numpy arrays; outputs of absent tokens are checked, then zeroed."""
        result = jax.device_get(jax.jit(functools.partial(_evaluate, call))(*case))
        assert all(np.isfinite(array.astype(np.complex128)).all() for array in jax.tree.leaves(result))
        if "lengths" in case.masks:
            result["y"] = result["y"] * _present(case.masks["lengths"], result["y"])
        return result

    def oracle(self, length: int, masks: str = "none", dtype: Any = np.float32) -> Arrays:
        """The reference's values and gradients in float64 on the case's own (already rounded) inputs."""
        return _oracle(type(self), length, masks, np.dtype(dtype))

    # The oracle itself.

    def test_oracle_gradients_are_derivatives(self) -> None:
        with jax.enable_x64(True):
            case = jax.tree.map(_widen, self.case(5, "documents"))
            call = jax.jit(self.call(implementation="reference"))

            def differentiable(inputs: Arrays, real: list[Any]) -> tuple[Any, Any]:
                y, final = call(inputs, _with_real(case.state, real), case.masks)
                return y, _real(final)

            args = (case.inputs, _real(case.state))
            check_grads(differentiable, args, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)

    # Values and gradients.

    @pytest.mark.parametrize("length", LENGTHS)
    def test_matches_oracle(self, implementation: str, length: int) -> None:
        actual = self.run(self.call(implementation=implementation), self.case(length))
        assert_run_close(actual, self.oracle(length), self.tolerance)

    @pytest.mark.parametrize("length", [1, 37])
    def test_undifferentiated_values_match_oracle(self, any_implementation: str, length: int) -> None:
        y, state = jax.jit(self.call(implementation=any_implementation))(*self.case(length)[:3])
        expected = self.oracle(length)
        assert_run_close({"y": y, "state": state}, {key: expected[key] for key in ("y", "state")}, self.tolerance)

    def test_masked_matches_oracle(self, implementation: str, masks: str) -> None:
        actual = self.run(self.call(implementation=implementation), self.case(37, masks))
        assert_run_close(actual, self.oracle(37, masks), self.tolerance)

    def test_bfloat16_inputs(self, implementation: str) -> None:
        actual = self.run(self.call(implementation=implementation), self.case(37, "documents", jnp.bfloat16))
        expected = dict(self.oracle(37, "documents", jnp.bfloat16))
        assert_run_close(
            {"state": actual.pop("state")}, {"state": expected.pop("state")}, self.bfloat16_state_tolerance
        )
        assert_run_close(actual, expected, self.bfloat16_tolerance)

    # State.

    def test_no_state_is_a_zero_state(self, any_implementation: str) -> None:
        case = self.case(37)
        call = jax.jit(self.call(implementation=any_implementation))
        actual, expected = (call(case.inputs, state, {}) for state in (None, jax.tree.map(np.zeros_like, case.state)))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_split_anywhere_equals_whole(self, any_implementation: str, masks: str) -> None:
        actual = self.run(self.call_in_pieces(PIECES, implementation=any_implementation), self.case(37, masks))
        assert_run_close(actual, self.oracle(37, masks), self.tolerance)

    # Documents.

    def test_packed_equals_separate(self, any_implementation: str) -> None:
        case = self.case(sum(DOCUMENTS), "packed")
        packed = self.run(self.call(implementation=any_implementation), case)
        separate = self.run(self.call_separately(DOCUMENTS, implementation=any_implementation), case)
        assert_run_close(packed, separate, self.tolerance)
        assert all(not leaf.any() for leaf in packed["d_state"])

    def test_nothing_before_a_reset_has_influence(self, any_implementation: str) -> None:
        """Not even a state of 1e20: it is multiplied by an exact zero, not by a small number."""
        quiet = self.case(sum(DOCUMENTS), "packed")
        last = sum(DOCUMENTS[:-1])
        quiet.cotangents[0][:, :last] = 0
        louder = np.where(np.arange(sum(DOCUMENTS)) < last, 2, 1)
        loud_inputs = {
            name: x * _along_length(louder[None], x).astype(x.dtype) if name in self.sequences else x
            for name, x in quiet.inputs.items()
        }
        loud = quiet._replace(inputs=loud_inputs, state=_changed(quiet.state, lambda leaf: np.float32(1e20) * leaf))
        quiet_run, loud_run = (self.run(self.call(implementation=any_implementation), case) for case in (quiet, loud))
        for run in (quiet_run, loud_run):
            run["y"] = run["y"][:, last:]
            for name in self.sequences:
                assert not run[f"d_{name}"][:, :last].any(), name
        assert_run_close(loud_run, quiet_run, self.tolerance)

    def test_a_document_start_clears_a_broken_state(self, any_implementation: str) -> None:
        """A lane whose state is NaN or infinite is as good as a fresh one when a document starts with the call."""
        clean = self.case(sum(DOCUMENTS), "packed")
        broken = [_changed(clean.state, lambda leaf, bad=bad: np.full_like(leaf, bad)) for bad in (np.nan, np.inf)]
        call = self.call(implementation=any_implementation)
        expected = self.run(call, clean)
        for state in broken:
            assert_run_close(self.run(call, clean._replace(state=state)), expected, 0.0)

    # Transformations and contracts.

    def test_vmap_equals_loop(self, implementation: str) -> None:
        cases = [self.case(37, "documents", seed=seed) for seed in (0, 1)]
        evaluate = functools.partial(_evaluate, self.call(implementation=implementation))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *cases)
        together = jax.jit(jax.vmap(evaluate))(*stacked)
        for index, case in enumerate(cases):
            alone = jax.device_get(jax.jit(evaluate)(*case))
            assert_run_close(jax.tree.map(lambda leaf, index=index: leaf[index], together), alone, self.tolerance)

    def test_jit_equals_eager(self, implementation: str) -> None:
        case = jax.tree.map(jnp.asarray, self.case(2))
        call = self.call(implementation=implementation)
        eager, jitted = ({"y": y, "state": state} for y, state in (call(*case[:3]), jax.jit(call)(*case[:3])))
        assert_run_close(eager, jitted, self.tolerance)

    def test_checkpoint_changes_nothing(self, implementation: str) -> None:
        actual = self.run(jax.checkpoint(self.call(implementation=implementation)), self.case(37, "documents"))
        assert_run_close(actual, self.oracle(37, "documents"), self.tolerance)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("length", [1, 37])
    def test_output_has_input_dtype_and_state_is_single_precision(
        self, any_implementation: str, length: int, dtype: Any
    ) -> None:
        case = self.case(length, dtype=dtype)
        for state in (None, case.state):
            y, final = jax.eval_shape(self.call(implementation=any_implementation), case.inputs, state, {})
            like = case.inputs[self.output]
            assert (y.shape, y.dtype) == (like.shape, like.dtype)
            for leaf, initial in zip(jax.tree.leaves(final), jax.tree.leaves(case.state), strict=True):
                assert (leaf.shape, leaf.dtype) == (initial.shape, initial.dtype)

    def test_unknown_implementation(self) -> None:
        case = jax.tree.map(jnp.asarray, self.case(2))
        with pytest.raises(ImplementationError, match="'telepathy'"):
            self.call(implementation="telepathy")(*case[:3])


class ChunkedOpConformance(OpConformance):
    """For ops that take ``chunk_size``, which is about speed only."""

    @pytest.mark.parametrize("chunk_size", [1, 7, 64])
    def test_chunk_size_changes_nothing(self, implementation: str, chunk_size: int) -> None:
        actual = self.run(self.call(implementation=implementation, chunk_size=chunk_size), self.case(37, "documents"))
        assert_run_close(actual, self.oracle(37, "documents"), self.tolerance)


class RaggedOpConformance(OpConformance):
    """For ops that take ``lengths``: absent tokens leave the state untouched."""

    masks = ("none", "documents", "ragged")

    def test_ragged_rows_equal_shorter_rows(self, any_implementation: str) -> None:
        case = self.case(37, "ragged")
        call = jax.jit(self.call(implementation=any_implementation))
        y, final = call(*case[:3])
        for row, length in enumerate(case.masks["lengths"]):
            lane = slice(row, row + 1)
            state, row_final = (jax.tree.map(lambda leaf, lane=lane: leaf[lane], tree) for tree in (case.state, final))
            if length == 0:
                jax.tree.map(np.testing.assert_array_equal, row_final, state)
                continue
            inputs = {name: x[lane, :length] if name in self.sequences else x for name, x in case.inputs.items()}
            shorter_y, shorter_final = call(inputs, state, {"reset": case.masks["reset"][lane, :length]})
            assert_run_close(
                {"y": y[lane, :length], "state": row_final}, {"y": shorter_y, "state": shorter_final}, self.tolerance
            )

    def test_absent_tokens_have_no_influence(self, any_implementation: str) -> None:
        """Whatever they are: not on any value or gradient, and their own gradients are exactly zero."""
        quiet = self.case(37, "ragged")
        loud_inputs = {
            name: np.where(_present(quiet.masks["lengths"], x), x, -7 * x) if name in self.sequences else x
            for name, x in quiet.inputs.items()
        }
        call = self.call(implementation=any_implementation)
        quiet_run, loud_run = self.run(call, quiet), self.run(call, quiet._replace(inputs=loud_inputs))
        assert_run_close(loud_run, quiet_run, self.tolerance)
        for name in self.sequences:
            gradient = loud_run[f"d_{name}"]
            assert not (gradient * ~_present(quiet.masks["lengths"], gradient)).any(), name


def assert_run_close(actual: Arrays, expected: Arrays, tolerance: float) -> None:
    """Every array within ``tolerance`` of its expected largest entry: where zeros are expected, zeros it must be."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name in expected:
        for leaf, target in zip(jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name]), strict=True):
            wide = np.complex128 if np.iscomplexobj(target) else np.float64
            leaf, target = np.asarray(leaf).astype(wide), np.asarray(target).astype(wide)
            assert leaf.shape == target.shape, name
            error, scale = np.abs(leaf - target).max(initial=0), np.abs(target).max(initial=0)
            if not error <= tolerance * scale:
                errors[name] = f"error {error:.2e} where the largest entry is {scale:.2e}"
    assert not errors, errors


def _evaluate(call: Call, inputs: Arrays, state: Any, masks: Arrays, cotangents: Any) -> Arrays:
    def differentiable(inputs: Arrays, real: list[Any]) -> tuple[Any, Any]:
        y, final = call(inputs, _with_real(state, real), masks)
        return (y, _real(final)), final

    (y, _), pullback, final = jax.vjp(differentiable, inputs, _real(state), has_aux=True)
    d_inputs, d_state = pullback((cotangents[0], _real(cotangents[1])))
    return {"y": y, "state": final, "d_state": d_state, **{f"d_{name}": d for name, d in d_inputs.items()}}


@functools.cache
def _oracle(test: type[OpConformance], length: int, masks: str, dtype: np.dtype) -> Arrays:
    with jax.enable_x64(True):
        case = jax.tree.map(_widen, test().case(length, masks, dtype))
        result = test().run(test().call(implementation="reference"), case)
    assert all(leaf.dtype in (np.float64, np.complex128, np.int32) for leaf in jax.tree.leaves(result))
    return result


def _widen(array: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(array):
        return array.astype(np.complex128)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _real(state: Any) -> list[Any]:
    """The leaves that are no counts of tokens."""
    return [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jnp.integer)]


def _with_real(state: Any, real: list[Any]) -> Any:
    values = iter(real)
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else next(values), state)


def _changed(state: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    return _with_real(state, [change(leaf) for leaf in _real(state)])


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.complexfloating):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def _present(lengths: np.ndarray, like: np.ndarray) -> np.ndarray:
    """True where a token is there, with the rank of ``like``."""
    return _along_length(np.arange(like.shape[1]) < lengths[:, None], like)


def _along_length(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape + (1,) * (like.ndim - 2))
