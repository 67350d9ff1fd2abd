"""Generation: prompts of unequal length in one prefill pass, then one compiled loop on the device, in constant memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from ssm_jax.errors import GenerationError
from ssm_jax.generation.decoder import Decoder, decode_step, logits_of, make_decoder, unstack_state
from ssm_jax.generation.prompt import Prompts, bucket, check_prompts, pieces
from ssm_jax.generation.sampler import NOT_A_TOKEN, sample
from ssm_jax.generation.settings import PREFILL_CHUNK, Settings, check_settings
from ssm_jax.generation.windowed import windowed
from ssm_jax.models import LanguageModel, registry
from ssm_jax.nn.positions import last_present
from ssm_jax.nn.state import LMState
from ssm_jax.typing import Params


class Progress(NamedTuple):
    """Where a generation stands: the last token of each lane, the state before it, and which lanes are done."""

    token_B: Int[Array, "B"]
    state: LMState
    done_B: Bool[Array, "B"]
    step: Int[Array, ""]


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: Key[Array, ""] | None = None,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    decoder: Decoder | None = None,
    window: int | None = None,
) -> Int32[np.ndarray, "B T"]:
    """New tokens that continue each prompt, int32 [B, max_new_tokens].

    A lane ends with its first ``eos_id``; what follows it in the row is ``eos_id`` again. Without ``eos_id`` every lane has
    ``max_new_tokens`` tokens. The loop ends when all lanes have ended. Padded vocabulary rows are never chosen.

    Memory depends neither on the prompts' lengths (read in chunks, the recurrent state carried) nor on ``max_new_tokens``
    beyond the result, but for attention, which keeps keys and values of both. Prompt lengths, ``max_new_tokens`` and their sum
    are rounded up to powers of two inside, so that few programs are compiled; temperature, top_k, top_p, key and eos_id compile
    nothing when they change, only when they are switched on or off.

    Args:
        prompts: integer array [B, L], or a list of token lists of unequal lengths.
        temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature), after top_k
            (the k most likely ones) and top_p (the smallest set of most likely ones with that probability).
        key: randomness, required when temperature > 0. The draws of row i depend on (key, i) alone.
        prefill_chunk: tokens of the prompts that are read at once; bounds memory and changes nothing else.
        decoder: ``make_decoder(model, params)``, for parameters that are used in many short calls; each makes its own else.
        window: see only the last so many tokens, reading them again for every new one, as originals without a recurrent form do.
            Slow, and compiled anew for every ``max_new_tokens``; for comparison with them. None forgets nothing.

    Raises:
        GenerationError: a prompt that is empty or holds a token outside the vocabulary, a setting out of range, or no key;
            a prompt that with ``max_new_tokens`` exceeds the model's context, where that is limited; logits that are not numbers.
    """
    check_decodes(model, window)
    rows = check_prompts(prompts, model.config.vocab_size)
    check_window(model, window)
    check_room(
        model, rows if window is None else [row[-window:] for row in rows], max_new_tokens if window is None else 0
    )
    settings = check_settings(model, max_new_tokens, temperature, top_k, top_p, eos_id, key, prefill_chunk)
    decoder = decoder or make_decoder(model, params)
    if window is not None:
        return require_tokens(windowed(model, params, decoder, rows, settings, max_new_tokens, window))
    progress = begin(model, params, decoder, rows, settings, prefill_chunk, capacity_for(rows, max_new_tokens))
    first = np.array(progress.token_B)[:, None]  # a copy: the buffer is donated next
    if max_new_tokens == 1:
        return require_tokens(first)
    rest, _ = decode(model, decoder, progress, settings, max_new_tokens - 1, bucket(max_new_tokens - 1))
    return require_tokens(np.concatenate([first, np.asarray(rest).T[:, : max_new_tokens - 1]], axis=1))


def require_tokens(tokens_BT: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
    """The tokens, unless a lane met logits that are NaN."""
    lanes, places = np.nonzero(tokens_BT == NOT_A_TOKEN)
    if len(lanes):
        raise GenerationError(
            f"The logits of prompt {lanes[0]} are not numbers at new token {places[0]}; the weights are damaged or overflow "
            "in this dtype. Check the parameters for NaN, or use dtype='float32'."
        )
    return tokens_BT


def check_decodes(model: LanguageModel, window: int | None = None) -> None:
    """Raises GenerationError for a model that needs a whole sequence at once; with a window it has one, in chunks."""
    if window is None and getattr(model.config, "chunk_boundary", "stream") == "call":
        raise GenerationError(
            "chunk_boundary is 'call': every call closes a chunk, and each new token would be one. Build or load the "
            "model with chunk_boundary='stream' (the weights are the same), or give window= to read the last tokens anew each time."
        )
    normaliser = getattr(model.config, "score_normaliser", None)
    if normaliser is not None:
        raise GenerationError(
            f"score_normaliser is {normaliser!r}: such a model divides by sums over whole sequences and cannot go on from where it "
            "stands. Build or load it with score_normaliser=None, the exact form; the weights are the same."
        )


def check_window(model: LanguageModel, window: int | None) -> None:
    """Raises GenerationError for a window that is empty, or longer than the model's context."""
    limit = registry.family_of(model.config).context_limit(model.config)
    if window is not None and (not isinstance(window, int) or not 1 <= window <= (limit or window)):
        most = "" if limit is None else f" and at most {limit}, the model's positions"
        raise GenerationError(
            f"window is {window}; it must be an integer of at least 1{most}, or None to forget nothing."
        )


