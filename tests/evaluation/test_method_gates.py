"""What methods promise of the answers, on the embedded model; docs/methods.md has the whole comparison."""

import pytest

from sparsejax import LLM
from sparsejax.evaluation.method_sweep import compare_methods, make_settings, over_tasks

LENGTH, SAMPLES, BUDGET = 512, 6, 0.25
TASKS = ("single", "multi_key")
AWARE = ("snapkv", "kv_compress", "streaming_llm", "random")
AGNOSTIC = ("compactor", "kvzip", "random")


@pytest.fixture(scope="module")
def scores():
    """Share of exact answers on single-needle tasks by (mode, method)."""
    settings = make_settings(AWARE, [BUDGET], ["aware"]) + make_settings(AGNOSTIC, [BUDGET], ["agnostic"])[1:]
    llm = LLM(
        methods=("full", *dict.fromkeys(AWARE + AGNOSTIC)),
        max_model_len=LENGTH,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    rows = compare_methods(llm, settings, tasks=TASKS, lengths=[LENGTH], samples=SAMPLES, seed=11, progress=False)
    pooled = over_tasks(rows)
    for row in pooled[1:]:
        # Page rounding adds to the quarter, but never as much as another eighth.
        assert row.kept < BUDGET + 1 / 8, (row.method, row.mode)
    return {(row.mode, row.method): row.score for row in pooled}


def test_dense_answers_beside_methods_that_evict(scores):
    assert scores["dense", "full"] == 1.0


@pytest.mark.parametrize("method", ["snapkv", "kv_compress"])
def test_a_quarter_is_enough_once_the_question_is_known(scores, method):
    assert scores["aware", method] >= 0.95 * scores["dense", "full"]


@pytest.mark.parametrize("method", ["streaming_llm", "random"])
def test_a_quarter_at_random_or_by_age_is_not(scores, method):
    assert scores["aware", method] < 0.5


@pytest.mark.parametrize("method", ["compactor", "kvzip"])
def test_importance_without_the_question_beats_chance(scores, method):
    assert scores["agnostic", method] >= scores["agnostic", "random"] + 0.3
