"""What a language model refuses to read."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ssm_jax.nn.state import LMState, capacity


def check_inputs(tokens: Array, positions: Array | None, rows: int) -> None:
    """Shapes and types always; values where they can be read, outside ``jit``.

    Raises:
        ValueError: see ``LanguageModel.__call__``.
    """
    for name, array in (("tokens", tokens), ("positions", positions)):
        if array is None:
            continue
        if jnp.ndim(array) != 2 or not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise ValueError(
                f"{name} must be integers of shape [batch, length], not {jnp.result_type(array)}{list(jnp.shape(array))}."
            )
    if positions is not None and positions.shape != tokens.shape:
        raise ValueError(f"positions have the shape {positions.shape} and tokens {tokens.shape}; they must be equal.")
    if _readable(tokens):
        ids = np.asarray(tokens)
        outside = (ids < 0) | (ids >= rows)
        if outside.any():
            raise ValueError(
                f"Token {ids[outside][0]} is outside the table of {rows} tokens; use the model's own tokenizer."
            )
    if positions is not None and _readable(positions):
        absent = np.asarray(positions) < 0
        broken = np.flatnonzero((absent[:, :-1] & ~absent[:, 1:]).any(axis=1))
        if len(broken):
            raise ValueError(
                f"positions: row {broken[0]} has a present token after an absent one (-1); absent ones stand at the end of a row. "
                "For padding on the left give every pad position 0."
            )


def check_length(tokens: Array, positions: Array | None, state: LMState | None, limit: int | None) -> None:
    """That a model with a limited context does not read beyond it, nor beyond the room that its state has: always where shapes
    tell, else where values can be read.

    Raises:
        ValueError: a document longer than the limit, or than ``init_state`` was told.
    """
    room = None if state is None else capacity(state)
    if limit is None and room is None:
        return
    longest = _longest(tokens, positions, state)
    if limit is not None and longest > limit:
        raise ValueError(
            f"A document of {longest} tokens is longer than the {limit} positions of this model; cut it into pieces of at most "
            f"{limit} tokens, each with positions from 0."
        )
    if room is not None and longest > room:
        raise ValueError(
            f"A document of {longest} tokens does not fit into a state made by init_state(capacity={room}); begin with one that "
            f"has capacity={longest} or more."
        )


def check_start(tokens: Array, positions: Array | None, state: LMState | None) -> None:
    """That there is a row for every lane of the state; where values can be read, that every row begins a document or goes on where
    its state stands, and that positions go up one by one.

    Raises:
        ValueError: another number of rows, a first position that is neither 0 nor the state's next one, a gap.
    """
    if state is not None and jnp.shape(state.position)[0] != tokens.shape[0]:
        raise ValueError(
            f"tokens have {tokens.shape[0]} rows and the state has {jnp.shape(state.position)[0]} lanes; take_lanes picks some."
        )
    if positions is None or not positions.shape[1] or not _readable(positions):
        return
    here = np.asarray(positions)
    gaps = np.argwhere((here[:, 1:] != here[:, :-1] + 1) & (here[:, 1:] > 0))
    if len(gaps):
        row, column = gaps[0]
        raise ValueError(
            f"positions: row {row} goes from {here[row, column]} to {here[row, column + 1]}; within a document they go up by one."
        )
    if state is not None and not _readable(state.position):
        return
    first = np.asarray(positions)[:, 0]
    stands = np.zeros_like(first) if state is None else np.asarray(state.position)
    wrong = np.flatnonzero((first > 0) & (first != stands))
    if len(wrong):
        row = wrong[0]
        where = "there is no state before it" if state is None else f"its state stands at {stands[row]}"
        raise ValueError(
            f"positions: row {row} begins at {first[row]}, and {where}; begin with 0 (a new document) or go on from the state."
        )


def check_restart(tokens: Array, positions: Array | None, state: LMState | None, chunked: bool) -> None:
    """That in a model that reads chunk by chunk every document begins with a call, where values can be read.

    Raises:
        ValueError: position 0 behind the first column.
    """
    if not chunked or positions is None or not _readable(positions):
        return
    rows = np.flatnonzero((np.asarray(positions)[:, 1:] == 0).any(axis=1))
    if len(rows):
        raise ValueError(
            f"positions: row {rows[0]} begins a document within the call, and this model reads in chunks that begin with it; give "
            "every document a call of its own, with absent tokens (-1) behind the shorter ones, not before them."
        )


def _longest(tokens: Array, positions: Array | None, state: LMState | None) -> int:
    """Tokens of the longest document after this call, as far as it can be known."""
    if positions is not None:
        return int(np.max(np.asarray(positions), initial=-1)) + 1 if _readable(positions) else 0
    start = state.position if state is not None else jnp.zeros((1,), jnp.int32)
    return tokens.shape[1] + (int(np.max(np.asarray(start), initial=0)) if _readable(start) else 0)


def _readable(array: object) -> bool:
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