def check_room(model: LanguageModel, prompts: list[Int32[np.ndarray, "_"]], max_new_tokens: int) -> None:
    """Raises GenerationError unless the longest prompt and ``max_new_tokens`` more fit into the model's context."""
    limit = registry.context_limit(model.config)
    longest = max(len(prompt) for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise GenerationError(
            f"A prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the {limit} positions of this model; "
            f"shorten the prompt, or ask for at most {max(limit - longest, 0)} tokens."
        )


def capacity_for(prompts: list[Int32[np.ndarray, "_"]], max_new_tokens: int) -> int:
    """Room for the longest prompt and its continuation; one of few numbers, so that few programs are compiled."""
    return bucket(max(len(prompt) for prompt in prompts) + max_new_tokens)


def begin(
    model: LanguageModel,
    params: Params,
    decoder: Decoder,
    prompts: list[Int32[np.ndarray, "_"]],
    settings: Settings,
    prefill_chunk: int,
    capacity: int,
) -> Progress:
    """Reads the prompts and chooses the first new token of each lane; the state has room for ``capacity`` tokens."""
    state, features_BD = _nothing_read(model, len(prompts), capacity)
    for tokens, positions in pieces(prompts, prefill_chunk):
        state, features_BD = _prefill(model, params, tokens, positions, state, features_BD)
    return _first_token(model, decoder, state, features_BD, settings)


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def _nothing_read(model: LanguageModel, batch: int, capacity: int) -> tuple[LMState, Float[Array, "B D"]]:
    return model.init_state(batch, capacity), jnp.zeros((batch, model.config.d_model), model.config.dtype)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state", "features_BD"))
def _prefill(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    state: LMState,
    features_BD: Float[Array, "B D"],
) -> tuple[LMState, Float[Array, "B D"]]:
    """Reads one stretch; ``features_BD`` are the final hidden states of each lane's last token so far."""
    output: Any = model.apply({"params": params}, tokens, state, positions, method="features")
    features_BLD, state = output
    present_B1 = positions[:, :1] >= 0
    return state, jnp.where(present_B1, last_present(features_BLD, positions)[:, 0], features_BD)


@functools.partial(jax.jit, static_argnames=("model",))
def _first_token(
    model: LanguageModel, decoder: Decoder, state: LMState, features_BD: Float[Array, "B D"], settings: Settings
) -> Progress:
    step = jnp.int32(0)
    token_B = sample(logits_of(model, decoder, features_BD), settings.sampling, settings.key, step)
    return Progress(token_B, unstack_state(decoder, state), _ends(token_B, settings), step)


def _ends(token_B: Int[Array, "B"], settings: Settings) -> Bool[Array, "B"]:
    return (token_B == settings.eos_id) | (token_B == NOT_A_TOKEN)


@functools.partial(jax.jit, static_argnames=("model", "capacity"), donate_argnames=("progress",))
def decode(
    model: LanguageModel,
    decoder: Decoder,
    progress: Progress,
    settings: Settings,
    count: int | Int[Array, ""],
    capacity: int,
) -> tuple[Int[Array, "T B"], Progress]:
    """Up to ``count`` <= ``capacity`` more tokens, [capacity, B]; stops early when all lanes are done.

    Rows that were not reached hold ``pad_id``.
    """
    first_step = progress.step + 1
    tokens_TB = jnp.full((capacity, progress.token_B.shape[0]), settings.pad_id, jnp.int32)

    def going_on(carry: tuple[Progress, Int[Array, "T B"]]) -> Bool[Array, ""]:
        progress, _ = carry
        return (progress.step + 1 < first_step + count) & ~jnp.all(progress.done_B)

    def one_token(carry: tuple[Progress, Int[Array, "T B"]]) -> tuple[Progress, Int[Array, "T B"]]:
        progress, tokens_TB = carry
        step = progress.step + 1
        logits_BV, state = decode_step(model, decoder, progress.token_B, progress.state)
        token_B = sample(logits_BV, settings.sampling, settings.key, step)
        token_B = jnp.where(progress.done_B, settings.pad_id, token_B)
        tokens_TB = jax.lax.dynamic_update_index_in_dim(tokens_TB, token_B, step - first_step, axis=0)
        return Progress(token_B, state, progress.done_B | _ends(token_B, settings), step), tokens_TB

    progress, tokens_TB = jax.lax.while_loop(going_on, one_token, (progress, tokens_TB))
    return tokens_TB, progress
