"""The set of static shapes: small, ordered, and large enough for everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.engine.buckets import SMALLEST_PREFILL, bucket, decode_buckets, powers_of_two, prefill_buckets


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


def test_examples():
    assert powers_of_two(12, smallest=3) == (3, 6, 12)
    assert powers_of_two(13) == (1, 2, 4, 8, 13)
    assert prefill_buckets(2048) == (128, 512, 2048)
    assert prefill_buckets(7) == (7,)
    with pytest.raises(ValueError, match="size 9 is larger than the largest bucket 8"):
        bucket(9, (1, 8))
