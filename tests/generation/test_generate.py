"""Generation is what a full pass over each sequence says, however prompts are batched, padded, cut or stopped."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ssm_jax
from ssm_jax import generate
from ssm_jax.errors import GenerationError
from ssm_jax.generation.decoder import decode_step, make_decoder, unstack_state
from ssm_jax.generation.generate import _prefill, begin, capacity_for, decode
from ssm_jax.generation.prompt import check_prompts, pieces
from ssm_jax.generation.settings import check_settings
from ssm_jax.generation.stream import stream
from tests.conformance.compare import assert_close
from tests.generation.tiny import FAMILIES, VOCAB, full_logits, tiny

PROMPTS = [[1, 2, 3], [5] * 21, list(range(40)), [7], list(range(50, 18, -1))]
DRAWN = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "key": jax.random.key(4)}


@functools.cache
def _greedy(family: str) -> np.ndarray:
    return generate(*tiny(family), PROMPTS, 24)


@functools.cache
def _drawn(family: str) -> np.ndarray:
    return generate(*tiny(family), PROMPTS, 24, **DRAWN)


@pytest.mark.parametrize("family", [*FAMILIES, "baka"])
def test_greedy_tokens_are_those_of_full_passes(family: str) -> None:
    model, params = tiny(family)
    new = _greedy(family)
    assert new.shape == (len(PROMPTS), 24)
    assert new.dtype == np.int32
    assert len(set(new.ravel().tolist())) > 10, "the text says something"
    sequences = np.zeros((len(PROMPTS), 64), np.int32)
    for row, prompt in enumerate(PROMPTS):
        sequences[row, : len(prompt) + 24] = [*prompt, *new[row]]
    choices = np.argmax(full_logits(model, params, sequences)[..., :VOCAB], axis=-1)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(choices[row, len(prompt) - 1 : len(prompt) + 23], new[row])


def test_a_row_is_what_its_prompt_gives_alone() -> None:
    model, params = tiny("mamba")
    np.testing.assert_array_equal(generate(model, params, [PROMPTS[2]], 24)[0], _greedy("mamba")[2])
    np.testing.assert_array_equal(generate(model, params, PROMPTS[:1], 24, **DRAWN)[0], _drawn("mamba")[0])


@pytest.mark.parametrize(
    ("family", "chunk"), [("mamba", 1), ("mamba", 16), ("mamba", 23), ("mamba2", 16), ("gpt2", 7), ("baka", 5)]
)
def test_prompts_read_in_chunks_give_the_same(family: str, chunk: int) -> None:
    np.testing.assert_array_equal(generate(*tiny(family), PROMPTS, 24, prefill_chunk=chunk), _greedy(family))


def test_generating_goes_on_where_it_stopped() -> None:
    prompts = [[*prompt, *new[:9]] for prompt, new in zip(PROMPTS, _greedy("mamba"), strict=True)]
    np.testing.assert_array_equal(generate(*tiny("mamba"), prompts, 15), _greedy("mamba")[:, 9:])


def test_fewer_tokens_are_a_prefix() -> None:
    for count in (1, 18, 23):
        np.testing.assert_array_equal(generate(*tiny("mamba"), PROMPTS, count, **DRAWN), _drawn("mamba")[:, :count])


def test_an_array_of_prompts_is_a_list_of_them() -> None:
    prompts = np.arange(12).reshape(3, 4)
    expected = generate(*tiny("mamba"), prompts.tolist(), 5)
    np.testing.assert_array_equal(generate(*tiny("mamba"), prompts, 5), expected)
    np.testing.assert_array_equal(generate(*tiny("mamba"), jnp.asarray(prompts), 5), expected)


def test_the_key_alone_decides_the_draws() -> None:
    model, params = tiny("mamba")
    again = generate(model, params, PROMPTS, 24, **DRAWN)
    np.testing.assert_array_equal(again, _drawn("mamba"))
    other = generate(model, params, PROMPTS, 24, **{**DRAWN, "key": jax.random.key(5)})
    assert (other != again).any(axis=1).all()


def test_rows_end_with_eos_and_are_filled_with_it() -> None:
    model, params = tiny("mamba")
    free = _greedy("mamba")
    eos = int(free[0, 5])
    got = generate(model, params, PROMPTS, 24, eos_id=eos)
    ended = 0
    for row, expected in zip(got, free, strict=True):
        ends = np.flatnonzero(expected == eos)
        length = ends[0] if len(ends) else 24
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert (row[length:] == eos).all()
        ended += length < 24
    assert ended > 0


def test_the_loop_ends_when_every_row_has_ended() -> None:
    model, params = tiny("mamba")
    alone = _greedy("mamba")[:1]
    eos = int(alone[0, 5])
    first = int(np.argmax(alone[0] == eos))
    settings = check_settings(model, 24, 0.0, None, None, eos, None)
    decoder = make_decoder(model, params)
    rows = check_prompts(PROMPTS[:1], VOCAB)
    _, progress = decode(model, decoder, begin(model, params, decoder, rows, settings, 64, 32), settings, 23, 32)
    assert int(progress.step) == first
    assert bool(progress.done_B[0])


def test_padded_vocabulary_rows_are_never_chosen() -> None:
    model, params = tiny("mamba")
    embedding = params["embed"]["embedding"]
    loud = {**params, "embed": {"embedding": embedding.at[VOCAB:].set(50 * embedding[:3])}}
    best = np.argmax(full_logits(model, loud, np.tile(np.arange(40), (3, 1))), axis=-1)
    assert (best >= VOCAB).mean() > 0.3, "the padding rows would win"
    for settings in ({}, DRAWN):
        assert generate(model, loud, PROMPTS, 24, **settings).max() < VOCAB


def test_an_untied_head_is_used() -> None:
    tied, params = tiny("mamba")
    model = tied.clone(config=type(tied.config)(**{**vars(tied.config), "tie_embeddings": False}))
    head = jax.random.normal(jax.random.key(9), (16, 64))
    params = {**params, "head": {"kernel": head}}
    new = generate(model, params, [[1, 2, 3]], 12)
    sequence = np.array([[1, 2, 3, *new[0], *[0] * 49]])
    np.testing.assert_array_equal(np.argmax(full_logits(model, params, sequence)[0, 2:14, :VOCAB], axis=-1), new[0])


@pytest.mark.parametrize("family", [*FAMILIES, "baka"])
def test_layers_apart_and_stacked_layers_step_alike(family: str) -> None:
    model, params = tiny(family)
    step = jax.jit(decode_step, static_argnames="model")
    results = []
    for limit in (0, 2**30):
        decoder = make_decoder(model, params, limit)
        assert isinstance(decoder.params.get("apart", decoder.params["layers"]), tuple) == (limit > 0)
        state = unstack_state(decoder, model.init_state(2))
        for token in (3, 7, 11):
            logits, state = step(model, decoder, jnp.array([token, token + 1]), state)
        results.append(logits)
        assert state.position.tolist() == [3, 3]
    assert results[0].shape == (2, VOCAB)
    assert_close(results[1], results[0], 1e-5)


def test_a_decoder_serves_many_calls() -> None:
    model, params = tiny("mamba")
    decoder = make_decoder(model, params)
    for _ in range(2):
        np.testing.assert_array_equal(generate(model, params, PROMPTS, 24, decoder=decoder), _greedy("mamba"))
    blocks = list(ssm_jax.stream(model, params, [1, 2, 3], 9, decoder=decoder))
    np.testing.assert_array_equal(np.concatenate(blocks), _greedy("mamba")[0, :9])


def test_half_precision() -> None:
    model, params = tiny("mamba")
    half = model.clone(config=type(model.config)(**{**vars(model.config), "dtype": "bfloat16"}))
    new = generate(half, params, PROMPTS, 24)
    assert np.mean(new[:, 0] == _greedy("mamba")[:, 0]) >= 0.6


def test_sharded_parameters() -> None:
    model, params = tiny("mamba")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def shard(leaf: jax.Array) -> jax.Array:
        axes = [None if size % 8 else "fsdp" for size in leaf.shape[1:]]
        spec = PartitionSpec(None, *[axis if axis and i == axes.index("fsdp") else None for i, axis in enumerate(axes)])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    sharded = jax.tree.map(shard, params)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    np.testing.assert_array_equal(generate(model, sharded, PROMPTS[:2], 24), _greedy("mamba")[:2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_are_named(temperature: float) -> None:
    model, params = tiny("mamba")
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), params)
    with pytest.raises(
        GenerationError, match=r"logits of prompt 0 are not numbers at new token 0; the weights are damaged"
    ):
        generate(model, broken, [[1, 2]], 3, temperature, key=jax.random.key(0))
    with pytest.raises(GenerationError, match="not numbers"):
        list(stream(model, broken, [1, 2], 3))


def test_few_programs_are_compiled() -> None:
    model, params = tiny("mamba")

    def compiled() -> tuple[int, int]:
        return _prefill._cache_size(), decode._cache_size()

    generate(model, params, [[1] * 16, [2]], 17, eos_id=3, **DRAWN)
    before = compiled()
    for temperature, top_k, top_p, seed, eos, length, count in (
        (0.1, 1, 0.1, 0, 4, 1, 2),
        (5.0, 60, 1.0, 1, 5, 9, 12),
        (1.0, 1000, 0.5, 2, 60, 16, 17),
    ):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": jax.random.key(seed)}
        generate(model, params, [[1] * length, [2]], count, eos_id=eos, **settings)
    generate(type(model)(model.config), params, [[1] * 16, [2]], 17, eos_id=3, **DRAWN)
    assert compiled() == before
    for length in range(1, 101, 7):
        generate(model, params, [[1] * length, [2]], 17, prefill_chunk=64, **DRAWN)
    prefills, decodes = compiled()
    assert prefills - before[0] <= 2, "16, 32 and 64 columns"
    assert decodes == before[1]


def test_memory_does_not_grow_with_the_prompt() -> None:
    widths = [[tokens.shape[1] for tokens, _ in pieces([np.zeros(n, np.int32)], 64)] for n in (5, 64, 65, 300)]
    assert widths == [[16], [64], [64, 16], [64, 64, 64, 64, 64]]


def test_attention_has_room_for_what_is_read_and_written_alone() -> None:
    model, params = tiny("llama")
    long = ssm_jax.build(model.config, n_positions=100_000)
    settings, decoder = check_settings(long, 24, 0.0, None, None, None, None), make_decoder(long, params)
    rows = check_prompts(PROMPTS, VOCAB)
    progress = begin(long, params, decoder, rows, settings, 64, capacity_for(rows, 24))
    assert [layer.k.shape for layer in progress.state.layers] == [(len(PROMPTS), 2, 64, 4)] * 2
    np.testing.assert_array_equal(generate(long, params, PROMPTS, 24), _greedy("llama"))


def test_prefill_holds_no_logits_of_the_prompt() -> None:
    model, params = tiny("mamba")
    tokens = jnp.zeros((2, 32), jnp.int32)
    lowered = _prefill.lower(model, params, tokens, tokens, model.init_state(2), jnp.zeros((2, 16)))
    assert "2x32x16x" in lowered.as_text(), "the hidden states are there"
    assert "2x32x64x" not in lowered.as_text()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": ([], {}, "no prompt"),
    "empty": ([[1], []], {}, "Prompt 1 is empty"),
    "too_large": ([[1], [2, VOCAB]], {}, "Prompt 1 holds token 61, outside the vocabulary of 61 tokens"),
    "negative": ([[-1]], {}, "Prompt 0 holds token -1"),
    "floats": ([[1.5]], {}, "Prompt 0 is not a sequence of integers"),
    "flat": ([1, 2], {}, "Prompt 0 is not a sequence of integers"),
    "tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    "temperature": ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
    "not_finite": ([[1]], {"temperature": float("nan")}, "temperature is nan"),
    "no_key": ([[1]], {"temperature": 1.0}, "needs a key"),
    "top_k": ([[1]], {"top_k": 0}, "top_k is 0"),
    "top_p": ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
    "top_p_large": ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
    "eos": ([[1]], {"eos_id": VOCAB}, "eos_id is 61"),
    "chunk": ([[1]], {"prefill_chunk": 0}, "prefill_chunk is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    prompts, settings, message = BAD[case]
    with pytest.raises(GenerationError, match=message):
        generate(*tiny("mamba"), prompts, **{"max_new_tokens": 4, **settings})


def test_a_window_is_the_full_forward_over_the_last_tokens() -> None:
    """Unequal prompts, some longer than the window; an end mark ends a lane; every token equals the argmax over the window."""
    model, params = tiny("mamba")
    window, count = 7, 9
    prompts = [np.array([3, 1, 4], np.int32), np.arange(1, 12, dtype=np.int32)]
    tokens = generate(model, params, prompts, max_new_tokens=count, window=window)
    for prompt, written in zip(prompts, tokens, strict=True):
        seen = list(prompt)
        for token in written:
            logits, _ = model.apply({"params": params}, jnp.asarray([seen[-window:]], jnp.int32), logits="last")
            assert int(jnp.argmax(logits[0, 0, : model.config.vocab_size])) == token
            seen.append(int(token))
    ended = generate(model, params, prompts, max_new_tokens=count, window=window, eos_id=int(tokens[0, 2]))
    np.testing.assert_array_equal(ended[0, 2:], tokens[0, 2])


def test_a_window_that_holds_everything_changes_nothing() -> None:
    model, params = tiny("mamba")
    prompts = [np.array([3, 1, 4], np.int32), np.arange(1, 12, dtype=np.int32)]
    how = {"temperature": 0.9, "key": jax.random.key(5)}
    np.testing.assert_array_equal(
        generate(model, params, prompts, 6, window=32, **how), generate(model, params, prompts, 6, **how)
    )
    with pytest.raises(GenerationError, match="window is 0; it must be an integer of at least 1"):
        generate(model, params, prompts, 6, window=0)
    with pytest.raises(
        GenerationError, match="window is 65; it must be an integer of at least 1 and at most 64, the model's positions"
    ):
        generate(*tiny("gpt2"), prompts, 6, window=65)


def test_what_is_passed_in_another_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users see it, who have no types checked at run time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, params = tiny("mamba")
    prompts = [np.array([3, 1, 4], np.int32)]
    with pytest.raises(GenerationError, match=r"key is 0, no key of jax\.random"):
        generate(model, params, prompts, 4, temperature=1.0, key=0)
    with pytest.raises(GenerationError, match=r"window is 2\.5; it must be an integer"):
        generate(model, params, prompts, 6, window=2.5)
    with pytest.raises(GenerationError, match=r"has the keys \['params'\] and no 'layers'; pass .*\['params'\]"):
        generate(model, {"params": params}, prompts, 4)
