"""top_slots against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.methods.select import top_slots

SIZE = 12
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38]

chosen = jax.jit(top_slots, static_argnames="axes")


def oracle(score: np.ndarray, tie: np.ndarray, count: int) -> np.ndarray:
    """By sorting tuples: NaN below all numbers, -inf never."""
    candidates = [i for i in range(score.size) if score[i] != -np.inf]
    order = sorted(candidates, key=lambda i: (not np.isnan(score[i]), 0 if np.isnan(score[i]) else score[i], tie[i]))
    keep = np.zeros(score.size, bool)
    keep[order[len(order) - min(max(count, 0), len(order)) :]] = True
    return keep


scores = st.lists(
    st.sampled_from(SPECIAL) | st.floats(width=32) | st.sampled_from([2.0, 3.0]), min_size=SIZE, max_size=SIZE
)


@settings(max_examples=300, deadline=None)
@given(scores, st.permutations(range(SIZE)), st.integers(-2, SIZE + 3))
def test_equals_sorting(values, tie, count):
    score, tie = np.array(values, np.float32), np.array(tie, np.int32)
    # Denormals count as zero on the device, so they must not be told apart here.
    score = np.where(np.abs(score) < np.finfo(np.float32).tiny, np.float32(0), score)
    np.testing.assert_array_equal(chosen(score, tie, count), oracle(score, tie, count))


@settings(max_examples=50, deadline=None)
@given(scores, st.permutations(range(SIZE)), st.integers(0, SIZE))
def test_the_order_of_slots_does_not_matter(values, order, count):
    score, order = np.array(values, np.float32), np.array(order)
    tie = np.arange(SIZE, dtype=np.int32)
    np.testing.assert_array_equal(chosen(score, tie, count)[order], chosen(score[order], tie[order], count))


def test_equal_scores_go_to_the_newest():
    keep = chosen(np.zeros(5, np.float32), np.array([3, 9, 1, 7, 5], np.int32), 2)
    np.testing.assert_array_equal(keep, [False, True, False, True, False])


@pytest.mark.parametrize("axes", [-1, (0, 2), (1, 2), (0, 1, 2)])
def test_pools_over_any_axes(axes):
    rng = np.random.default_rng(3)
    score = rng.integers(0, 6, (3, 4, 5)).astype(np.float32)
    tie = rng.permutation(score.size).reshape(score.shape).astype(np.int32)
    pool = tuple(axis % 3 for axis in ((axes,) if isinstance(axes, int) else axes))
    rest = [axis for axis in range(3) if axis not in pool]
    count = rng.integers(0, 12, [score.shape[axis] for axis in rest]).astype(np.int32)
    keep = np.asarray(chosen(score, tie, count, axes=axes))
    # One pool a row, whatever the axes.
    flat = lambda x: np.transpose(x, (*rest, *pool)).reshape(count.size, -1)  # noqa: E731
    for got, values, ties, wanted in zip(flat(keep), flat(score), flat(tie), count.reshape(-1), strict=True):
        np.testing.assert_array_equal(got, oracle(values, ties, int(wanted)))


def test_large_ties_are_told_apart():
    tie = jnp.array([2**31, 2**32 - 1, 5], jnp.uint32)
    np.testing.assert_array_equal(chosen(jnp.ones(3), tie, 1), [False, True, False])
