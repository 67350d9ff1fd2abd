"""Baka: the promises of every model, with documents that begin with a call; chunks that close; sizes; what it refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import ConfigError, GenerationError
from ssm_jax.models import BakaConfig, LanguageModel, flops_per_token
from ssm_jax.nn.state import ChunkedState
from tests.conformance.compare import assert_close, assert_gradients_close, assert_states_close, assert_trees_close
from tests.conformance.model import ModelConformance, _apply, _filled_state, _tokens, _variables

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "n_heads": 2,
    "d_mlp": 24,
    "n_ctx": 8,
    "n_pauses": 2,
    "n_rmt_tokens": 2,
    "d_state": 4,
}
PUBLISHED = BakaConfig(**TINY, n_layers=2, rmt_read="head")
EVERYTHING = BakaConfig(
    **TINY,
    n_layers=3,
    d_attn=24,
    mamba_every=2,
    mamba_carry=True,
    xl_layer="below",
    norm="rms",
    gate="leaky_relu",
    gate_input="y-x",
    step="nstep4",
    step_shared=True,
    step_reach="xl",
    init="kaiming_normal",
    tie_embeddings=True,
)


class TestBaka(ModelConformance):
    """A document begins with a call; the four promises about documents within a row are replaced by what holds here."""

    configs = {"published": PUBLISHED, "everything": EVERYTHING}
    layouts = ("bakallm",)

    def test_packed_documents_equal_separate_ones(self, model: LanguageModel) -> None:
        """They are refused where positions can be read, and else the whole row is NaN, and that row alone."""
        variables, tokens = _variables(model), _tokens(model.config, 2, 12)
        positions = jnp.asarray([[*range(12)], [*range(7), *range(5)]])
        with pytest.raises(ValueError, match="row 1 begins a document within the call"):
            model.apply(variables, tokens, positions=positions)
        logits, _ = _apply(model, variables, tokens, None, positions)
        assert bool(jnp.isnan(logits[1]).all())
        alone, _ = _apply(model, variables, tokens)
        assert_close(logits[0], alone[0], self.tolerance)

    def test_packed_documents_have_the_gradients_of_separate_ones(self, model: LanguageModel) -> None:
        """Two calls, each a document, have the gradients of one call with two lanes."""
        variables, tokens = _variables(model), _tokens(model.config, 2, 12)
        positions = jnp.arange(12)[None]

        def one_after_another(variables: Any) -> jax.Array:
            first, state = model.apply(variables, tokens[:1])
            second, _ = model.apply(variables, tokens[1:], state=state, positions=positions)
            return _loss(jnp.concatenate([first, second]))

        def side_by_side(variables: Any) -> jax.Array:
            return _loss(model.apply(variables, tokens)[0])

        got, expected = (jax.jit(jax.grad(loss))(variables) for loss in (one_after_another, side_by_side))
        assert_gradients_close(got, expected, 1e-4)

    def test_a_document_ignores_what_stands_before_it(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 2, 12)
        positions = jnp.arange(12)[None].repeat(2, 0)
        _, state = _apply(model, variables, _tokens(model.config, 2, 11, seed=8))
        fresh = _apply(model, variables, tokens, model.init_state(2), positions)
        assert_trees_close(_apply(model, variables, tokens, state, positions), fresh, 0.0)
        assert_trees_close(_apply(model, variables, tokens, _filled_state(model, 1), positions), fresh, 0.0)
        going_on, _ = _apply(model, variables, tokens, state)
        assert not np.allclose(going_on, fresh[0], atol=1e-3)

    def test_left_padding_changes_nothing(self, model: LanguageModel) -> None:
        tokens = _tokens(model.config, 1, 6)
        positions = jnp.asarray([[0, 0, 0, 1, 2, 3]])
        with pytest.raises(ValueError, match=r"absent tokens \(-1\) behind the shorter ones, not before them"):
            model.apply(_variables(model), tokens, positions=positions)

    def test_lanes_at_different_places_of_their_chunks_go_on_together(self, model: LanguageModel) -> None:
        """One call for a lane within its first chunk, one about to close its second, one that begins, one that is absent."""
        variables, tokens = _variables(model), _tokens(model.config, 4, 40, seed=4)
        read, more = (3, 15, 0, 9), (11, 20, 7, 0)
        columns = jnp.arange(20)
        before = jnp.stack([jnp.where(columns < n, columns, -1) for n in read])
        _, state = _apply(model, variables, tokens[:, :20], model.init_state(4), before)
        following = jnp.stack([jax.lax.dynamic_slice_in_dim(row, n, 20) for row, n in zip(tokens, read, strict=True)])
        places = jnp.stack([jnp.where(columns < m, columns + n, -1) for n, m in zip(read, more, strict=True)])
        logits, after = _apply(model, variables, following, state, places)
        whole, _ = _apply(model, variables, tokens)
        for lane, (start, count) in enumerate(zip(read, more, strict=True)):
            assert_close(logits[lane, :count], whole[lane, start : start + count], self.tolerance)
        assert_trees_close(ssm_jax.take_lanes(after, [3]), ssm_jax.take_lanes(state, [3]), 0.0)

    def test_changing_a_lane_changes_no_other(self, model: LanguageModel) -> None:
        variables, tokens = _variables(model), _tokens(model.config, 3, 20)
        logits, state = _apply(model, variables, tokens)
        other, other_state = _apply(model, variables, tokens.at[1].set(5))
        for kept in (0, 2):
            np.testing.assert_array_equal(logits[kept], other[kept])
            assert_trees_close(ssm_jax.take_lanes(state, [kept]), ssm_jax.take_lanes(other_state, [kept]), 0.0)
        assert not np.allclose(logits[1], other[1], atol=1e-3)


def _loss(logits: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.sin(logits * jnp.arange(1, logits.shape[-1] + 1))))


@functools.cache
def _built(config: BakaConfig) -> tuple[LanguageModel, Any]:
    model = ssm_jax.build(config)
    return model, _variables(model)


SWITCHES: dict[str, dict[str, Any]] = {
    "steps": {"mamba_every": 0, "n_rmt_tokens": 0, "gate": "relu", "step": "nstep4", "xl_layer": "below"},
    "step4": {"step": "step4", "gate": "sigmoid", "gate_input": "y"},
    "step4_through_the_cache": {"step": "step4", "step_reach": "xl", "step_shared": True},
    "nothing": {"mamba_every": 0, "n_rmt_tokens": 0, "n_pauses": 0, "xl_layer": "none", "act": "silu"},
    "pause_at_every_place": {"n_pauses": 8, "n_rmt_tokens": 0},
    "uneven_stride": {"n_ctx": 7, "n_pauses": 3},
    "one_token_chunks": {"n_ctx": 1, "n_pauses": 1},
    "elephant": {"elephant_width": 0.7, "elephant_power": 3.5, "mamba_carry": True},
}


OFTEN = ("steps", "step4_through_the_cache", "uneven_stride")
"""Switches that the default run tests; the others are slow."""


@pytest.mark.parametrize(
    "switches",
    [pytest.param(s, id=name, marks=() if name in OFTEN else pytest.mark.slow) for name, s in SWITCHES.items()],
)
def test_every_switch_may_be_split_anywhere(switches: dict[str, Any]) -> None:
    model, variables = _built(BakaConfig(**{**TINY, "n_layers": 2, "mamba_every": 1} | switches))
    tokens = _tokens(model.config, 2, 21)
    whole, whole_state = _apply(model, variables, tokens)
    parts, state = [], model.init_state(2)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 20), (20, 21)):
        logits, state = _apply(model, variables, tokens[:, start:stop], state)
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), whole, 2e-5)
    assert_states_close(state, whole_state, 2e-5)


def test_calls_close_chunks() -> None:
    """A closed call of whole chunks is what a stream reads; a call that ends within a chunk closes it, per lane where it ends."""
    stream, variables = _built(PUBLISHED)
    call = ssm_jax.build(PUBLISHED, chunk_boundary="call")
    tokens = _tokens(PUBLISHED, 2, 24)
    streamed, _ = _apply(stream, variables, tokens)
    called, _ = _apply(call, variables, tokens)
    assert_close(called, streamed, 2e-5)
    first, state = _apply(call, variables, tokens[:, :5])
    assert_close(first, streamed[:, :5], 2e-5)  # pauses of five tokens stand where those of eight do
    second, _ = _apply(call, variables, tokens[:, 5:10], state)
    assert not np.allclose(second, streamed[:, 5:10], atol=1e-3)
    places = jnp.asarray([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
    _, ragged = _apply(call, variables, tokens[:, :5], None, places)
    _, alone = _apply(call, variables, tokens[1:, :3])
    assert_trees_close(_past(ssm_jax.take_lanes(ragged, [1])), _past(alone), 2e-5)
    following, _ = _apply(call, variables, tokens[:, 5:10], ragged, jnp.asarray([[*range(5, 10)], [*range(3, 8)]]))
    expected, _ = _apply(call, variables, tokens[1:, 5:10], alone)
    assert_close(following[1:], expected, 2e-5)
    with pytest.raises(GenerationError, match="chunk_boundary is 'call': every call closes a chunk"):
        ssm_jax.generate(call, variables["params"], [[1, 2]], 3)
    assert ssm_jax.generate(call, variables["params"], [[1, 2]], 3, window=8).shape == (1, 3)


def _past(state: ChunkedState) -> Any:
    """What the next chunk of the one lane can see of the ones before."""
    attention = state.layers["units"][0].attention
    count = int(attention.past_count.max())
    return attention.past_k[..., :count, :], attention.past_v[..., :count, :], state.memory, state.position


def test_memory_and_cache_carry_information_and_gradients_across_chunks() -> None:
    """Changing the first token of the first chunk changes the third; by memory alone where there is no cache."""
    for switches in ({"xl_layer": "none"}, {"n_rmt_tokens": 0}):
        model, variables = _built(BakaConfig(**{**TINY, "n_layers": 2, "mamba_every": 0} | switches))
        tokens = _tokens(model.config, 1, 24)
        table = variables["params"]["embed"]["embedding"]

        def last(row: jax.Array, model: LanguageModel = model, variables: Any = variables, tokens: Any = tokens) -> Any:
            params = variables["params"]
            embedding = params["embed"]["embedding"].at[63].set(row)
            changed = {**params, "embed": {"embedding": embedding}}
            return jnp.sum(jnp.sin(model.apply({"params": changed}, tokens.at[0, 0].set(63))[0][0, 16:]))

        assert float(jnp.abs(jax.jit(jax.grad(last))(table[63])).max()) > 1e-6, switches


def test_dropout_is_drawn_for_every_chunk() -> None:
    """Two chunks of the same tokens that know nothing of each other differ by their dropout alone, lanes with positions too."""
    fields = {**TINY, "n_pauses": 0, "n_rmt_tokens": 0, "xl_layer": "none", "mamba_every": 0, "n_layers": 1}
    model, variables = _built(BakaConfig(**fields, dropout=0.5))
    tokens = jnp.tile(_tokens(model.config, 1, 8), (1, 2))

    @functools.partial(jax.jit, static_argnames="deterministic")
    def chunks(positions: Any, deterministic: bool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = model.apply(
            variables, tokens, positions=positions, deterministic=deterministic, rngs={"dropout": key}
        )
        return logits[0, :8], logits[0, 8:]

    for positions in (None, jnp.arange(16)[None]):
        exact, same = chunks(positions, True, jax.random.key(1))
        assert_close(exact, same, 1e-6)
        first, second = chunks(positions, False, jax.random.key(1))
        other, _ = chunks(positions, False, jax.random.key(2))
        for drawn in (exact, second, other):
            assert not np.allclose(first, drawn, atol=1e-3)


def test_a_new_state_can_be_donated() -> None:
    """No array of it is there twice."""
    state = ssm_jax.build(PUBLISHED).init_state(2)
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("init", ["torch", "kaiming_normal"])
def test_initialisation_is_the_published_one(init: str) -> None:
    """Products: variance 1 / (3 fan_in), normal or uniform, a step's fan-in being that of its four inputs; gates uniform in either
    case; N(0, 1) for embedding, pause and memory."""
    fields = {
        **TINY,
        "d_model": 32,
        "d_mlp": 48,
        "n_rmt_tokens": 32,
        "mamba_every": 0,
        "step": "nstep4",
        "gate": "relu",
    }
    model = ssm_jax.build("baka", **fields, n_layers=2, init=init, step_shared=init == "torch")
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    layers = params["layers"]
    layer = layers["units"]["members_0"]
    step = layers["step"] if init == "torch" else layer["step"]["proj"]["kernel"]
    products = [(layer["mixer"][f"{name}_proj"]["kernel"], 32) for name in ("q", "k", "v", "out")]
    products += [
        (layer["mlp"][f"{name}_proj"]["kernel"], inputs) for name, inputs in (("up", 32), ("gate", 32), ("down", 48))
    ]
    gates = [(layer[f"{name}_gate"]["kernel"], 32) for name in ("mixer", "mlp", "step")]
    for number, (kernel, fan_in) in enumerate([*products, (step, 128), *gates]):
        normal = init == "kaiming_normal" and number <= len(products)
        assert abs(float(jnp.std(kernel)) * (3 * fan_in) ** 0.5 - 1) < 0.06
        assert (float(jnp.abs(kernel).max()) * fan_in**0.5 > 1.2) == normal
    for leaf in (params["embed"]["embedding"], layers["memory"]):
        assert abs(float(jnp.std(leaf)) - 1) < 0.06
    assert 0.7 < float(jnp.std(layers["pause"])) < 1.3


def test_published_sizes() -> None:
    """Counted as the original's parameters, which hold the 32 rotary frequencies of every layer; here they are constants."""
    sizes = {"celp18": 182_929_408, "mamba12": 213_139_584, "rmt12": 190_505_088, "steps": 240_028_032}
    for name, parameters in sizes.items():
        config = ssm_jax.build(f"baka-{name}").config
        assert ssm_jax.count_parameters(config) + 32 * config.n_layers == parameters


