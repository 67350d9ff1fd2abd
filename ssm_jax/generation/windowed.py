"""Generation that forgets: every token from the last ``window`` tokens alone, read afresh.

Originals without a recurrent form generate like this. A carried state remembers more, so the two differ by design once a lane is
longer than the window. Costs the whole window for every token.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from ssm_jax.generation.decoder import Decoder, logits_of
from ssm_jax.generation.sampler import NOT_A_TOKEN, sample
from ssm_jax.generation.settings import Settings
from ssm_jax.models import LanguageModel
from ssm_jax.nn.positions import last_present
from ssm_jax.typing import Params


def windowed(
    model: LanguageModel,
    params: Params,
    decoder: Decoder,
    prompts: list[Int32[np.ndarray, "_"]],
    settings: Settings,
    count: int,
    window: int,
) -> Int32[np.ndarray, "B T"]:
    """``count`` new tokens per lane; after a lane's end, ``pad_id``."""
    kept = [prompt[-window:] for prompt in prompts]
    tokens = np.zeros((len(kept), window), np.int32)
    for row, prompt in enumerate(kept):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in kept], np.int32)
    return np.asarray(_loop(model, params, decoder, jnp.asarray(tokens), jnp.asarray(lengths), settings, count)).T


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _loop(
    model: LanguageModel,
    params: Params,
    decoder: Decoder,
    tokens_BW: Int[Array, "B W"],
    length_B: Int[Array, "B"],
    settings: Settings,
    count: int,
) -> Int[Array, "T B"]:
    window = tokens_BW.shape[1]
    places = jnp.arange(window, dtype=jnp.int32)

    def step(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], Array]:
        tokens_BW, length_B, done_B = carry
        positions = jnp.where(places < length_B[:, None], places, -1)
        output: Any = model.apply({"params": params}, tokens_BW, None, positions, method="features")
        logits_BV = logits_of(model, decoder, last_present(output[0], positions)[:, 0])
        token_B = sample(logits_BV, settings.sampling, settings.key, number)
        token_B = jnp.where(done_B, settings.pad_id, token_B)
        done_B = done_B | (token_B == settings.eos_id) | (token_B == NOT_A_TOKEN)
        full_B1 = (length_B == window)[:, None]
        tokens_BW = jnp.where(full_B1, jnp.roll(tokens_BW, -1, axis=1), tokens_BW)
        length_B = jnp.minimum(length_B + 1, window)
        tokens_BW = jnp.where(places == length_B[:, None] - 1, token_B[:, None], tokens_BW)
        return (tokens_BW, length_B, done_B), token_B

    start = (tokens_BW, length_B, jnp.zeros(length_B.shape, bool))
    return jax.lax.scan(step, start, jnp.arange(count, dtype=jnp.int32))[1]
