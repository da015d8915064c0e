"""The set of static shapes: small, ordered, and large enough for everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.engine.scheduling.buckets import (
    SMALLEST_PREFILL,
    bucket,
    decode_buckets,
    mixed_buckets,
    mixed_shape,
    mixed_shapes,
    most_trims,
    powers_of_two,
    prefill_buckets,
    prompt_room,
    trim,
)


@given(st.integers(1, 10**6))
def test_every_size_has_a_bucket_and_wastes_little(largest):
    for sizes, growth in ((decode_buckets(largest), 2), (prefill_buckets(largest), 4), (mixed_buckets(largest), 4)):
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
def test_decodes_join_a_chunk_where_that_takes_no_longer(limit, seqs, data):
    shapes, alone = mixed_shapes(limit, seqs), prefill_buckets(limit)
    assert len(shapes) <= 2 * len(mixed_buckets(limit))
    prompt, decodes = data.draw(st.integers(1, limit)), data.draw(st.integers(1, seqs))
    shape = mixed_shape(prompt, decodes, shapes, alone)
    if prompt + decodes <= min(bucket(prompt, mixed_buckets(limit)), bucket(prompt, alone)):
        assert shape is not None, "decodes ride in the padding"
    if shape is not None:
        assert shape in shapes
        assert shape[0] == bucket(prompt + decodes, mixed_buckets(limit))
        assert shape[1] >= decodes
        assert seconds(shape[0]) <= seconds(bucket(prompt, alone)) + seconds(decodes)


@given(limit=st.integers(1, 5000), decodes=st.integers(0, 600))
def test_a_full_chunk_always_takes_the_decodes_along(limit, decodes):
    room = prompt_room(limit, decodes)
    assert limit / 2 <= room <= limit
    if 0 < decodes <= limit // 2:
        assert mixed_shape(room, decodes, mixed_shapes(limit, decodes), prefill_buckets(limit)) is not None


def seconds(size):
    """The model of a step's time by which shapes are chosen: in proportion to its bucket from 160 tokens on."""
    return max(size, 160) + 20


@given(limit=st.integers(1, 9000), seqs=st.integers(1, 600), data=st.data())
def test_trimming_saves_time_and_ends(limit, seqs, data):
    decodes = data.draw(st.integers(0, min(seqs, limit)))
    sizes = mixed_buckets(limit) if decodes else prefill_buckets(limit)
    most = prompt_room(limit, decodes) if decodes else limit
    prompt = data.draw(st.integers(1, most))
    steps, left, spent = 0, prompt, 0
    while left:
        now = trim(left, decodes, sizes)
        assert 0 < now <= left
        if now < left:
            assert now + decodes in sizes, "what is left after trimming fills a bucket"
            if decodes:
                assert mixed_shape(now, decodes, mixed_shapes(limit, seqs), prefill_buckets(limit)) is not None
        spent += seconds(bucket(min(now + decodes, limit), sizes))
        left -= now
        steps += 1
    if decodes:
        assert steps <= 1 + most_trims(prompt + decodes, sizes)
    else:
        assert spent <= seconds(bucket(prompt, sizes)), "a prompt alone never waits longer"


def test_examples():
    assert powers_of_two(12, smallest=3) == (3, 6, 12)
    assert powers_of_two(13) == (1, 2, 4, 8, 13)
    assert prefill_buckets(2048) == (128, 512, 2048)
    assert prefill_buckets(7) == (7,)
    assert [mixed_buckets(limit) for limit in (2048, 1024, 100, 7)] == [
        (128, 512, 1024, 2048), (64, 256, 512, 1024), (64, 100), (7,),
    ]  # fmt: skip
    assert mixed_shapes(1024, 256) == (
        (64, 32), (64, 64), (256, 32), (256, 256), (512, 32), (512, 256), (1024, 32), (1024, 256),
    )  # fmt: skip
    assert mixed_shapes(2048, 16) == ((128, 16), (512, 16), (1024, 16), (2048, 16))
    assert mixed_shape(2040, 8, mixed_shapes(2048, 256), prefill_buckets(8192)) == (2048, 32)
    assert mixed_shape(100, 40, mixed_shapes(2048, 256), prefill_buckets(2048)) is None
    assert [prompt_room(2048, decodes) for decodes in (0, 256, 2000)] == [2048, 1792, 1024]
    # 1,300 tokens: 1,024 now and a small step, rather than 748 tokens of padding; what fills a bucket well is left.
    assert [trim(tokens, 250, mixed_buckets(2048)) for tokens in (1050, 1300, 1798)] == [774, 1300, 1798]
    assert [trim(tokens, 0, prefill_buckets(2048)) for tokens in (130, 520, 1100, 1600)] == [128, 512, 512, 1600]
    assert [most_trims(tokens, (128, 512)) for tokens in (128, 129, 512, 513)] == [0, 2, 2, 3]
    with pytest.raises(ValueError, match="size 9 is larger than the largest bucket 8"):
        bucket(9, (1, 8))
