"""Generation a block at a time, for a reader who watches."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Array, Int32, Integer, Key

from ssm_jax.generation.decoder import Decoder, make_decoder
from ssm_jax.generation.generate import begin, capacity_for, check_decodes, check_room, decode, require_tokens
from ssm_jax.generation.prompt import check_prompts
from ssm_jax.generation.settings import PREFILL_CHUNK, check_settings
from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params

BLOCK = 8


def stream(
    model: LanguageModel,
    params: Params,
    prompt: Sequence[int] | Integer[np.ndarray, "L"] | Integer[Array, "L"],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: Key[Array, ""] | None = None,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    decoder: Decoder | None = None,
) -> Iterator[Int32[np.ndarray, "n"]]:
    """The tokens of ``generate(model, params, [prompt], ...)`` in small blocks as they are made, up to ``eos_id`` included.

    Raises:
        GenerationError: as ``generate``, before the first block but for logits that are not numbers.
    """
    check_decodes(model)
    rows = check_prompts([prompt], model.config.vocab_size)
    check_room(model, rows, max_new_tokens)
    settings = check_settings(model, max_new_tokens, temperature, top_k, top_p, eos_id, key, prefill_chunk)

    def blocks() -> Iterator[Int32[np.ndarray, "n"]]:
        parts = decoder or make_decoder(model, params)
        progress = begin(model, params, parts, rows, settings, prefill_chunk, capacity_for(rows, max_new_tokens))
        yield require_tokens(np.array(progress.token_B)[None])[0]  # a copy: the buffer is donated next
        made = 1
        while made < max_new_tokens and not bool(progress.done_B[0]):
            count = min(BLOCK, max_new_tokens - made)
            tokens, progress = decode(model, parts, progress, settings, count, BLOCK)
            now = 1 + int(progress.step)
            yield require_tokens(np.asarray(tokens)[: now - made].T)[0]
            made = now

    return blocks()
