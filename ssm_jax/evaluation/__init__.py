"""Evaluation: a model's loss on held-out text, the baseline it must beat, and the report of a run."""

from ssm_jax.evaluation.articles import evaluate_articles
from ssm_jax.evaluation.lengths import evaluate_lengths
from ssm_jax.evaluation.perplexity import evaluate
from ssm_jax.evaluation.report import write_report
from ssm_jax.evaluation.split import evaluate_baseline, evaluate_documents, evaluate_split

__all__ = [
    "evaluate",
    "evaluate_articles",
    "evaluate_baseline",
    "evaluate_documents",
    "evaluate_lengths",
    "evaluate_split",
    "write_report",
]
