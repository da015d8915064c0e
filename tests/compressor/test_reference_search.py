"""The search for references, their mean, and the arithmetic of centers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nearest
from sparsejax.compressor import (
    center_count,
    center_ordinals,
    center_positions,
    is_center,
    reference_mean,
    reference_search,
    soft_weights,
)
from sparsejax.compressor.config import CompressorConfigError

find = jax.jit(reference_search, static_argnames=("neighbors", "sinks", "step", "metric"))
mean_of = jax.jit(reference_mean)


@pytest.mark.parametrize(("sinks", "step"), [(0, 1), (0, 3), (4, 1), (4, 5), (16, 10)])
def test_center_arithmetic_agrees_with_the_list(sinks, step):
    for length in (1, sinks, sinks + 1, 60):
        places = center_positions(length, sinks=sinks, step=step)
        assert center_count(length, sinks=sinks, step=step) == len(places)
        every = np.arange(length)
        assert np.array_equal(every[is_center(every, sinks=sinks, step=step)], places)
        if length:
            # The number of centers at or before a position, less one.
            expected = np.searchsorted(places, every, side="right") - 1
            np.testing.assert_array_equal(center_ordinals(every, sinks=sinks, step=step), expected)


def brute_force(x, centers, positions, places, neighbors, metric):
    x, centers = x.astype(np.float64), centers.astype(np.float64)
    ids = np.zeros((*x.shape[:2], neighbors), np.int32)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = centers[b, places <= positions[t]]
            if metric == "l2":
                score = -np.sum((x[b, t] - seen) ** 2, axis=-1)
            elif metric == "dot":
                score = seen @ x[b, t]
            else:
                score = seen @ x[b, t] / (np.linalg.norm(seen, axis=-1) * np.linalg.norm(x[b, t]))
            order = np.argsort(-score, kind="stable")[:neighbors]
            ids[b, t] = np.concatenate([order, np.repeat(order[:1], neighbors - len(order))])
    return ids


@pytest.mark.parametrize("tile_scores", [1 << 24, 70])
@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
def test_search_finds_what_brute_force_finds(monkeypatch, metric, tile_scores):
    monkeypatch.setattr(nearest, "_TILE_SCORES", tile_scores)
    rng = np.random.default_rng(0)
    length, sinks, step = 31, 2, 4
    x = rng.normal(size=(2, length, 6)).astype(np.float32)
    places = center_positions(length, sinks=sinks, step=step)
    positions = np.arange(length, dtype=np.int32)
    # Not the jitted one, which would have been traced with another tile.
    ids, scores = jax.jit(partial(reference_search, neighbors=4, sinks=sinks, step=step, metric=metric))(
        x, x[:, places], positions
    )
    np.testing.assert_array_equal(ids, brute_force(x, x[:, places], positions, places, 4, metric))
    assert np.all(np.diff(np.asarray(scores)[:, 20:], axis=-1) <= 0)
    assert np.isfinite(np.asarray(scores)).all()


def test_search_of_later_tokens_sees_their_positions():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 40, 4)), jnp.float32)
    places = center_positions(40, sinks=3, step=5)
    options = {"neighbors": 3, "sinks": 3, "step": 5}
    whole, _ = find(x, x[:, places], jnp.arange(40), **options)
    part, _ = find(x[:, 17:25], x[:, places], jnp.arange(17, 25), **options)
    np.testing.assert_array_equal(part, whole[:, 17:25])


def test_a_center_finds_itself_first_and_missing_places_repeat_the_best():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9, 4)), jnp.float32)
    places = center_positions(9, sinks=1, step=4)
    ids, _ = find(x, x[:, places], jnp.arange(9), neighbors=4, sinks=1, step=4)
    np.testing.assert_array_equal(np.asarray(ids)[0, places, 0], np.arange(len(places)))
    assert np.asarray(ids)[0, 0].tolist() == [0, 0, 0, 0]
    first = np.asarray(ids)[0, 3]
    assert set(first.tolist()) == {0, 1}
    assert first[2] == first[3] == first[0]


def test_bfloat16_signals_are_compared_in_float32():
    # Three centers whose distances differ by less than bfloat16 could tell apart.
    center = np.full((1, 3, 256), 1.0, np.float32)
    center[0, 1, 0], center[0, 2, 0] = 1.0078125, 1.015625
    x = np.full((1, 1, 256), 1.0, np.float32)
    x[0, 0, 0] = 1.015625
    ids, _ = find(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(center, jnp.bfloat16), jnp.asarray([2]), neighbors=3, sinks=3, step=1
    )
    assert np.asarray(ids)[0, 0].tolist() == [2, 1, 0]


def test_equal_scores_go_to_the_earlier_center():
    x = jnp.ones((1, 4, 4))
    ids, _ = find(x, x, jnp.arange(4), neighbors=2, sinks=4, step=1)
    assert np.asarray(ids)[0].tolist() == [[0, 0], [0, 1], [0, 1], [0, 1]]


def test_no_gradient_passes_through_the_search():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 8, 4)), jnp.float32)

    def total(x):
        _, scores = find(x, x[:, ::2], jnp.arange(8), neighbors=2, sinks=0, step=2)
        return jnp.sum(scores) + jnp.sum(soft_weights(scores, 2.0) ** 2)

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(x), 0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_is_that_of_the_gathered_rows_and_so_is_its_gradient(weighted):
    rng = np.random.default_rng(4)
    centers = jnp.asarray(rng.normal(size=(2, 7, 5)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 7, (2, 11, 3)), jnp.int32)
    scores = jnp.asarray(rng.normal(size=(2, 11, 3)), jnp.float32)
    weights = soft_weights(scores, 3.0) if weighted else None

    def gathered(centers):
        rows = jnp.stack([centers[b][ids[b]] for b in range(2)])
        return jnp.mean(rows, axis=2) if weights is None else jnp.sum(rows * weights[..., None], axis=2)

    np.testing.assert_allclose(mean_of(centers, ids, weights), gathered(centers), rtol=1e-5, atol=1e-6)
    by_mean, by_gather = (
        jax.jit(jax.grad(lambda c, f=f: jnp.sum(jnp.sin(f(c)))))(centers)
        for f in (lambda c: mean_of(c, ids, weights), gathered)
    )
    np.testing.assert_allclose(by_mean, by_gather, rtol=1e-5, atol=1e-6)


def test_an_unknown_metric_is_named():
    x = jnp.ones((1, 2, 2))
    with pytest.raises(CompressorConfigError, match="metric must be one of l2, dot, cosine; got 'l1'"):
        find(x, x, jnp.arange(2), neighbors=1, sinks=2, step=1, metric="l1")
