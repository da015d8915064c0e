"""Bounds of the keys of pages stay true while rows are appended to, released and forked, and pages change hands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax.cache as kv
from sparsejax.cache import CacheLayout, init_cache

LANES, LONGEST, LAYERS, HEADS, DIM, PAGE = 3, 11, 2, 2, 4, 4
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(granularity):
    tables = {"shared": 1, "per_head": LAYERS * HEADS}[granularity]
    return init_cache(
        CacheLayout(
            num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, num_pages=(1 + 9 * tables) * (4 // tables),
            max_rows=5, max_slots=24, page_size=PAGE, granularity=granularity, dtype=jnp.float32, with_bounds=True,
        )
    )  # fmt: skip


@jit
def extend(cache, rows, counts, k):
    """Appends counts[i] tokens to rows[i], packed one row behind the other: k f32[layers, LANES * LONGEST, H, D]."""
    starts = jnp.pad(jnp.cumsum(counts), (1, 0))
    cache, ok = kv.allocate(cache, rows, counts, max_count=LONGEST)
    token = jnp.arange(LANES * LONGEST, dtype=jnp.int32)
    lane = jnp.searchsorted(starts, token, side="right") - 1
    owner = jnp.where(ok, jnp.append(rows, 0)[lane], 0)
    mapping = kv.slot_mapping(cache, owner, jnp.append(starts[1:], 0)[lane] - token)
    for layer in range(LAYERS):
        cache = kv.append(cache, layer, mapping, k[layer], -k[layer])
    return cache, ok


def keys(rng):
    return rng.standard_normal((LAYERS, LANES * LONGEST, HEADS, DIM)).astype(np.float32)


fork, release = jit(kv.fork), jit(kv.release)


def check(cache):
    """Every page of every row has the bounds of the keys that the row holds in it."""
    layout, pool = cache.layout, jax.tree.map(np.asarray, cache.pool)
    pages, lengths = np.asarray(cache.table.pages), np.asarray(cache.table.length)
    for layer in range(LAYERS):
        address = layout.address(layer)
        for row in range(1, layout.num_rows):
            for head in range(HEADS):
                at = address.table_layer, row, head if layout.table_heads > 1 else 0
                for column in range(layout.pages_for(int(lengths[at]))):
                    page = address.page(pages[at][column], head)
                    keys = pool.k[page, : min(PAGE, lengths[at] - PAGE * column)]
                    np.testing.assert_array_equal(pool.bounds[page], [keys.min(0), keys.max(0)])


@pytest.mark.parametrize("granularity", ["shared", "per_head"])
def test_random_traces(granularity):
    rng = np.random.default_rng(0)
    cache, appended, forked = make(granularity), 0, 0
    for _ in range(60):
        rows = rng.permutation(np.arange(1, 6))[:LANES].astype(np.int32)
        length = np.asarray(cache.table.length)[0, rows, 0]
        if rng.random() < 0.3:
            cache = release(cache, np.where(rng.random(LANES) < 0.6, rows, 0))
        elif length[0] and not length[1]:
            source, target = (np.asarray([row, 0, 0], np.int32) for row in rows[:2])
            count = np.asarray([rng.integers(1, length[0] + 1), 0, 0], np.int32)
            cache, ok = fork(cache, source, target, count)
            forked += int(ok)
            # A row that was forked is appended to before anything reads it.
            cache, ok = extend(cache, target, np.asarray([1, 0, 0], np.int32), keys(rng))
            if not ok:
                cache = release(cache, target)
        else:
            counts = rng.choice([0, 1, 3, LONGEST], LANES).astype(np.int32)
            cache, ok = extend(cache, rows, counts, keys(rng))
            appended += int(ok)
        check(cache)
    assert appended > 8
    assert forked > 2


def test_the_layout_counts_them():
    with_bounds = make("shared")
    without = init_cache(
        CacheLayout(
            num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, num_pages=40, max_rows=5, max_slots=24, page_size=PAGE,
            dtype=jnp.float32,
        )
    )  # fmt: skip
    assert without.pool.bounds is None
    for cache in (with_bounds, without):
        assert cache.layout.bytes() == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
