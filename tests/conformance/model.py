"""What every family promises, as one test class: a family's test subclasses ``ModelConformance`` and gives its configs.

The promises: one call is training, prefill, chunked prefill and decoding; positions alone express packing, padding and ragged
rows; lanes are independent; sharding changes nothing; export and import lose nothing.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ssm_jax
from ssm_jax import sharding
from ssm_jax.models import LanguageModel
from ssm_jax.nn.state import LMState, logical_axes
from tests.conformance.compare import assert_close, assert_gradients_close, assert_states_close, assert_trees_close

LENGTH = 37
SPLITS = {
    "first_alone": (1, 36),
    "last_alone": (36, 1),
    "pieces": (5, 1, 1, 23, 7),
    "one_by_one": (1,) * LENGTH,
}


@functools.cache
def _variables(model: LanguageModel, seed: int = 0) -> Any:
    """Initial values moved by noise, so that no parameter is trivial (norms of one, biases of zero)."""
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return treedef.unflatten(
        [leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )


@functools.partial(jax.jit, static_argnames=("model", "logits", "method"))
def _apply(
    model: LanguageModel, variables: Any, tokens: Any, state: Any = None, positions: Any = None, **how: Any
) -> Any:
    return model.apply(variables, tokens, state=state, positions=positions, **how)


def _tokens(config: Any, batch: int, length: int, seed: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


EVERY_CONFIG = (
    "split_anywhere",
    "packed_documents_equal",
    "absent_tokens",
    "every_parameter",
    "export_then_import",
)
"""Parts of the names of tests that the default run makes with every config; the others it makes with the first."""


class ModelConformance:
    """Subclass as ``class TestX(ModelConformance)`` with ``configs``: id -> config; the first is tested most in the default run.

    ``tolerance`` bounds differences of logits (of size about 1 to 10) between forms that are equal in exact arithmetic;
    ``layouts`` are the export layouts that can hold every config. ``meshes`` are (data, fsdp, tensor), and all but the first, which
    splits every axis at once, are slow. ``ineffective`` are ends of paths of parameters that change no logit in exact arithmetic:
    their gradients are rounding errors.
    """

    configs: dict[str, Any]
    layouts: tuple[str, ...] = ()
    tolerance = 2e-5
    meshes = ((2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 2))
    ineffective: tuple[str, ...] = ()

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> LanguageModel:
        return ssm_jax.build(self.configs[request.param])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "model" in metafunc.fixturenames:
            everywhere = any(part in metafunc.function.__name__ for part in EVERY_CONFIG)
            first = next(iter(self.configs))
            marks = {name: () if everywhere or name == first else pytest.mark.slow for name in self.configs}
            metafunc.parametrize(
                "model", [pytest.param(name, marks=marks[name], id=name) for name in self.configs], indirect=True
            )

    @pytest.mark.parametrize("pieces", SPLITS.values(), ids=SPLITS)
    def test_split_anywhere_equals_whole(self, model: LanguageModel, pieces: tuple[int, ...]) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, LENGTH)
        whole, whole_state = _apply(model, variables, tokens)
        logits, state = _in_pieces(model, variables, tokens, pieces, model.init_state(2))
        assert_close(logits, whole, self.tolerance)
        assert_states_close(state, whole_state, self.tolerance)
        np.testing.assert_array_equal(state.position, LENGTH)

    def test_a_state_with_room_for_what_is_read_gives_the_same(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, LENGTH)
        whole, _ = _apply(model, variables, tokens)
        logits, _ = _in_pieces(model, variables, tokens, SPLITS["pieces"], model.init_state(2, capacity=LENGTH))
        assert_close(logits, whole, self.tolerance)
        with pytest.raises(ValueError, match="capacity is 0; it must be at least 1"):
            model.init_state(2, capacity=0)

    def test_packed_documents_equal_separate_ones(self, model: LanguageModel) -> None:
        variables, (tokens, positions, spans) = _variables(model), _packed(model.config)
        packed, packed_state = _apply(model, variables, tokens, None, positions)
        for start, stop in spans:
            alone, alone_state = _apply(model, variables, tokens[:, start:stop])
            assert_close(packed[:, start:stop], alone, self.tolerance)
        assert_states_close(packed_state, alone_state, self.tolerance)

    def test_packed_documents_have_the_gradients_of_separate_ones(self, model: LanguageModel) -> None:
        variables, (tokens, positions, spans) = _variables(model), _packed(model.config)

        def packed_loss(variables: Any) -> jax.Array:
            logits, _ = model.apply(variables, tokens, positions=positions)
            return _pseudo_loss(logits, tokens)

        def separate_loss(variables: Any) -> jax.Array:
            parts = [model.apply(variables, tokens[:, a:b])[0] for a, b in spans]
            return _pseudo_loss(jnp.concatenate(parts, axis=1), tokens)

        packed, separate = (jax.jit(jax.grad(loss))(variables) for loss in (packed_loss, separate_loss))
        assert_gradients_close(packed, separate, 1e-4, self.ineffective)

    def test_a_document_ignores_what_stands_before_it(self, model: LanguageModel) -> None:
        variables, (tokens, positions, spans) = _variables(model), _packed(model.config)
        start, stop = spans[1]
        changed = tokens.at[:, :start].set((tokens[:, :start] + 1) % model.config.vocab_size)
        logits, _ = _apply(model, variables, tokens, model.init_state(2), positions)
        other, _ = _apply(model, variables, changed, _filled_state(model, 1), positions)
        np.testing.assert_array_equal(logits[:, start:stop], other[:, start:stop])
        assert not np.allclose(logits[:, :start], other[:, :start], atol=1e-3)

    @pytest.mark.parametrize("length", [1, 12])
    def test_a_document_start_clears_a_broken_lane(self, model: LanguageModel, length: int) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, length)
        positions = jnp.arange(length)[None].repeat(2, 0)
        fresh = _apply(model, variables, tokens, model.init_state(2), positions)
        mended = _apply(model, variables, tokens, _filled_state(model, jnp.nan), positions)
        assert_trees_close(mended, fresh, 0.0)

    def test_left_padding_changes_nothing(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, 12)
        padding = jnp.full((2, 5), 3, jnp.int32)
        positions = jnp.concatenate([jnp.zeros((2, 5), jnp.int32), jnp.arange(12)[None].repeat(2, 0)], axis=1)
        logits, state = _apply(model, variables, jnp.concatenate([padding, tokens], axis=1), None, positions)
        alone, alone_state = _apply(model, variables, tokens)
        assert_close(logits[:, 5:], alone, self.tolerance)
        assert_states_close(state, alone_state, self.tolerance)

    def test_absent_tokens_leave_the_state_untouched(self, model: LanguageModel) -> None:
        variables, tokens, lengths = _variables(model), _tokens(model.config, 4, 9), (9, 4, 1, 0)
        state = _apply(model, variables, _tokens(model.config, 4, 6, seed=5))[1]
        offsets = jnp.arange(9)
        positions = jnp.stack([jnp.where(offsets < n, offsets + 6, -1) for n in lengths])
        logits, after = _apply(model, variables, tokens, state, positions)
        assert bool(jnp.isfinite(logits).all())
        for lane, length in enumerate(lengths):
            before = ssm_jax.take_lanes(state, [lane])
            got = ssm_jax.take_lanes(after, [lane])
            if length == 0:
                assert_trees_close(got, before, 0.0)
                continue
            alone, expected = _apply(model, variables, tokens[lane : lane + 1, :length], before)
            assert_close(logits[lane : lane + 1, :length], alone, self.tolerance)
            assert_states_close(got, expected, self.tolerance)

    def test_last_logits_are_those_of_the_last_present_token(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, 8)
        positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, -1, -1, -1, -1, -1]])
        full, _ = _apply(model, variables, tokens, None, positions)
        last, _ = _apply(model, variables, tokens, None, positions, logits="last")
        none, state = _apply(model, variables, tokens, None, positions, logits="none")
        assert_close(last[:, 0], jnp.stack([full[0, 7], full[1, 2]]), 1e-6)
        assert none is None
        np.testing.assert_array_equal(state.position, [8, 3])

    def test_features_times_readout_are_the_logits(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, 8)
        logits, _ = _apply(model, variables, tokens)
        features, _ = _apply(model, variables, tokens, method="features")
        assert_close(features @ model.readout(variables["params"]), logits, self.tolerance)
        assert logits.dtype == jnp.float32
        assert logits.shape == (2, 8, model.config.padded_vocab_size)

    def test_lanes_can_be_picked_reordered_and_repeated(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 3, 10)
        _, state = _apply(model, variables, tokens[:, :6])
        lanes = [2, 0, 0]
        going_on, _ = _apply(model, variables, tokens[:, 6:], state)
        picked, _ = _apply(model, variables, tokens[jnp.asarray(lanes), 6:], ssm_jax.take_lanes(state, lanes))
        assert_close(picked, going_on[jnp.asarray(lanes)], self.tolerance)

    def test_every_state_leaf_has_axes_and_a_size_independent_of_context(self, model: LanguageModel) -> None:
        variables = _variables(model)
        fresh = model.init_state(2)
        short, long = (_apply(model, variables, _tokens(model.config, 2, n))[1] for n in (1, 31))
        assert _shapes(fresh) == _shapes(short) == _shapes(long)
        axes = logical_axes(fresh)
        named = jax.tree.map(
            lambda names, leaf: len(names) == leaf.ndim and names.count("batch") == 1,
            axes,
            fresh,
            is_leaf=lambda node: isinstance(node, tuple) and all(isinstance(name, str) for name in node),
        )
        assert all(jax.tree.leaves(named))

    def test_every_parameter_receives_a_gradient(self, model: LanguageModel) -> None:
        tokens = _tokens(model.config, 2, 11)

        def loss(variables: Any) -> jax.Array:
            return _pseudo_loss(model.apply(variables, tokens)[0], tokens)

        gradients = jax.jit(jax.grad(loss))(_variables(model))
        silent = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree.leaves_with_path(gradients)
            if not jnp.any(leaf)
        ]
        assert not [name for name in silent if not name.endswith(self.ineffective)]

    @pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}], ids=str)
    def test_speed_knobs_change_nothing(self, model: LanguageModel, change: dict[str, Any]) -> None:
        tokens = _tokens(model.config, 2, 9)
        other = model.clone(**change) if "unroll" in change else ssm_jax.build(model.config, **change)

        def loss(model: LanguageModel, variables: Any) -> jax.Array:
            return _pseudo_loss(model.apply(variables, tokens)[0], tokens)

        variables = _variables(model)
        expected = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)(model, variables)
        got = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)(other, variables)
        assert_close(got[0], expected[0], 1e-5)
        assert_gradients_close(got[1], expected[1], 1e-5, self.ineffective)

    def test_bfloat16_computes_near_float32_and_keeps_float32_states(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, 24)
        half = ssm_jax.build(model.config, dtype="bfloat16")
        exact, exact_state = _apply(model, variables, tokens)
        logits, state = _apply(half, variables, tokens)
        assert logits.dtype == jnp.float32
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, exact_state)
        spread = float(jnp.std(exact))
        assert float(jnp.sqrt(jnp.mean(jnp.square(logits - exact)))) < 0.05 * spread

    def test_initial_parameters_do_not_depend_on_the_input(self, model: LanguageModel) -> None:
        init = jax.jit(model.init, static_argnames="method")
        one = init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))
        other = init(jax.random.key(3), jnp.ones((4, 19), jnp.int32), method="features")
        assert_trees_close(one, other, 0.0)

    def test_runs_as_an_nnx_module(self, model: LanguageModel) -> None:
        from flax import nnx

        tokens = _tokens(model.config, 2, 7)
        module = ssm_jax.to_nnx(model).lazy_init(tokens)
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        expected, _ = _apply(model, {"params": params}, tokens)
        assert_close(module(tokens)[0], expected, self.tolerance)

    def test_sharded_equals_unsharded(self, model: LanguageModel) -> None:
        self._compare_sharded(model, self.meshes[:1])

    @pytest.mark.slow
    def test_sharded_along_one_axis_equals_unsharded(self, model: LanguageModel) -> None:
        self._compare_sharded(model, self.meshes[1:])

    def _compare_sharded(self, model: LanguageModel, meshes: tuple[tuple[int, int, int], ...]) -> None:
        tokens = _tokens(model.config, 8, 16)
        variables = _variables(model)

        def loss(variables: Any, tokens: Any) -> tuple[jax.Array, LMState]:
            logits, state = model.apply(variables, tokens)
            return _pseudo_loss(logits, tokens), state

        evaluate = jax.value_and_grad(loss, has_aux=True)
        (expected, expected_state), expected_gradients = jax.jit(evaluate)(variables, tokens)
        for data, fsdp, tensor in meshes:
            mesh = sharding.make_mesh(
                sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor]
            )
            with jax.set_mesh(mesh):
                placed = jax.device_put(variables, sharding.shardings(variables, mesh))
                rows = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
                (value, state), gradients = jax.jit(evaluate)(placed, rows)
            assert_close(value, expected, 1e-5)
            assert_states_close(state, expected_state, self.tolerance)
            assert_gradients_close(gradients, expected_gradients, 1e-4, self.ineffective)

    def test_export_then_import_is_bit_identical(
        self, model: LanguageModel, tmp_path: Any, subtests: pytest.Subtests
    ) -> None:
        variables = _variables(model)
        for layout in self.layouts:
            with subtests.test(layout=layout):
                ssm_jax.save_pretrained(model, variables["params"], tmp_path / layout, layout=layout)
                again, params = ssm_jax.from_pretrained(tmp_path / layout)
                assert again.config == model.config
                assert_trees_close(params, variables["params"], 0.0)

    def test_greedy_generation_equals_the_full_forward(self, model: LanguageModel) -> None:
        variables, prompt = _variables(model), _tokens(model.config, 2, 7)
        new = ssm_jax.generate(model, variables["params"], prompt, max_new_tokens=6)
        sequence = prompt
        for length in range(7, 13):
            padded = jnp.pad(sequence, ((0, 0), (0, 13 - length)))
            logits, _ = _apply(model, variables, padded)
            following = jnp.argmax(logits[:, length - 1, : model.config.vocab_size], axis=-1)
            sequence = jnp.concatenate([sequence, following[:, None].astype(jnp.int32)], axis=1)
        np.testing.assert_array_equal(new, sequence[:, 7:])


def _in_pieces(
    model: LanguageModel, variables: Any, tokens: jax.Array, pieces: tuple[int, ...], state: LMState
) -> tuple[jax.Array, LMState]:
    """The logits of consecutive calls, and the last state."""
    outputs, start = [], 0
    for length in pieces:
        logits, state = _apply(model, variables, tokens[:, start : start + length], state)
        outputs.append(logits)
        start += length
    return jnp.concatenate(outputs, axis=1), state


def _filled_state(model: LanguageModel, value: float) -> LMState:
    """A state of two lanes with every float set to ``value``."""
    return jax.tree.map(
        lambda leaf: jnp.full_like(leaf, value) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        model.init_state(2),
    )


def _packed(config: Any) -> tuple[jax.Array, jax.Array, list[tuple[int, int]]]:
    lengths = (13, 1, 16, 7)
    bounds = np.cumsum((0, *lengths)).tolist()
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None].repeat(2, 0)
    return _tokens(config, 2, bounds[-1]), positions, list(itertools.pairwise(bounds))


def _pseudo_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of a fixed pseudo-random target at every position."""
    targets = (tokens * 7 + 3) % logits.shape[-1]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))


def _shapes(tree: Any) -> Any:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
