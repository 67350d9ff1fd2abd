"""What a language model refuses to read."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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


def _readable(array: object) -> bool:
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
