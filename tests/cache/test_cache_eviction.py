"""What evictions that mark, copy or bound their work ask of the cache: the edges of each operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import check_invariants
from small_cache import (
    GRANULARITIES,
    LANES,
    SLOTS,
    admit,
    append,
    assert_same,
    compact,
    fork,
    held,
    ints,
    jit,
    keep_all,
    lanes,
    make,
    release,
    stamp,
)

import sparsejax.cache as kv
from sparsejax.cache.dead import drop_few_pages, drop_pages

_allocate = jit(kv.allocate, static_argnames="max_count")
_compact = jit(kv.compact, static_argnames="max_keep")
_repack = jit(kv.repack, static_argnames="max_keep")
_usage = jit(kv.row_usage, static_argnames="max_slots")
slots_at = jit(kv.slots_at)
add_scores = jit(kv.add_scores, static_argnums=1)
live_slots = jit(kv.live_slots, static_argnames="max_slots")
drop_dead_pages = jit(functools.partial(kv.drop_dead_pages, max_slots=SLOTS))


def repack(cache, rows, keep, **options):
    """keep: bool[Lt, K, Ht, S]; padding lanes are marked."""
    padding = np.ones((keep.shape[0], LANES - keep.shape[1], *keep.shape[2:]), bool)
    return _repack(cache, lanes(rows), np.concatenate([keep, padding], axis=1), **options)


def table_slots(cache, *slots):
    """i32[Lt, T, Ht]: the same slots in every table."""
    tables = (cache.layout.table_layers, len(slots), cache.layout.table_heads)
    return np.broadcast_to(ints(*slots)[None, :, None], tables)


def kill(cache, row, *slots):
    """Marks slots of a row dead in all tables."""
    rows = np.full(len(slots), row, np.int32)
    return stamp(cache, slots_at(cache, rows, table_slots(cache, *slots)), np.full(len(slots), -1, np.int32))


# allocate by table, slots_at, add_scores


def test_heads_can_grow_by_different_numbers():
    cache = admit(make("per_head", columns=8), 1, 4)
    count = np.full((2, LANES, 2), 9, np.int32)
    count[:, 0] = [[0, 1], [5, 2]]
    after, ok = _allocate(cache, lanes([1]), count)
    assert ok
    check_invariants(after)
    np.testing.assert_array_equal(after.table.length[:, 1], [[4, 5], [9, 6]])
    assert int(cache.free.count - after.free.count) == 0 + 1 + 2 + 1


def test_refused_growth_of_one_head_changes_nothing():
    cache = admit(make("per_head"), 1, 4)
    count = np.zeros((2, LANES, 2), np.int32)
    count[1, 0] = [13, 1]  # more than a row can name
    after, ok = _allocate(cache, lanes([1]), count)
    assert not ok
    assert_same(after, cache)


def test_allocation_names_the_shapes_it_wants():
    with pytest.raises(ValueError, match=r"count must have shape \[K\] = \(1,\) or \[Lt, K, Ht\] = \(2, 1, 2\), got"):
        kv.allocate(make("per_head"), ints(1), np.ones((2, 1), np.int32))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_token_takes_the_slot_it_is_given(granularity):
    cache = kill(admit(make(granularity), 1, 7), 1, 2)
    mapping = slots_at(cache, ints(1), table_slots(cache, 2))
    for layer in range(2):
        cache = append(cache, layer, mapping, np.full((1, 2, 4), 9, np.float32), np.zeros((1, 2, 4), np.float32))
    cache = stamp(cache, mapping, ints(9))
    for layer in range(2):
        assert held(cache, 1, layer, layer) == [0, 1, 9, 3, 4, 5, 6]
    assert np.asarray(live_slots(cache, ints(1), max_slots=SLOTS))[..., :7].all()


def test_slots_outside_a_row_map_to_the_null_entry():
    cache = admit(make("per_head"), 1, 6)
    mapping = slots_at(cache, ints(1, 1, 0, 2), table_slots(cache, -1, 6, 0, 0))
    assert not np.asarray(mapping.entry).any()
    assert not np.asarray(mapping.slot).any()
    # A slot of its own for each table.
    slot = np.array([[[-1, 5]], [[0, 6]]], np.int32)
    mapping = slots_at(cache, ints(1), slot)
    pages = np.asarray(cache.table.pages)[:, 1]
    np.testing.assert_array_equal(mapping.entry, [[[0, pages[0, 1, 1]]], [[pages[1, 0, 0], 0]]])
    np.testing.assert_array_equal(mapping.slot, [[[0, 1]], [[0, 0]]])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_add_up_in_one_layer(granularity):
    cache = admit(make(granularity), 1, 6)
    mapping = slots_at(cache, ints(1, 1, 0), table_slots(cache, 5, 1, 0))
    values = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    cache = add_scores(add_scores(cache, 1, mapping, values), 1, mapping, values)
    address, score = cache.layout.address(1), np.asarray(cache.pool.score)
    for token, slot in enumerate((5, 1)):
        for head in range(2):
            ht = head if cache.layout.table_heads > 1 else 0
            entry = np.asarray(cache.table.pages)[address.table_layer, 1, ht, slot // 4]
            assert score[address.page(entry, head), slot % 4] == 2 * values[token, head]
    assert score.sum() == 2 * values[:2].sum()


def test_scores_need_a_place():
    cache = make(records=False)
    mapping = kv.slots_at(cache, ints(1), table_slots(cache, 0))
    with pytest.raises(ValueError, match="with_score=True"):
        kv.add_scores(cache, 0, mapping, np.ones((1, 2), np.float32))


# dead slots


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_pages_without_a_live_slot_return(granularity):
    cache = kill(admit(make(granularity), 1, 14), 1, 0, 4, 5, 6, 7, 12, 13)
    after = drop_dead_pages(cache, lanes([1]))
    check_invariants(after)
    # The second page, and the partial last one, whose two used slots are dead.
    assert int(after.free.count - cache.free.count) == 2 * cache.layout.entries_per_page_column
    assert held(after, 1, 1, 1) == [0, 1, 2, 3, 8, 9, 10, 11]
    live = np.asarray(live_slots(after, ints(1), max_slots=SLOTS))
    assert (live == ((np.arange(SLOTS) > 0) & (np.arange(SLOTS) < 8))).all()


def test_a_partial_last_page_stays_last():
    cache = drop_dead_pages(kill(admit(make(), 1, 6), 1, 0, 1, 2, 3), lanes([1]))
    assert held(cache, 1) == [4, 5]
    cache = admit(cache, 1, 3)
    check_invariants(cache)
    assert held(cache, 1) == [4, 5, 0, 1, 2]


def test_a_row_of_dead_tokens_becomes_empty():
    cache = drop_dead_pages(kill(admit(make("per_head"), 1, 6), 1, *range(6)), lanes([1, 2]))
    check_invariants(cache)
    assert int(cache.free.count) == cache.layout.num_entries - 1


def test_live_pages_stay():
    cache = kill(admit(make(), 1, 6), 1, 0, 1, 2)
    assert_same(drop_dead_pages(cache, lanes([1])), cache)


def test_a_shared_dead_page_loses_one_reference():
    cache = kill(admit(make(), 1, 8), 1, 0, 1, 2, 3)
    cache, ok = fork(cache, ints(1), ints(2), ints(8))
    assert ok
    after = drop_dead_pages(cache, lanes([2]))
    check_invariants(after)
    assert int(after.free.count) == int(cache.free.count)
    assert held(after, 2) == [4, 5, 6, 7]
    assert held(after, 1) == list(range(8))
    assert int(drop_dead_pages(after, lanes([1])).free.count) == int(cache.free.count) + 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_few_pages_go_by_column_as_they_do_by_mark(granularity):
    # A row whose first page another one shares, one with a partial last page, and padding.
    cache = admit(admit(make(granularity, columns=12), 1, 16), 3, 6)
    cache, ok = fork(cache, ints(1), ints(2), ints(4))
    assert ok
    tables = (cache.layout.table_layers, 3, cache.layout.table_heads)
    rows, num_columns = ints(1, 3, 0), 4
    few = jit(functools.partial(drop_few_pages, num_columns=num_columns))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        # Distinct columns in any order, some of them -1, some that a table does not hold.
        columns = rng.permuted(np.broadcast_to(ints(-1, -1, *range(num_columns)), (*tables, 6)), axis=-1)[..., :3]
        marks = (columns[..., None] == np.arange(num_columns)).any(axis=-2)
        after = few(cache, rows, columns)
        check_invariants(after)
        assert_same_but_for_the_order_of_freeing(after, jit(drop_pages)(cache, rows, marks))


def assert_same_but_for_the_order_of_freeing(one, other):
    assert_same(one.table, other.table)
    assert int(one.free.count) == int(other.free.count)
    np.testing.assert_array_equal(one.free.references, other.free.references)


def test_a_row_longer_than_the_bound_keeps_its_pages():
    cache = kill(admit(make(), 1, 12), 1, *range(4))
    assert_same(jax.jit(functools.partial(kv.drop_dead_pages, max_slots=8))(cache, lanes([1])), cache)


def test_without_positions_nothing_is_dead():
    cache = admit(make(records=False), 1, 6)
    assert np.asarray(live_slots(cache, ints(1), max_slots=SLOTS)).sum() == 6
    with pytest.raises(ValueError, match="with_position=True"):
        kv.drop_dead_pages(cache, ints(1), max_slots=SLOTS)


def test_live_slots_may_be_asked_for_beyond_the_table():
    cache = admit(make(), 1, 16)
    assert np.asarray(live_slots(cache, ints(1, 0), max_slots=40)).sum(axis=-1).tolist() == [[[16], [0]]]


# repack


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_repacking_keeps_the_order_and_takes_fresh_pages(granularity):
    cache = admit(make(granularity), 1, 11)
    before = np.asarray(cache.table.pages)[:, 1]
    cache, ok = repack(cache, ints(1), keep_all(cache, 1, but=[0, 2, 3, 8]))
    assert ok
    check_invariants(cache)
    for layer in range(2):
        for head in range(2):
            assert held(cache, 1, layer, head) == [1, 4, 5, 6, 7, 9, 10]
    pages = np.asarray(cache.table.pages)[:, 1]
    assert not set(before[before > 0]) & set(pages[pages > 0])
    assert int(cache.free.count) == cache.layout.num_entries - 1 - cache.layout.entries_for(7)


def test_heads_repack_to_different_lengths():
    cache = admit(make("per_head", columns=8), 1, 8)
    keep = np.zeros((2, 1, 2, SLOTS), bool)
    keep[0, 0, 0, 5], keep[0, 0, 1, :], keep[1, 0, 1, 1::2] = True, True, True
    cache, ok = repack(cache, ints(1), keep)
    assert ok
    check_invariants(cache)
    assert [held(cache, 1, *table) for table in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
        [5],
        list(range(8)),
        [],
        [1, 3, 5, 7],
    ]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_repacking_makes_a_forked_row_its_own(granularity):
    cache = admit(make(granularity), 1, 8)
    cache, _ = fork(cache, ints(1), ints(2), ints(8))
    cache, ok = repack(cache, ints(2), keep_all(cache, 1))
    assert ok
    check_invariants(cache)
    assert int(np.asarray(cache.free.references).max()) == 1
    assert held(cache, 1, 1, 1) == held(cache, 2, 1, 1) == list(range(8))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_repacking_needs_room_for_both_copies(granularity):
    """Six pages: three are taken, so eight tokens fit beside them and thirteen do not, though twelve would be freed."""
    cache = admit(admit(make(granularity), 1, 12), 2, 1)
    after, ok = repack(cache, ints(1), keep_all(cache, 1, but=[0]))
    assert not ok
    assert_same(after, cache)
    after, ok = repack(cache, ints(1), keep_all(cache, 1, but=range(4)))
    assert ok
    check_invariants(after)
    assert held(after, 1) == list(range(4, 12))


def test_repacking_refuses_rows_longer_than_the_mask():
    cache = admit(make(), 1, 7)
    after, ok = repack(cache, ints(1), keep_all(cache, 1)[..., :6])
    assert not ok
    assert_same(after, cache)


# max_keep


@pytest.mark.parametrize("operation", [_compact, _repack])
def test_the_bound_on_kept_tokens_changes_the_cost_only(operation):
    cache = admit(admit(make("per_head", columns=10), 1, 11), 2, 6)
    keep = np.random.default_rng(0).random((2, LANES, 2, SLOTS)) < 0.4
    keep[0, 0, 1], keep[1, 1, 0] = True, False
    length = np.asarray(cache.table.length)[:, ints(1, 0, 2)]
    kept = int((keep & (np.arange(SLOTS) < length[..., None])).sum())
    rows = ints(1, 0, 2)
    unbounded, ok = operation(cache, rows, keep)
    assert ok
    bounded, ok = operation(cache, rows, keep, max_keep=kept)
    assert ok
    assert_same(bounded, unbounded)
    refused, ok = operation(cache, rows, keep, max_keep=kept - 1)
    assert not ok
    assert_same(refused, cache)


@pytest.mark.parametrize("operation", [kv.compact, kv.repack])
def test_marks_and_bound_are_checked(operation):
    cache = make("per_layer")
    with pytest.raises(ValueError, match=r"keep must have shape .*2, 1, 1, 'S'.* got \(1, 1, 1, 4\)"):
        operation(cache, ints(1), np.ones((1, 1, 1, 4), bool))
    with pytest.raises(ValueError, match="max_keep must be positive or None, got 0"):
        operation(cache, ints(1), np.ones((2, 1, 1, 4), bool), max_keep=0)


@pytest.mark.parametrize("operation", [compact, repack])
def test_marks_decide_and_dead_slots_that_are_marked_stay_dead(operation):
    cache = kill(admit(make(), 1, 6), 1, 4)
    cache, ok = operation(cache, ints(1), keep_all(cache, 1, but=[0, 1]))
    assert ok
    tokens, live = held(cache, 1), np.asarray(live_slots(cache, ints(1), max_slots=SLOTS))[0, 0, 0]
    assert sorted(tokens) == [2, 3, 4, 5]
    assert [token for token, alive in zip(tokens, live, strict=False) if not alive] == [4]


# row_usage


def test_usage_of_ragged_rows():
    cache = admit(make("per_head", columns=10), 1, 8)
    keep = keep_all(cache, 1)
    keep[0, 0, 0, 3:], keep[0, 0, 1, 5:], keep[1, 0, 0, :] = False, False, False
    cache, _ = compact(cache, ints(1), keep)  # lengths 3, 5, 0, 8
    usage = _usage(cache, max_slots=SLOTS)
    assert [int(x[1]) for x in (usage.held, usage.next_growth, usage.second_growth)] == [1 + 2 + 0 + 2, 2, 1]
    assert int(usage.active[1]) == 16
    # The empty row 2: each head takes a page for its first token and none for its second.
    assert [int(x[2]) for x in (usage.held, usage.next_growth, usage.second_growth)] == [0, 4, 0]
    assert not any(int(x[0]) for x in (usage.held, usage.next_growth, usage.second_growth))
    assert _usage(cache).active is None
    some = _usage(cache, ints(1, 0))
    assert some.held.tolist() == [5, 0]


def test_a_hole_takes_the_next_token_and_the_one_after_it_is_appended():
    cache = kill(admit(make("per_head"), 1, 8), 1, 3)
    hole = jnp.full((2, 5, 2), -1, jnp.int32).at[0, 1].set(3)
    usage = _usage(cache, hole=hole, max_slots=SLOTS)
    assert [int(x[1]) for x in (usage.held, usage.next_growth, usage.second_growth)] == [8, 2, 2]
    assert int(usage.active[1]) == 4 * 7
    assert int(_usage(release(cache, ints(1)), hole=hole).held[1]) == 0
