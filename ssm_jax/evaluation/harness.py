"""Our models in EleutherAI's lm-evaluation-harness (``pip install lm_eval``).

import lm_eval
from ssm_jax.evaluation.harness import HarnessModel

lm_eval.simple_evaluate(model=HarnessModel.from_folder("runs/books"), tasks=["lambada_openai"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ssm_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_folder
from ssm_jax.evaluation import documents
from ssm_jax.evaluation.likelihood import encode_pair, likelihoods
from ssm_jax.evaluation.perplexity import evaluate
from ssm_jax.generation import Decoder, make_decoder, stream
from ssm_jax.interop import from_pretrained
from ssm_jax.models import LanguageModel, registry
from ssm_jax.typing import Params

_MAX_NEW_TOKENS, _WINDOW = 256, 1024


class HarnessModel(LM):
    """loglikelihood, loglikelihood_rolling and generate_until of a model.

    ``start_mark`` puts the end-of-text mark before every context, as training does; an empty context is the mark in any case.
    ``seed`` is that of the draws of ``generate_until``, which differ from request to request.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        start_mark: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._batch_size, self._start_mark = batch_size, start_mark
        self._seed, self._requests = seed, 0
        self._decoder: Decoder | None = None

    @classmethod
    def from_folder(cls, path: str, dtype: str | None = None, **options: Any) -> "HarnessModel":
        """From a run folder or any other that ``from_pretrained`` reads."""
        model, params = from_pretrained(path, dtype=dtype)
        return cls(model, params, load_tokenizer(tokenizer_folder(Path(path)) or path), **options)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) for (context, continuation) requests."""
        pairs = [self._pair(*request.args) for request in requests]
        found = likelihoods(self._model, self._params, pairs, self._batch_size)
        return [(result.logprob, result.is_greedy) for result in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of whole texts, each token seeing all before it: the state is carried, there are no windows.

        Where the model's context has a limit, texts are cut into windows of that length, each read afresh, as the harness does.
        """
        limit = registry.context_limit(self._model.config)
        totals = []
        for request in requests:
            ids = np.asarray([self._tokenizer.eos_id, *self._tokenizer.encode(request.args[0])], np.int32)
            if len(ids) == 1:
                totals.append(0.0)
                continue
            window = min(_WINDOW, 1 << (len(ids) - 1).bit_length())
            if limit is None:
                window = registry.whole_chunks(self._model.config, window)
                batches = documents.endless([[ids]], window)
            else:
                window = min(window, limit)
                batches = documents.sliding([ids], window, window, batch_size=1)
            scores = evaluate(self._model, self._params, batches, carry=limit is None)
            totals.append(-scores["loss"] * scores["tokens"])
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Text after each context, up to the first of its ``until`` strings."""
        return [self._generate(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        head, rest = encode_pair(self._tokenizer, context, continuation)
        return self._context(head), rest

    def _context(self, ids: Sequence[int]) -> list[int]:
        mark = [self._tokenizer.eos_id] if self._start_mark or not len(ids) else []
        return [*mark, *ids]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        draws = bool(options.get("do_sample")) and float(options.get("temperature", 1.0)) > 0
        if self._decoder is None:
            self._decoder = make_decoder(self._model, self._params)
        self._requests += 1
        count = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        prompt = self._context(self._tokenizer.encode(context).tolist())
        limit = registry.context_limit(self._model.config)
        if limit is not None and limit > count:  # else there is no room for any context, which ``stream`` says
            prompt = prompt[-(limit - count) :]
        ids: list[int] = []
        for block in stream(
            self._model,
            self._params,
            prompt,
            count,
            temperature=float(options.get("temperature", 1.0)) if draws else 0.0,
            top_p=options.get("top_p") if draws else None,
            eos_id=self._tokenizer.eos_id,
            key=jax.random.fold_in(jax.random.key(self._seed), self._requests),
            decoder=self._decoder,
        ):
            ids += [token for token in block.tolist() if token != self._tokenizer.eos_id]
            text = self._tokenizer.decode(ids)
            ends = [place for mark in until if (place := text.find(mark)) >= 0]
            if ends:
                return text[: min(ends)]
        return self._tokenizer.decode(ids)
