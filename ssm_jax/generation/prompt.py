"""Prompts: checked, padded on the right, and read in pieces whose lengths are few."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Int32

from ssm_jax.errors import GenerationError

Prompts: TypeAlias = Any
"""An integer array [B, L], or a sequence of integer sequences of any lengths."""

_SHORTEST = 16


def check_prompts(prompts: Prompts, vocab_size: int) -> list[Int32[np.ndarray, "_"]]:
    """The prompts as int32 arrays.

    Raises:
        GenerationError: no prompt, an empty one, something that is not integers, or a token outside the vocabulary.
    """
    if isinstance(prompts, jax.Array):
        prompts = np.asarray(prompts)
    rows = [_as_tokens(row, number) for number, row in enumerate(prompts)]
    if not rows:
        raise GenerationError("There is no prompt; give an integer array [B, L] or a list of token lists.")
    for number, row in enumerate(rows):
        outside = row[(row < 0) | (row >= vocab_size)]
        if len(outside):
            raise GenerationError(
                f"Prompt {number} holds token {outside[0]}, outside the vocabulary of {vocab_size} tokens (0 to "
                f"{vocab_size - 1}); use the model's own tokenizer."
            )
    return [row.astype(np.int32) for row in rows]


def pieces(
    prompts: Sequence[Int32[np.ndarray, "_"]], longest: int
) -> Iterator[tuple[Int32[np.ndarray, "B L"], Int32[np.ndarray, "B L"]]]:
    """(tokens, positions) of consecutive stretches of the prompts, absent places at position -1.

    Every stretch has ``longest`` columns but the last, which has the least power of two that holds the rest. So the number of
    different shapes grows with the logarithm of ``longest``, not with the number of prompt lengths.
    """
    length = max(len(prompt) for prompt in prompts)
    for start in range(0, length, longest):
        columns = min(longest, bucket(length - start))
        tokens = np.zeros((len(prompts), columns), np.int32)
        positions = np.full((len(prompts), columns), -1, np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + columns]
            tokens[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(start, start + len(part))
        yield tokens, positions


def bucket(length: int) -> int:
    """The least power of two that is not below ``length``, and at least 16."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _as_tokens(row: Any, number: int) -> np.ndarray:
    tokens = np.asarray(row)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise GenerationError(
            f"Prompt {number} is not a sequence of integers; give an integer array [B, L] or a list of token lists."
        )
    if not tokens.size:
        raise GenerationError(
            f"Prompt {number} is empty; start it with at least one token, such as the end-of-text mark."
        )
    return tokens
