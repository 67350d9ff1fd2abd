"""The byte model against a dictionary implementation, and as a probability distribution."""

from collections import Counter, defaultdict

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ssm_jax.data.packing import frame_document
from ssm_jax.evaluation import ngram

_texts = st.lists(st.binary(max_size=12).map(lambda text: bytes(byte % 5 for byte in text)), min_size=1, max_size=5)


def _documents(texts: list[bytes]) -> list[np.ndarray]:
    return [frame_document(np.frombuffer(text, np.uint8).astype(np.int32), 256) for text in texts]


class _Oracle:
    """The definition, symbol by symbol."""

    def __init__(self, texts: list[bytes], order: int):
        self.order = order
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for context, symbol in self.targets(text):
                for length in range(order + 1):
                    self.counts[context[order - length :]][symbol] += 1

    def targets(self, text: bytes) -> list[tuple[tuple[int, ...], int]]:
        symbols = [256] * self.order + [*text, 256]
        return [(tuple(symbols[i - self.order : i]), symbols[i]) for i in range(self.order, len(symbols))]

    def probability(self, context: tuple[int, ...], symbol: int) -> float:
        lower = self.probability(context[1:], symbol) if context else 1 / 257
        followers = self.counts.get(context)
        if not followers:
            return lower
        return (followers[symbol] + len(followers) * lower) / (followers.total() + len(followers))

    def bits(self, texts: list[bytes]) -> float:
        return -sum(np.log2(self.probability(*target)) for text in texts for target in self.targets(text))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(train=_texts, held_out=_texts)
def test_bits_are_those_of_the_definition(order: int, train: list[bytes], held_out: list[bytes]) -> None:
    model = ngram.fit(_documents(train), order)
    expected = _Oracle(train, order).bits(held_out)
    np.testing.assert_allclose(ngram.bits(model, _documents(held_out)), expected, rtol=1e-12)


def test_blocks_of_documents_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    documents = _documents([rng.integers(0, 7, size).astype(np.uint8).tobytes() for size in rng.integers(0, 60, 50)])
    whole = ngram.bits(ngram.fit(documents[:40]), documents[40:])
    monkeypatch.setattr(ngram, "_BLOCK", 100)
    assert ngram.bits(ngram.fit(documents[:40]), documents[40:]) == pytest.approx(whole, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    model = ngram.fit(_documents([b"abracadabra", b"abacus", b""]))
    for context in ([256, 256, 256], list(b"abr"), list(b"zab"), list(b"zzz"), [256, 97, 98]):
        key = sum(symbol * 257 ** (3 - i) for i, symbol in enumerate(context))
        probabilities = ngram.probabilities(model, np.uint64(key) + np.arange(257, dtype=np.uint64))
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    seen = ngram.probabilities(model, np.array([sum(s * 257 ** (3 - i) for i, s in enumerate(b"abra"))], np.uint64))
    assert seen[0] > 0.5


def test_an_order_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="order 8"):
        ngram.fit(_documents([b"a"]), 8)
