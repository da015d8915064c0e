"""The contract of each operation at its edges; what random traces reach by chance is forced here."""

import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import check_invariants
from small_cache import (
    GRANULARITIES,
    SLOTS,
    admit,
    allocate,
    append,
    assert_same,
    compact,
    fork,
    held,
    ints,
    keep_all,
    make,
    release,
    slot_mapping,
    stamp,
)

import sparsejax.cache as kv

# allocate, slot_mapping, append, stamp


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_allocation_takes_what_entries_for_says(granularity):
    cache = make(granularity)
    for tokens in (1, 4, 5, 16):
        after, ok = allocate(cache, ints(2), ints(tokens))
        assert ok
        assert int(cache.free.count - after.free.count) == cache.layout.entries_for(tokens)


def test_decode_bound_changes_the_cost_only():
    cache = admit(make(), 1, 4)
    assert_same(
        allocate(cache, ints(1, 0, 2), ints(1, 9, 1)), allocate(cache, ints(1, 0, 2), ints(1, 9, 1), max_count=1)
    )


@pytest.mark.parametrize(
    ("rows", "count", "max_count"),
    [
        ((1, 2), (16, 12), None),  # seven pages of six
        ((1, 2), (17, 1), None),  # more than a row can name
        ((1, 2), (1, -1), None),
        ((1, 2), (1, 2), 1),
        ((1, 2), (1, 2**31 - 1), None),
    ],
)
def test_refused_allocation_changes_nothing(rows, count, max_count):
    cache = make()
    after, ok = allocate(cache, ints(*rows), ints(*count), max_count=max_count)
    assert not ok
    assert_same(after, cache)


def test_last_entry_can_be_taken_and_one_more_token_waits_for_release():
    cache = admit(admit(make(), 1, 16), 2, 8)
    assert int(cache.free.count) == 0
    refused, ok = allocate(cache, ints(3), ints(1))
    assert not ok
    assert_same(refused, cache)
    _, ok = allocate(release(cache, ints(1)), ints(3), ints(1))
    assert ok


