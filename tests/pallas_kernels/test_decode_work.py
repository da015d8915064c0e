"""The work list of decode attention: it covers every slot once, in few and even spans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SpanLimits, decode_work_list
from pallas_kernels.decode_work import max_items

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
    num_spans = work.first_span[-1]
    assert len(set((work.last - work.first)[:num_spans])) <= 1
    for head in range(15):
        spans = slice(work.first_span[head], work.first_span[head + 1])
        assert {head} >= set(work.head_row[spans].tolist())
        rest = num_spans + head
        assert work.head_row[rest] == head
        covered = (work.last - work.first)[spans].sum() + work.last[rest] - work.first[rest]
        assert covered == lengths.reshape(-1)[head]


def test_every_layer_has_a_list_of_its_own():
    lengths = np.random.default_rng(0).integers(0, 50, (3, 5, 2))
    rows = jnp.array([3, 1, 1], jnp.int32)

    def work(lengths):
        return decode_work_list(jnp.asarray(lengths, jnp.int32), rows, num_kv_heads=2, max_slots=50, limits=SMALL)

    for layer in range(3):
        jax.tree.map(
            lambda a, b, i=layer: np.testing.assert_array_equal(a[i], b[0]), work(lengths), work(lengths[layer, None])
        )


def test_the_longest_heads_fill_the_bound():
    work, items = items_of(np.full((4, 2), 1000), SMALL, max_slots=1000)
    assert len(items) <= work.head_row.shape[0] <= 8 + SMALL.most_spans


def test_spans_shrink_when_there_is_little_to_read():
    assert len(items_of([[16]], SMALL, max_slots=64)[1]) == 4
    assert items_of([[16]], SMALL, max_slots=64)[1][0][2] == SMALL.min_span
    assert items_of([[120]], SMALL, max_slots=128)[1][0][2] == SMALL.max_span


def test_one_wave_of_long_spans_and_several_of_shorter_ones():
    limits = SMALL._replace(wave_span=20)
    assert items_of([[160]], limits, max_slots=400)[1][0] == (0, 0, 20)
    assert items_of([[161]], limits, max_slots=400)[1][0] == (0, 0, 16)
    assert items_of([[400]], limits, max_slots=400)[1][0] == (0, 0, 20)  # most_spans of 16 are too few


def test_nothing_held_is_no_work():
    work, items = items_of([[0, 0]], SMALL, max_slots=64)
    assert not items
    np.testing.assert_array_equal(work.first_span, 0)


def test_listed_indices_are_read_whole_by_heads_that_hold_anything():
    _, spans = items_of([[0, 3]], SMALL, max_slots=64, num_indices=10)
    assert [(row, first, last) for row, first, last in spans] == [(1, 0, 4), (1, 4, 8), (1, 8, 10)]


def test_the_default_bound_is_small_for_large_batches_of_long_contexts():
    assert max_items(256 * 8, 131072) <= 256 * 8 + 4096
    assert max_items(1, 1) == 1


def test_layers_that_share_a_table_share_the_list():
    def flops(layers):
        def lists(lengths, rows):
            return [decode_work_list(lengths, rows, num_kv_heads=2, max_slots=512) for _ in range(layers)]

        lengths, rows = jax.ShapeDtypeStruct((1, 9, 2), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
        return jax.jit(lists).lower(lengths, rows).compile().cost_analysis()["flops"]

    assert flops(3) < 1.5 * flops(1)
