"""What the cache tests share: a small cache whose keys tell its tokens apart, and compiled operations on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax.cache as kv
from sparsejax.cache import CacheLayout, init_cache

GRANULARITIES = ("shared", "per_layer", "per_head")
COLUMN = {"shared": 1, "per_layer": 2, "per_head": 4}


def make(granularity="shared", *, columns=6, max_rows=4, max_slots=16, page_size=4, records=True):
    """A cache whose pool backs `columns` pages of tokens in every table."""
    tables = COLUMN[granularity]
    layout = CacheLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=4,
        num_pages=(1 + columns * tables) * (4 // tables),
        max_rows=max_rows,
        max_slots=max_slots,
        page_size=page_size,
        granularity=granularity,
        dtype=jnp.float32,
        with_score=records,
        with_position=records,
    )
    return init_cache(layout)


LANES, SLOTS = 3, 16
# The programs run a few times each, so the compiler is told not to try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
append = jit(kv.append, static_argnums=1)
slot_mapping = jit(kv.slot_mapping)
stamp = jit(kv.stamp)
_allocate = jit(kv.allocate, static_argnames="max_count")
_admit_step = jit(lambda *args: _admit(*args))
_fork, _compact, _release = jit(kv.fork), jit(kv.compact), jit(kv.release)


def ints(*values):
    return np.asarray(values, np.int32)


def lanes(values, fill=0):
    """Pads to LANES rows with padding lanes, so that one compiled program serves all tests."""
    return ints(*values, *[fill] * (LANES - len(values)))


def allocate(cache, rows, count, **options):
    return _allocate(cache, lanes(rows), lanes(count, 5), **options)


def release(cache, rows):
    return _release(cache, lanes(rows))


def fork(cache, source, target, count):
    return _fork(cache, lanes(source, 1), lanes(target), lanes(count, 5))


def compact(cache, rows, keep):
    """keep: bool[Lt, K, Ht, S]; padding lanes are marked at random."""
    padding = np.random.default_rng(0).random((keep.shape[0], LANES - keep.shape[1], *keep.shape[2:])) < 0.5
    return _compact(cache, lanes(rows), np.concatenate([keep, padding], axis=1))


def _admit(cache, row, tokens):
    cache, ok = kv.allocate(cache, row[None], tokens[None])
    position = jnp.arange(SLOTS, dtype=jnp.int32)
    mapping = kv.slot_mapping(cache, jnp.where(position < tokens, row, 0), tokens - position)
    k = jnp.broadcast_to(position.astype(jnp.float32)[:, None, None], (SLOTS, 2, 4))
    for layer in range(2):
        cache = kv.append(cache, layer, mapping, k, -k)
    return kv.stamp(cache, mapping, position), ok


def admit(cache, row, tokens):
    """Adds `tokens` tokens to a row, whose K says which they are, in all layers and heads."""
    cache, ok = _admit_step(cache, np.int32(row), np.int32(tokens))
    assert ok
    return cache


def held(cache, row, layer=0, head=0):
    """The tokens of a row, by what their K says, in the order of their slots."""
    layout = cache.layout
    address = layout.address(layer)
    ht = head if layout.table_heads > 1 else 0
    slot = np.arange(int(cache.table.length[address.table_layer, row, ht]))
    entry = np.asarray(cache.table.pages)[address.table_layer, row, ht, slot // layout.page_size]
    return np.asarray(cache.pool.k)[address.page(entry, head), slot % layout.page_size, 0].astype(int).tolist()


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def keep_all(cache, rows, but=()):
    keep = np.ones((cache.layout.table_layers, rows, cache.layout.table_heads, SLOTS), bool)
    keep[..., list(but)] = False
    return keep