def test_operations_are_counted() -> None:
    """Two per weight and slot, and attention: twice the half of a chunk of its own and, in long documents, the one before."""
    config = BakaConfig(**TINY, n_layers=2, mamba_every=0)
    body = 2 * (4 * 16 * 16 + 3 * 16 * 24)
    slots = (8 + 2 + 4) / 8
    for context, keys in ((8, 15 / 2), (8 * 10**6, 15 / 2 + 14)):
        expected = 2 * (slots * (body + 2 * 32 * keys) + 16 * 64)
        assert flops_per_token(config, context) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3}, r"n_heads 3 does not divide d_model = 16"),
        ({"d_attn": 18, "n_heads": 2}, r"d_attn / n_heads = 18 / 2 is odd"),
        ({"n_pauses": 9}, r"n_pauses is 9 in chunks of n_ctx = 8 tokens"),
        ({"n_rmt_tokens": -1}, r"n_rmt_tokens is -1; it must be at least 0"),
        ({"elephant_power": 0.5}, r"elephant_power is 0.5; it must be at least 1"),
        ({"elephant_width": float("nan")}, r"elephant_width is nan; it must be above 0"),
        ({"norm_eps": 0.0}, r"norm_eps is 0.0; it must be above 0"),
        ({"rope_base": 1.0}, r"rope_base is 1.0; it must be above 1"),
        ({"step_shared": True}, r"step is 'none', and step_shared or step_reach is set"),
        ({"mamba_carry": True, "mamba_every": 0}, r"mamba_carry is set and mamba_every is 0"),
        ({"xl_layer": "above"}, r"model.xl_layer"),
        ({"n_rmt_token": 4}, r"unknown; did you mean 'n_rmt_tokens'"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ssm_jax.build("baka", **{**TINY, "n_layers": 2, **fields})


def test_names_of_the_original_are_accepted() -> None:
    model = ssm_jax.build("baka", dim_model=16, dim_ff=24, n_vocab=9, n_layers=2, n_heads=2, mamba_each_nth_layer=2)
    assert (model.config.d_model, model.config.d_mlp, model.config.vocab_size, model.config.mamba_every) == (
        16,
        24,
        9,
        2,
    )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layers_are_computed_again_where_that_is_asked_for(remat: str) -> None:
    model = ssm_jax.build(PUBLISHED, remat=remat)
    tokens = jnp.zeros((1, 9), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    program = str(jax.make_jaxpr(lambda variables: model.apply(variables, tokens)[0])(variables))
    assert ("checkpoint" in program or "remat" in program) == (remat != "none")
