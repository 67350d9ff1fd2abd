"""Text that the model writes while it trains."""

import itertools

import jax
import numpy as np

from ssm_jax import distributed
from ssm_jax.generation import generate
from ssm_jax.training.metrics import MetricsLog
from ssm_jax.training.progress import TrainingProgress
from ssm_jax.training.run import Run
from ssm_jax.typing import Params


def write_samples(run: Run, step: int, params: Params, log: MetricsLog, progress: TrainingProgress) -> None:
    """Continues each configured prompt and shows and logs the result. The same step always draws the same."""
    settings, tokenizer = run.config.sample, run.tokenizer
    if not settings.prompts:
        return
    prompts = [np.concatenate([[tokenizer.eos_id], tokenizer.encode(prompt)]) for prompt in settings.prompts]
    params = distributed.local_copy(params, run.mesh)
    if not distributed.is_main():
        return
    new_tokens = generate(
        run.model,
        params,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        eos_id=tokenizer.eos_id,
        key=jax.random.fold_in(jax.random.key(run.config.seed), step),
    )
    for prompt, ids in zip(settings.prompts, np.asarray(new_tokens), strict=True):
        text = tokenizer.decode(itertools.takewhile(lambda token: token != tokenizer.eos_id, ids.tolist()))
        log.sample(step, prompt, text)
        progress.note(f"step {step}, a sample:\n{prompt}{text}\n")
