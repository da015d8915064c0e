"""Exact match, means and tables."""

import pytest

from sparsejax.evaluation.scoring import Row, answer_words, exact_match, format_table, mean_scores


@pytest.mark.parametrize("text", ["ruby amber", " Ruby, amber.", "ruby\namber"])
def test_spacing_case_and_punctuation_do_not_count(text):
    assert answer_words(text) == ("ruby", "amber")
    assert exact_match(text, ["ruby", "amber"])


@pytest.mark.parametrize("text", ["", "ruby", "ruby amber amber", "ruby amber teal", "amber ruby", "rubyamber"])
def test_anything_else_is_wrong(text):
    assert not exact_match(text, ["ruby", "amber"])


def test_any_order_counts_when_order_does_not_matter():
    assert exact_match("amber ruby", ["ruby", "amber"], ordered=False)
    assert not exact_match("amber amber", ["ruby", "amber"], ordered=False)


def test_mean_is_over_tasks_at_each_length():
    rows = [Row("a", 64, 4, 1.0), Row("b", 64, 4, 0.5), Row("a", 128, 4, 0.25)]
    assert mean_scores(rows) == {64: 0.75, 128: 0.25}


def test_table_has_a_line_per_task_and_a_column_per_length():
    rows = [Row("a", 64, 4, 1.0), Row("b", 64, 4, 0.5), Row("a", 128, 4, 0.25)]
    lines = [line.split() for line in format_table(rows).splitlines()]
    assert lines == [["task", "64", "128"], ["a", "100.0", "25.0"], ["b", "50.0", "-"], ["mean", "75.0", "-"]]
