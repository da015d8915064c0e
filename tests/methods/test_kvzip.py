"""KVzip's passes over the context, and its scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from method_cases import random_case

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import get
from sparsejax.methods.kvzip import KVzip, ReconstructionPass


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 15))
def test_the_passes_repeat_the_context_once(length, chunk, lead_in):
    context = list(range(100, 100 + length))
    passes = KVzip(chunk_tokens=chunk, lead_in_tokens=lead_in).reconstruction_passes(
        context, first_instruction=[1], next_instruction=[2, 3]
    )
    assert [token for each in passes for token in each.tokens[-(each.stop - each.start) :]] == context
    for index, each in enumerate(passes):
        assert each.stop - each.start <= chunk
        before = context[max(0, each.start - lead_in) : each.start]
        instruction = [2, 3] if index else [1]
        assert list(each.tokens) == [*instruction, *before, *context[each.start : each.stop]]


def test_needs_no_instructions():
    assert KVzip(chunk_tokens=3, lead_in_tokens=1).reconstruction_passes([5, 6, 7, 8]) == [
        ReconstructionPass((5, 6, 7), 0, 3),
        ReconstructionPass((7, 8), 3, 4),
    ]


def test_scores_are_what_was_recorded():
    case = random_case(0)
    np.testing.assert_array_equal(KVzip().scores(case.slots()), case.score)


def test_is_query_agnostic_and_pools_all_heads():
    method = get("kvzip")
    assert method.records == {"reconstruction"}
    assert not method.query_aware
    assert method.default_budget_rule == "global"
    assert method().power == 0


@pytest.mark.parametrize("option", [{"chunk_tokens": 0}, {"lead_in_tokens": -1}])
def test_bad_options_are_named(option):
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        KVzip(**option)