def test_bad_max_count():
    with pytest.raises(ValueError, match="max_count must be positive or None, got 0"):
        kv.allocate(make(), ints(1), ints(1), max_count=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_padding_tokens_have_no_effect(granularity):
    cache = admit(make(granularity), 1, 6)
    # The null row, a token before the first and one after the last.
    mapping = slot_mapping(cache, ints(0, 1, 1, 2), ints(1, 7, 0, 1))
    assert not np.asarray(mapping.entry).any()
    after = append(cache, 1, mapping, np.full((4, 2, 4), np.nan, np.float32), np.full((4, 2, 4), np.nan, np.float32))
    assert_same(stamp(after, mapping, ints(9, 9, 9, 9)), cache)


def test_stamp_resets_the_score_of_a_reused_slot():
    cache = admit(make(), 1, 3)
    pool = cache.pool
    cache = type(cache)(
        pool=type(pool)(k=pool.k, v=pool.v, score=jnp.ones_like(pool.score), position=pool.position),
        table=cache.table,
        free=cache.free,
        layout=cache.layout,
    )
    mapping = slot_mapping(cache, ints(1), ints(1))
    score = np.asarray(stamp(cache, mapping, ints(7)).pool.score)
    assert (score == 0).sum() == 4  # one slot, in each of the two layers and heads


def test_records_are_optional():
    cache = admit(make(records=False), 1, 6)
    assert cache.pool.score is None
    assert cache.pool.position is None
    cache, ok = compact(cache, ints(1), keep_all(cache, 1, but=[0, 1]))
    assert ok
    assert sorted(held(cache, 1)) == [2, 3, 4, 5]


# release


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_release_frees_shared_entries_once_and_ignores_repetitions(granularity):
    cache = admit(make(granularity), 1, 8)
    cache, ok = fork(cache, ints(1, 1), ints(2, 3), ints(8, 4))
    assert ok
    cache = release(cache, ints(1, 1, 3))
    check_invariants(cache)
    assert held(cache, 2, 1, 1) == list(range(8))
    cache = release(cache, ints(2, 3, 2))
    check_invariants(cache)
    assert int(cache.free.count) == cache.layout.num_entries - 1


def test_release_of_all_sharers_at_once():
    cache = admit(make(), 1, 8)
    cache, _ = fork(cache, ints(1, 1), ints(2, 3), ints(8, 8))
    cache = release(cache, ints(1, 2, 3))
    check_invariants(cache)
    assert int(cache.free.count) == cache.layout.num_entries - 1


# fork


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fork_shares_full_pages_and_copies_the_partial_one(granularity):
    cache = admit(make(granularity), 1, 7)
    cache, ok = fork(cache, ints(1, 0), ints(2, 0), ints(100, 5))
    assert ok
    check_invariants(cache)
    pages = np.asarray(cache.table.pages)
    assert (pages[:, 1, :, 0] == pages[:, 2, :, 0]).all()
    assert (pages[:, 1, :, 1] != pages[:, 2, :, 1]).all()
    for layer in range(2):
        for head in range(2):
            assert held(cache, 2, layer, head) == list(range(7))


def test_fork_of_whole_pages_costs_no_entry():
    cache = admit(make(), 1, 16)
    after, ok = fork(cache, ints(1, 1), ints(2, 3), ints(16, 8))
    assert ok
    assert int(after.free.count) == int(cache.free.count)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_refused_fork_changes_nothing(granularity):
    # Five pages of six are taken: one partial page can be copied, not two.
    cache = admit(admit(make(granularity), 1, 15), 2, 4)
    after, ok = fork(cache, ints(1, 2), ints(3, 4), ints(6, 3))
    assert not ok
    assert_same(after, cache)
    after, ok = fork(cache, ints(1, 2), ints(3, 4), ints(6, 4))
    assert ok
    assert int(after.free.count) == 0
    check_invariants(after)


@pytest.mark.parametrize(("target", "count"), [(1, 2), (2, 2), (3, -1)])
def test_fork_refuses_a_target_in_use_and_a_negative_count(target, count):
    cache = admit(admit(make(), 1, 4), 2, 4)
    after, ok = fork(cache, ints(1), ints(target), ints(count))
    assert not ok
    assert_same(after, cache)


# compact


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_keeping_everything_changes_nothing(granularity):
    cache = admit(make(granularity), 1, 7)
    cache, _ = fork(cache, ints(1), ints(2), ints(7))
    after, ok = compact(cache, ints(1, 0, 2), keep_all(cache, 3))
    assert ok
    assert_same(after, cache)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_survivors_fill_holes_and_emptied_pages_return(granularity):
    cache = admit(make(granularity), 1, 11)
    cache, ok = compact(cache, ints(1), keep_all(cache, 1, but=[0, 2, 3, 8]))
    assert ok
    check_invariants(cache)
    for layer in range(2):
        for head in range(2):
            assert held(cache, 1, layer, head) == [7, 1, 9, 10, 4, 5, 6]
    assert int(cache.free.count) == cache.layout.num_entries - 1 - cache.layout.entries_for(7)


def test_heads_may_keep_different_tokens():
    cache = admit(make("per_head"), 1, 8)
    keep = np.zeros((2, 1, 2, SLOTS), bool)
    keep[0, 0, 0, 5], keep[0, 0, 1, :], keep[1, 0, 1, 1::2] = True, True, True
    cache, ok = compact(cache, ints(1), keep)
    assert ok
    check_invariants(cache)
    assert held(cache, 1, 0, 0) == [5]
    assert held(cache, 1, 0, 1) == list(range(8))
    assert held(cache, 1, 1, 0) == []
    assert sorted(held(cache, 1, 1, 1)) == [1, 3, 5, 7]
    # Every head then grows at its own end.
    cache, ok = allocate(cache, ints(1), ints(1), max_count=1)
    assert ok
    mapping = slot_mapping(cache, ints(1), ints(1))
    cache = append(cache, 0, mapping, np.full((1, 2, 4), 8, np.float32), np.zeros((1, 2, 4), np.float32))
    assert held(cache, 1, 0, 0) == [5, 8]
    assert held(cache, 1, 0, 1) == list(range(9))
    check_invariants(cache)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compacting_a_shared_page_leaves_the_other_row_alone(granularity):
    cache = admit(make(granularity), 1, 8)
    cache, _ = fork(cache, ints(1), ints(2), ints(8))
    cache, ok = compact(cache, ints(1), keep_all(cache, 1, but=[1, 6]))
    assert ok
    check_invariants(cache)
    assert held(cache, 2, 1, 1) == list(range(8))
    assert held(cache, 1, 1, 1) == [0, 7, 2, 3, 4, 5]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_cutting_into_a_shared_page_copies_it(granularity):
    """No hole, nothing moves; still the row will append to the page, so it must be its own."""
    cache = admit(make(granularity), 1, 8)
    cache, _ = fork(cache, ints(1), ints(2), ints(8))
    cache, ok = compact(cache, ints(2), keep_all(cache, 1, but=[6, 7]))
    assert ok
    check_invariants(cache)
    assert held(cache, 1) == list(range(8))
    assert held(cache, 2) == list(range(6))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_both_sharers_compacted_at_once(granularity):
    cache = admit(make(granularity), 1, 8)
    cache, _ = fork(cache, ints(1), ints(2), ints(8))
    keep = keep_all(cache, 2)
    keep[:, 0, :, [1, 6]], keep[:, 1, :, :3] = False, False
    cache, ok = compact(cache, ints(1, 2), keep)
    assert ok
    check_invariants(cache)
    assert held(cache, 1, 1, 1) == [0, 7, 2, 3, 4, 5]
    assert sorted(held(cache, 2, 1, 1)) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_refused_compaction_changes_nothing(granularity):
    """Six pages: four shared by rows 1 and 2, row 3 has one. One free page cannot take two copies."""
    cache = admit(make(granularity), 1, 16)
    cache, _ = fork(cache, ints(1), ints(2), ints(16))
    cache = admit(cache, 3, 3)
    after, ok = compact(cache, ints(2), keep_all(cache, 1, but=[0, 4]))
    assert not ok
    assert_same(after, cache)
    # One copy fits, and dropping shared pages needs none at all.
    one, ok = compact(cache, ints(2), keep_all(cache, 1, but=[12]))
    assert ok
    check_invariants(one)
    none, ok = compact(admit(cache, 3, 2), ints(2), keep_all(cache, 1, but=range(8, 16)))
    assert ok
    assert int(none.free.count) == 0
    assert held(none, 2) == list(range(8))


def test_compaction_refuses_rows_longer_than_the_mask():
    cache = admit(make(), 1, 7)
    after, ok = compact(cache, ints(1), keep_all(cache, 1)[..., :6])
    assert not ok
    assert_same(after, cache)


def test_compaction_names_the_shape_it_wants():
    cache = make("per_layer")
    with pytest.raises(ValueError, match=r"keep must have shape .*2, 1, 1, 'S'.* got \(1, 1, 1, 4\)"):
        kv.compact(cache, ints(1), np.ones((1, 1, 1, 4), bool))
