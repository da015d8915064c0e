"""What compressed rows hold, as it is counted before it is measured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparsejax.engine.scheduling.usage import Usage


@given(st.sampled_from([1, 2, 4, 8]), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 30))
def test_growth_bounds_what_tables_of_any_lengths_take(page_size, lengths, tokens):
    def pages(more):
        return sum(-(-(length + more) // page_size) for length in lengths)

    usage = Usage(length=0, held=pages(0), next_growth=pages(1) - pages(0), second_growth=pages(2) - pages(1))
    growth = usage.growth(tokens, tables=len(lengths), page_size=page_size)
    taken = pages(tokens) - pages(0)
    assert taken <= growth <= len(lengths) * -(-tokens // page_size)
    if tokens <= 2 or page_size == 1:
        assert growth == taken


@given(st.sampled_from([1, 2, 4, 8]), st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=6))
def test_tables_that_reuse_a_slot_grow_a_token_later(page_size, tables):
    """A table with a hole puts its next token there; the device counts it among those that do not grow."""

    def pages(more):
        return sum(-(-(length + max(more - hole, 0)) // page_size) for length, hole in tables)

    lengths = [length + (not hole) for length, hole in tables]
    usage = Usage(
        length=0,
        held=pages(0),
        next_growth=pages(1) - pages(0),
        second_growth=sum(length % page_size == 0 for length in lengths),
    )
    for tokens in range(12):
        assert pages(tokens) - pages(0) <= usage.growth(tokens, tables=len(tables), page_size=page_size)
