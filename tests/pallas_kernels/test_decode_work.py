"""The work list of decode attention: it covers every slot once, in few and even items."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SpanLimits, decode_work_list
from pallas_kernels.decode_work import limits_for, max_items

SMALL = SpanLimits(wave=8, min_span=4, wave_span=16, max_span=16, most_spans=24, multiple=4)


def items_of(lengths, limits, **options):
    """lengths [R, H] -> (the list as numpy, its items that read anything as (head_row, first, last))."""
    lengths = jnp.asarray(lengths, jnp.int32)
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    work = decode_work_list(lengths[None], rows, num_kv_heads=lengths.shape[1], limits=limits, **options)
    work = type(work)(*(np.asarray(x[0]) for x in work))
    items = zip(work.head_row.tolist(), work.first.tolist(), work.last.tolist(), strict=True)
    return work, [item for item in items if item[1] < item[2]]


@pytest.mark.parametrize("seed", range(6))
def test_covers_every_slot_once(seed):
    rng = np.random.default_rng(seed)
    most = int(rng.choice([3, 40, 400]))
    lengths = rng.integers(0, most + 1, (5, 3)) * rng.integers(0, 2, (5, 3))
    work, items = items_of(lengths, SMALL, max_slots=most)
    read = np.zeros((15, most), int)
    for head, first, last in items:
        read[head, first:last] += 1
    np.testing.assert_array_equal(read, np.arange(most) < lengths.reshape(-1, 1))
    assert len(work.head_row) == max_items(15, most, SMALL)
    assert len(items) == work.parts.sum()
    for head in range(15):
        own = slice(work.first_item[head], work.first_item[head] + work.parts[head])
        assert {head} >= set(work.head_row[own].tolist())
        size = (work.last - work.first)[own]
        assert (size > 0).all()
        assert size.size == 0 or np.ptp(-(-size // SMALL.multiple)) <= 1  # about equal parts
    means = [lengths.reshape(-1)[head] / work.parts[head] for head, *_ in items]
    assert all(before > after - 1 for before, after in itertools.pairwise(means))  # the longest first


def test_every_layer_has_a_list_of_its_own():
    lengths = np.random.default_rng(0).integers(0, 50, (3, 5, 2))
    rows = jnp.array([3, 1, 1], jnp.int32)

    def work(lengths):
        return decode_work_list(jnp.asarray(lengths, jnp.int32), rows, num_kv_heads=2, max_slots=50, limits=SMALL)

    for layer in range(3):
        jax.tree.map(
            lambda a, b, i=layer: np.testing.assert_array_equal(a[i], b[0]), work(lengths), work(lengths[layer, None])
        )


def test_the_longest_heads_stay_within_the_bound():
    work, items = items_of(np.full((4, 2), 1000), SMALL, max_slots=1000)
    assert len(items) <= work.head_row.shape[0] <= 8 + SMALL.most_spans


def test_items_shrink_when_there_is_little_to_read():
    _, items = items_of([[16]], SMALL, max_slots=64)
    assert [item[1:] for item in items] == [(0, 4), (4, 8), (8, 12), (12, 16)]  # min_span
    assert items_of([[128]], SMALL, max_slots=128)[1][0] == (0, 0, 16)


def test_one_wave_of_long_items_and_several_of_shorter_ones():
    limits = SMALL._replace(wave_span=20)
    assert items_of([[160]], limits, max_slots=400)[1][0] == (0, 0, 20)
    assert items_of([[176]], limits, max_slots=400)[1][0] == (0, 0, 16)
    assert items_of([[480]], limits, max_slots=480)[1][0] == (0, 0, 20)  # most_spans of 16 are too few


def test_a_short_rest_makes_no_item_of_its_own():
    _, items = items_of([[16 * 12 + 4]], SMALL, max_slots=400)
    assert len(items) == 12
    assert items[-1] == (0, 176, 196)


def test_many_heads_of_one_item_each_are_not_cut():
    """A batch whose heads fit into items needs no merging, however many there are and whatever they have decoded."""
    lengths = np.random.default_rng(0).integers(2000, 2600, (256, 8))
    work, items = items_of(lengths, SpanLimits(), max_slots=8192)
    order = np.argsort(-lengths.reshape(-1), kind="stable")
    assert items == [(head, 0, lengths.reshape(-1)[head]) for head in order]
    np.testing.assert_array_equal(work.first_item[order], np.arange(256 * 8))


@pytest.mark.parametrize(("batch", "context"), [(1, 1000), (1, 131_000), (4, 8192), (16, 2100), (24, 2050), (32, 2090)])
def test_one_wave_is_what_the_gpu_runs_at_once_and_a_rest_of_every_head(batch, context):
    _, items = items_of(np.full((batch, 8), context), SpanLimits(), max_slots=131_072)
    assert len(items) <= SpanLimits().wave + batch * 8
    assert max(last - first for _, first, last in items) <= SpanLimits().wave_span + 128


@pytest.mark.parametrize(
    ("batch", "context", "items"), [(8, 2111, 384), (16, 1100, 384), (16, 2111, 384), (32, 2111, 512)]
)
def test_heads_about_as_long_as_each_other_need_no_second_wave(batch, context, items):
    """A little more than whole spans a head is no reason for another item of each."""
    lengths = context - np.random.default_rng(0).integers(0, 20, (batch, 8))
    assert len(items_of(lengths, SpanLimits(), max_slots=131_072)[1]) == items


def test_items_begin_where_blocks_do_and_small_blocks_make_them_more_equal():
    def sizes(block):
        _, items = items_of(np.full((16, 8), 2111), limits_for(block), max_slots=131_072)
        assert all(first % block == 0 for _, first, _ in items)
        return [last - first for _, first, last in items]

    assert (max(sizes(16)), max(sizes(64)), max(sizes(128))) == (704, 704, 768)
    _, items = items_of([[1000]], limits_for(64), max_slots=1024)
    assert len(items) == 16


def test_a_batch_with_a_few_long_heads_cuts_those():
    lengths = np.full((96, 8), 500)
    lengths[:2] = 4000
    work, items = items_of(lengths, SpanLimits(), max_slots=8192)
    assert set(work.parts[16:]) == {1}
    assert max(last - first for _, first, last in items) <= lengths.sum() / SpanLimits().wave + 128


def test_nothing_held_is_no_work():
    work, items = items_of([[0, 0]], SMALL, max_slots=64)
    assert not items
    np.testing.assert_array_equal(work.parts, 0)


def test_listed_indices_are_read_whole_by_heads_that_hold_anything():
    _, items = items_of([[0, 3]], SMALL, max_slots=64, num_indices=10)
    assert items == [(1, 0, 4), (1, 4, 8), (1, 8, 10)]


def test_the_default_bound_is_small_for_large_batches_of_long_contexts():
    assert max_items(256 * 8, 131072) <= 256 * 8 + 4096
    assert max_items(1, 1) == 1


@pytest.mark.parametrize("limits", [SpanLimits(min_span=64), SpanLimits(min_span=256, max_span=128)])
def test_limits_that_would_make_empty_or_too_many_items_are_refused(limits):
    with pytest.raises(ValueError, match="min_span"):
        items_of([[128]], limits, max_slots=128)


def test_layers_that_share_a_table_share_the_list():
    def flops(layers):
        def lists(lengths, rows):
            return [decode_work_list(lengths, rows, num_kv_heads=2, max_slots=512) for _ in range(layers)]

        lengths, rows = jax.ShapeDtypeStruct((1, 9, 2), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
        return jax.jit(lists).lower(lengths, rows).compile().cost_analysis()["flops"]

    assert flops(3) < 1.5 * flops(1)
