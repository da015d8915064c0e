"""Pooling along the text against a loop."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.methods.pooling import pool_along_text

pooled = jax.jit(pool_along_text, static_argnames=("size", "pooling"))


def by_loop(scores, position, member, size, pooling):
    """One lane: neighbours are found by counting members in the order of positions."""
    order = [i for i in np.argsort(position, kind="stable") if member[i]]
    result = np.zeros(len(scores))
    for rank, i in enumerate(order):
        near = [scores[j] for j in order[max(rank - size // 2, 0) : rank + size // 2 + 1]]
        result[i] = {"max": max, "avg": np.mean}[pooling](near)
    return result


@pytest.mark.parametrize(("pooling", "size"), [("max", 7), ("avg", 5), ("avg", 3)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shuffle=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_equals_a_loop(pooling, size, seed, shuffle, share):
    rng = np.random.default_rng(seed)
    position = np.sort(rng.permutation(60)[:16].astype(np.int32))
    member = np.arange(16) < round(16 * share)
    scores = rng.normal(size=(2, 16)).astype(np.float32)
    if shuffle:
        order = rng.permutation(16)
        position, member, scores = position[order], member[order], scores[:, order]
    args = scores, np.broadcast_to(position, (2, 16)), np.broadcast_to(member, (2, 16))
    got = np.asarray(pooled(*args, size=size, pooling=pooling))
    expected = np.stack([by_loop(lane, position, member, size, pooling) for lane in scores])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_gaps_in_the_members_do_not_break_the_order():
    # Slots in text order, with one in the middle that takes no part: neighbours are those beyond it.
    position, member = np.array([[0, 1, -1, 2, 3]]), np.array([[True, True, False, True, True]])
    scores = np.array([[1.0, 5.0, 99.0, 2.0, 0.0]], np.float32)
    got = pooled(scores, position, member, size=3, pooling="max")
    np.testing.assert_array_equal(got, [[5, 5, 0, 5, 2]])


@pytest.mark.parametrize("size", [1, 5])
def test_none_leaves_scores_alone(size):
    scores = np.array([3.0, 1.0, 2.0], np.float32)
    member = np.array([True, True, False])
    run = functools.partial(pooled, scores, np.arange(3), member)
    np.testing.assert_array_equal(run(size=size, pooling="none"), [3, 1, 0])
    np.testing.assert_array_equal(run(size=1, pooling="avg"), [3, 1, 0])
