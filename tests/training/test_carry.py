"""Truncated back-propagation: windows with a carried state are the whole articles, and only their own window is differentiated."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax import sharding
from ssm_jax.data.lanes import counted_afresh, cut
from ssm_jax.data.packing import Row, absent_row
from ssm_jax.data.schedule import Schedule
from ssm_jax.models import LanguageModel
from ssm_jax.nn import state as nn_state
from ssm_jax.optim import OptimConfig
from ssm_jax.sharding import MeshConfig
from ssm_jax.training import carry as carry_lib
from ssm_jax.training import state as state_lib
from ssm_jax.training.losses import next_token_loss
from ssm_jax.training.step import abstract_batch, compile_step, make_step
from tests.interop.folders import random_params

LANES, WINDOW, VOCAB, LONGEST = 8, 6, 40, 24
ONLY_FIRST = VOCAB - 1
"""A token that stands in first windows alone."""
OPTIM = OptimConfig(lr=1e-2, schedule="constant", clip_norm=1e6)
EXTRA: dict[str, dict[str, Any]] = {
    "mamba": {"tie_embeddings": False},
    "mamba2": {"headdim": 4, "d_state": 8},
    "gss": {"dss_kernel_N": 8, "dss_kernel_H": 8},
    "dense_mamba": {"gate_ratio": 4},
    "retnet": {"n_heads": 2, "d_value": 16, "d_mlp": 16},
    "dense_retnet": {"n_heads": 2, "key_gate_ratio": 4, "value_gate_ratio": 4},
    "gpt2": {"n_heads": 2, "n_positions": LONGEST},
    "gpt_neox": {"n_heads": 2, "n_positions": LONGEST},
    "llama": {"n_heads": 2, "n_positions": LONGEST},
}


@functools.cache
def small_model(family: str = "mamba") -> LanguageModel:
    return ssm_jax.build(family, vocab_size=VOCAB, d_model=16, n_layers=2, **EXTRA[family])


@functools.cache
def loss_of(family: str = "mamba") -> Any:
    """``(params, batch, carry) -> ((loss, weight), carry)``, compiled."""
    model = small_model(family)
    return jax.jit(lambda params, batch, carry: next_token_loss(model, params, batch, carry=carry))


@functools.cache
def articles() -> list[np.ndarray]:
    """Twelve, of 2 to 24 tokens, among them one that ends with a window and one that ends one token later."""
    rng = np.random.default_rng(0)
    lengths = [24, 2, 12, 13, 7, 19, 5, 18, 23, 9, 16, 3]
    texts = [rng.integers(0, VOCAB - 1, length, dtype=np.int32) for length in lengths]
    for text in texts:
        text[1] = ONLY_FIRST
    return texts


@functools.cache
def windows(lanes: int = LANES) -> list[Row]:
    """The batches of two passes."""
    texts = articles()
    schedule = Schedule(np.array([len(text) for text in texts]), lanes=lanes, window=WINDOW, epochs=2)

    def rows(step: int) -> list[Row]:
        places = zip(*schedule.at(step), strict=True)
        return [cut(texts[a], int(o), WINDOW) if a >= 0 else absent_row(WINDOW) for a, o in places]

    return [stack(rows(step)) for step in range(schedule.steps or 0)]


def stack(rows: list[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * max(1, np.abs(y).max())), a, b)


@functools.cache
def compiled(microbatches: int = 1, mesh_sizes: tuple = ()) -> tuple[Any, Any, Any]:
    """(mesh, compiled step, what makes a state)."""
    mesh = sharding.make_mesh(MeshConfig(**dict(mesh_sizes)), None if mesh_sizes else jax.devices()[:1])
    model = small_model()
    shapes = state_lib.abstract(model, OPTIM, mesh, LANES)
    step = make_step(model, OPTIM, microbatches, sharding.batch_parts(mesh))
    program = compile_step(step, *shapes, abstract_batch(LANES, WINDOW, mesh), mesh)
    return mesh, program, lambda: state_lib.initialize(model, OPTIM, mesh, 0, 100, lanes=LANES)


def run_steps(batches: list[Row], *how: Any) -> tuple[list[float], Any, Any]:
    """(losses, carry, parameters)."""
    mesh, step, create = compiled(*how)
    (state, frozen), losses = create(), []
    for batch in batches:
        state, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, state.carry, state.params


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EXTRA if name not in ("mamba", "retnet", "gpt2")]


@pytest.mark.parametrize("family", ["mamba", "retnet", "gpt2", *SLOW])
def test_windows_with_a_carried_state_are_the_whole_articles(family: str) -> None:
    """The sums over all windows of two passes equal twice the sum over the articles, read whole from empty states."""
    model = small_model(family)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, random_params(model))  # so large that all that is read matters
    carry, found = model.init_state(LANES), []
    for batch in windows():
        sums, carry = loss_of(family)(params, batch, carry)
        found.append([float(x) for x in sums])
    whole = stack([cut(text, 0, LONGEST) for text in articles()])
    (loss, weight), nothing = loss_of(family)(params, whole, None)
    assert nothing is None
    assert np.sum(found, axis=0) == pytest.approx([2 * float(loss), 2 * float(weight)], rel=1e-5)
    apart = sum(float(loss_of(family)(params, counted_afresh(batch), carry)[0][0]) for batch in windows())
    assert apart != pytest.approx(2 * float(loss), rel=1e-4), "what is carried matters"


@pytest.mark.parametrize("family", EXTRA)
def test_a_step_leaves_a_carry_of_the_same_shapes(family: str) -> None:
    model = small_model(family)
    for microbatches in (1, 4):
        state, frozen = jax.eval_shape(
            functools.partial(state_lib.create, model=model, config=OPTIM, lanes=LANES), jax.random.key(0), jnp.int32(9)
        )
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, windows()[0]))
        after, _ = jax.eval_shape(make_step(model, OPTIM, microbatches), state, frozen, batch)
        assert after.carry == state.carry
        assert after.carry.position.shape == (LANES,)


def test_no_gradient_reaches_the_window_before() -> None:
    """A token of the first window alone has a gradient there, and exactly none in the update of the second."""
    first, second = (stack([cut(articles()[0], offset, WINDOW)] * LANES) for offset in (0, WINDOW))
    assert not (second["tokens"] == ONLY_FIRST).any()
    mesh, step, create = compiled()
    state, frozen = create()
    params = host(state.params)
    moments = []
    for batch in (first, second):
        state, _ = step(state, frozen, sharding.put_batch(batch, mesh))
        moments.append(host(state.opt_state.inner_state[1].mu["embed"]["embedding"]))
    assert np.abs(moments[0][ONLY_FIRST]).max() > 0
    np.testing.assert_array_equal(moments[1][ONLY_FIRST], np.float32(OPTIM.beta1) * moments[0][ONLY_FIRST])
    changed = [row for row in range(VOCAB) if np.any(moments[1][row] != np.float32(OPTIM.beta1) * moments[0][row])]
    assert changed == sorted(set(second["tokens"].flat))

    moved = jax.tree.map(np.copy, params)
    moved["embed"]["embedding"][ONLY_FIRST] += 1
    read = [loss_of()(read_by, first, small_model().init_state(LANES))[1] for read_by in (params, moved)]
    losses = [float(loss_of()(params, second, carry)[0][0]) for carry in read]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5), "the second window depends on that token"


@pytest.mark.parametrize("how", [(4,), (2, (("data", 2), ("fsdp", 2), ("tensor", 2)))], ids=["parts", "mesh"])
def test_parts_of_the_lanes_and_devices_keep_each_lane_its_state(how: tuple) -> None:
    expected, carry, params = run_steps(windows())
    losses, our_carry, our_params = run_steps(windows(), *how)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(our_carry.position, carry.position)
    np.testing.assert_allclose(our_carry.layers.ssm, carry.layers.ssm, rtol=1e-3, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), host(our_params), host(params))
    if len(how) > 1:
        assert our_carry.layers.ssm.sharding.shard_shape(carry.layers.ssm.shape) == (2, LANES // 4, 16, 16)


def test_the_carry_is_donated() -> None:
    mesh, step, create = compiled()
    state, frozen = create()
    step(state, frozen, sharding.put_batch(windows()[0], mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.carry))


def spoiled(carry: Any, lane: int) -> Any:
    def spoil(axis: int, leaf: jax.Array) -> jax.Array:
        index = (slice(None),) * axis + (lane,)
        return leaf.at[index].set(jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return nn_state.map_lanes(spoil, carry)


def lane_of(carry: Any, lane: int) -> Any:
    return host(nn_state.take_lanes(carry, [lane]))


def test_skipped_updates_empty_the_lanes_that_are_not_finite_and_then_all() -> None:
    mesh, step, create = compiled()
    empty = small_model().init_state(1)
    texts = stack([cut(articles()[0], 0, WINDOW)] * LANES)
    later = stack([cut(articles()[0], WINDOW, WINDOW)] * LANES)
    bad = {**texts, "weights": np.where(np.arange(LANES)[:, None] == 0, np.inf, texts["weights"]).astype(np.float32)}

    state, frozen = create()
    state, metrics = step(state, frozen, sharding.put_batch(bad, mesh))
    assert int(metrics["skipped_in_a_row"]) == 1
    assert lane_of(state.carry, 0).position == [WINDOW], "its state is finite: it goes on"
    going_on = host(state.carry)

    state = dataclasses.replace(state, opt_state=create()[0].opt_state, carry=spoiled(state.carry, 3))
    state, metrics = step(state, frozen, sharding.put_batch(later, mesh))
    assert int(metrics["skipped_in_a_row"]) == 1
    assert_close(lane_of(state.carry, 3), host(empty))
    assert lane_of(state.carry, 2).position == [2 * WINDOW]
    assert not np.array_equal(lane_of(state.carry, 2).layers.ssm, nn_state.take_lanes(going_on, [2]).layers.ssm)

    third = stack([cut(articles()[0], 2 * WINDOW, WINDOW)] * LANES)
    whole_lane = lane_of(state.carry, 2)
    state, metrics = step(state, frozen, sharding.put_batch(third, mesh))
    assert (int(metrics["skipped_in_a_row"]), bool(np.isfinite(metrics["loss"]))) == (0, True)
    afresh = small_model().apply(
        {"params": create()[0].params},
        jnp.asarray(third["tokens"][:1]),
        positions=jnp.arange(WINDOW, dtype=jnp.int32)[None],
        method="features",
    )[1]
    assert_close(lane_of(state.carry, 3), host(afresh))
    assert lane_of(state.carry, 2).position == whole_lane.position + WINDOW

    for _ in range(2):
        state, metrics = step(state, frozen, sharding.put_batch(bad, mesh))
    assert int(metrics["skipped_in_a_row"]) == 2
    assert_close(host(state.carry), host(small_model().init_state(LANES)))


def test_split_and_join_are_inverse_and_follow_the_batch() -> None:
    carry = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), small_model().init_state(LANES)
    )
    parts = carry_lib.split(carry, 4)
    jax.tree.map(np.testing.assert_array_equal, carry_lib.join(parts), carry)
    np.testing.assert_array_equal(parts.position, np.arange(LANES).reshape(-1, 4).T)
    np.testing.assert_array_equal(parts.layers.ssm[3], carry.layers.ssm[:, 3::4])


def test_positions_go_on_from_where_the_state_stands() -> None:
    positions = jnp.asarray([[0, 1, 2], [7, 8, -1], [7, 8, 9], [-1, -1, -1]], jnp.int32)
    stands = jnp.asarray([5, 7, 0, 4], jnp.int32)
    expected = [[0, 1, 2], [7, 8, -1], [0, 1, 2], [-1, -1, -1]]
    assert carry_lib.going_on(positions, stands).tolist() == expected
