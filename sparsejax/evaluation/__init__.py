"""Long-context evaluation: task generators, scoring, and the loop that runs them through any generator."""

from sparsejax.evaluation.ruler import EncodedPrompt, build_samples, encode_sample, evaluate
from sparsejax.evaluation.scoring import Row, exact_match, format_table, mean_scores
from sparsejax.evaluation.tasks import ANSWER_TOKENS, TASKS, Sample, make_sample, make_samples

__all__ = [
    "ANSWER_TOKENS",
    "TASKS",
    "EncodedPrompt",
    "Row",
    "Sample",
    "build_samples",
    "encode_sample",
    "evaluate",
    "exact_match",
    "format_table",
    "make_sample",
    "make_samples",
    "mean_scores",
]
