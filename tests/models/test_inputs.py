"""What a model says to tokens and positions that it cannot read."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ssm_jax
from ssm_jax.models import LanguageModel
from ssm_jax.models.inputs import check_inputs


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return ssm_jax.build("mamba", vocab_size=11, d_model=8, n_layers=1)


@pytest.fixture(scope="module")
def variables(model: LanguageModel) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        ([[0, 16]], None, "Token 16 is outside the table of 16 tokens; use the model's own tokenizer"),
        ([[0, -1]], [[0, -1]], "Token -1 is outside"),
        ([[0, 1, 2]], [[0, -1, 1]], r"row 0 has a present token after an absent one .* every pad position 0"),
        ([[0, 1], [2, 3]], [[0, 1], [-1, 0]], "row 1 has a present token"),
        ([[0, 1], [2, 3]], [[0, 1], [5, 6]], "row 1 begins at 5, and there is no state before it; begin with 0"),
        ([[0, 1, 2]], [[0, 1, 3]], "row 0 goes from 1 to 3; within a document they go up by one"),
    ],
)
def test_unreadable_values_are_refused(
    model: LanguageModel, variables: Any, tokens: Any, positions: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.apply(variables, jnp.asarray(tokens), positions=None if positions is None else jnp.asarray(positions))


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        (jnp.zeros(3, jnp.int32), None, r"tokens must be integers of shape \[batch, length\], not int32\[3\]"),
        (jnp.zeros((1, 3)), None, r"not float32\[1, 3\]"),
        (
            jnp.zeros((1, 2), jnp.int32),
            jnp.zeros((1, 3), jnp.int32),
            "positions have the shape .1, 3. and tokens .1, 2.",
        ),
    ],
)
def test_wrong_shapes_are_refused(tokens: jax.Array, positions: jax.Array | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(tokens, positions, 11)


@pytest.mark.parametrize("token", [-1, -5, 16, 99])
def test_a_token_outside_the_vocabulary_is_not_a_number_inside_jit(
    model: LanguageModel, variables: Any, token: int
) -> None:
    logits, _ = jax.jit(model.apply)(variables, jnp.asarray([[3, token, 4]]))
    assert bool(jnp.isfinite(logits[:, 0]).all())
    assert bool(jnp.isnan(logits[:, 1:]).all())


def test_rows_go_on_where_their_state_stands(model: LanguageModel, variables: Any) -> None:
    tokens = jnp.zeros((2, 3), jnp.int32)
    _, state = model.apply(variables, tokens)
    model.apply(variables, tokens, state, jnp.asarray([[3, 4, 5], [0, 0, 1]]))
    with pytest.raises(ValueError, match="row 0 begins at 4, and its state stands at 3; begin with 0 .* or go on"):
        model.apply(variables, tokens, state, jnp.asarray([[4, 5, 6], [0, 1, 2]]))
    for apply in (model.apply, jax.jit(model.apply)):
        with pytest.raises(ValueError, match="tokens have 1 rows and the state has 2 lanes; take_lanes picks some"):
            apply(variables, tokens[:1], state)


@pytest.mark.parametrize("lanes", [[2], [0, -3]])
def test_a_lane_that_is_not_there(model: LanguageModel, lanes: list[int]) -> None:
    with pytest.raises(IndexError, match=r"lanes .* of a state with 2 lane"):
        ssm_jax.take_lanes(model.init_state(2), lanes)
