"""The set of static shapes: small, ordered, and large enough for everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.engine.buckets import (
    SMALLEST_PREFILL,
    bucket,
    decode_buckets,
    mixed_shape,
    mixed_shapes,
    powers_of_two,
    prefill_buckets,
    prompt_room,
)


@given(st.integers(1, 10**6))
def test_every_size_has_a_bucket_and_wastes_little(largest):
    for sizes, growth in ((decode_buckets(largest), 2), (prefill_buckets(largest), 4)):
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == largest
        assert all(b <= growth * a for a, b in itertools.pairwise(sizes))
        assert len(sizes) <= largest.bit_length() + 1
    assert decode_buckets(largest)[0] == 1
    assert prefill_buckets(largest)[0] <= 4 * SMALLEST_PREFILL


@given(st.data())
def test_the_bucket_is_the_smallest_that_holds_the_size(data):
    sizes = decode_buckets(data.draw(st.integers(1, 5000)))
    size = data.draw(st.integers(0, sizes[-1]))
    chosen = bucket(size, sizes)
    assert size <= chosen
    assert all(smaller < size for smaller in sizes if smaller < chosen)


@given(limit=st.integers(1, 5000), seqs=st.integers(1, 600), data=st.data())
def test_decodes_join_a_chunk_where_they_make_it_no_larger(limit, seqs, data):
    shapes = mixed_shapes(limit, seqs)
    assert len(shapes) <= 2 * len(prefill_buckets(limit))
    prompt, decodes = data.draw(st.integers(1, limit)), data.draw(st.integers(1, seqs))
    shape, alone = mixed_shape(prompt, decodes, shapes), bucket(prompt, prefill_buckets(limit))
    assert (shape is not None) == (prompt + decodes <= alone)
    if shape is not None:
        assert shape in shapes
        assert shape[0] == alone
        assert shape[1] >= decodes


@given(limit=st.integers(1, 5000), decodes=st.integers(0, 600))
def test_a_full_chunk_always_takes_the_decodes_along(limit, decodes):
    room = prompt_room(limit, decodes)
    assert limit / 2 <= room <= limit
    if 0 < decodes <= limit // 2:
        assert mixed_shape(room, decodes, mixed_shapes(limit, decodes)) is not None


def test_examples():
    assert powers_of_two(12, smallest=3) == (3, 6, 12)
    assert powers_of_two(13) == (1, 2, 4, 8, 13)
    assert prefill_buckets(2048) == (128, 512, 2048)
    assert prefill_buckets(7) == (7,)
    assert mixed_shapes(2048, 256) == ((128, 32), (128, 128), (512, 32), (512, 256), (2048, 32), (2048, 256))
    assert mixed_shapes(2048, 16) == ((128, 16), (512, 16), (2048, 16))
    assert mixed_shape(2040, 8, mixed_shapes(2048, 256)) == (2048, 32)
    assert mixed_shape(100, 40, mixed_shapes(2048, 256)) is None
    assert [prompt_room(2048, decodes) for decodes in (0, 256, 2000)] == [2048, 1792, 1024]
    with pytest.raises(ValueError, match="size 9 is larger than the largest bucket 8"):
        bucket(9, (1, 8))
