"""LAMBADA: the last word of a passage, which only the whole passage tells (Paperno et al. 2016, arXiv:1606.06031)."""

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ssm_jax.data.tokenizers import Tokenizer
from ssm_jax.errors import DataError
from ssm_jax.evaluation.likelihood import encode_pair, likelihoods
from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params

_NORMAL_95 = 1.959964


def read_passages(path: str | Path, text_field: str = "text") -> list[str]:
    """The passages of a ``.jsonl(.gz)`` file.

    Raises:
        DataError: no such file, a line that is no JSON object with the field, a passage of fewer than two words.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"Evaluation file {path} cannot be read ({getattr(error, 'strerror', None) or error}); check the path."
        ) from error
    passages = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"Evaluation file {path}, line {number}, is not JSON ({error}); download it again."
            ) from error
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str) or len(text.split()) < 2:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else "it is no object"
            raise DataError(
                f"Evaluation file {path}, line {number}, has no passage in field {text_field!r} (its keys: {keys}); name the field "
                "with --text-field."
            )
        passages.append(text)
    if not passages:
        raise DataError(f"Evaluation file {path} is empty; give a file with passages.")
    return passages


def lambada(
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    passages: list[str],
    batch_size: int = 16,
    start_mark: bool = True,
) -> dict[str, Any]:
    """Accuracy and perplexity of the last word, given all before it, with 95 % intervals.

        accuracy: greedy decoding gives exactly the word's tokens        perplexity = exp(mean over passages of -log p(word))

    The word is encoded with the space before it, and the context without. The interval of the accuracy is Wilson's, that of the
    perplexity the normal one of the mean. ``start_mark`` puts the end-of-text mark first, as training does.
    """
    mark = [tokenizer.eos_id] if start_mark else []
    pairs = []
    for text in passages:
        context, word = text.rstrip().rsplit(maxsplit=1)
        head, last = encode_pair(tokenizer, context, f" {word}")
        pairs.append(([*mark, *head], last))
    found = likelihoods(model, params, pairs, batch_size)
    right = sum(result.is_greedy for result in found)
    losses = -np.array([result.logprob for result in found])
    spread = _NORMAL_95 * float(losses.std(ddof=1) if len(losses) > 1 else math.inf) / math.sqrt(len(losses))
    mean = float(losses.mean())
    return {
        "passages": len(found),
        "accuracy": right / len(found),
        "accuracy_interval": _wilson(right, len(found)),
        "perplexity": _exp(mean),
        "perplexity_interval": [_exp(mean - spread), _exp(mean + spread)],
    }


def _wilson(right: int, count: int) -> list[float]:
    """Wilson's 95 % interval of a proportion."""
    z2 = _NORMAL_95**2
    p = right / count
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_95 / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
