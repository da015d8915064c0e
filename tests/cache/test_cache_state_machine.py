"""Random traces of all cache operations, exhaustion included, against a plain-Python cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_oracle import Oracle, check_contents, check_invariants, check_usage, key_value, token_position
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from sparsejax.cache import (
    CacheLayout,
    KVCache,
    allocate,
    append,
    compact,
    drop_dead_pages,
    fork,
    init_cache,
    release,
    repack,
    row_usage,
    slot_mapping,
    slots_at,
    stamp,
)

LANES = 3  # rows that one call names; the rest of them are padding
LAYERS, HEADS, HEAD_DIM, ROWS = 2, 2, 4, 4
MAX_SLOTS = {1: 10, 4: 22, 32: 70}
MAX_NEW = {1: 5, 4: 9, 32: 40}
GRANULARITIES = ("shared", "per_layer", "per_head")


def tiny_layout(page_size: int, granularity) -> CacheLayout:
    """Room for about half of what the rows could hold, so that traces run out of entries; one page is left over."""
    tables = {"shared": 1, "per_layer": LAYERS, "per_head": LAYERS * HEADS}[granularity]
    columns = -(-MAX_SLOTS[page_size] // page_size)
    return CacheLayout(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        num_pages=(1 + tables * (2 * columns + 1)) * (LAYERS * HEADS // tables) + 1,
        max_rows=ROWS,
        max_slots=MAX_SLOTS[page_size],
        page_size=page_size,
        granularity=granularity,
        dtype=jnp.float32,
        with_score=True,
        with_position=True,
    )


def append_tokens(cache: KVCache, rows, count, token_rows, back, k, v, position, *, max_count: int):
    """What a step does: allocate, write every layer, start the records. Then the scores get recognisable values."""
    cache, ok = allocate(cache, rows, count, max_count=max_count)
    # A refused allocation leaves nothing to write to: a step must turn all its tokens into padding.
    mapping = slot_mapping(cache, jnp.where(ok, token_rows, 0), back)
    for layer in range(cache.layout.num_layers):
        cache = append(cache, layer, mapping, k[layer], v[layer])
    return scored_by_key(stamp(cache, mapping, position)), ok


def scored_by_key(cache: KVCache) -> KVCache:
    pool = cache.pool
    scored = type(pool)(k=pool.k, v=pool.v, score=pool.k[..., 0], position=pool.position)
    return KVCache(pool=scored, table=cache.table, free=cache.free, layout=cache.layout)


def decode_token(cache: KVCache, rows, count, slot, k, v, position):
    """A decode step after per-step eviction. count, slot: i32[Lt, K, Ht]; a table's slot is a dead one or a new one."""
    cache, ok = allocate(cache, rows, count, max_count=1)
    mapping = slots_at(cache, jnp.where(ok, rows, 0), slot)
    for layer in range(cache.layout.num_layers):
        cache = append(cache, layer, mapping, k[layer], v[layer])
    return scored_by_key(stamp(cache, mapping, position)), ok


def mark_dead(cache: KVCache, rows, slot):
    """rows i32[T], slot i32[Lt, T, Ht], negative for none."""
    return scored_by_key(stamp(cache, slots_at(cache, rows, slot), jnp.full_like(rows, -1)))


# Compiling takes longer than all the steps together, so the compiler is told not to try hard.
QUICK = {"xla_backend_optimization_level": 0}
JITTED_APPEND = jax.jit(append_tokens, donate_argnums=0, static_argnames="max_count", compiler_options=QUICK)
JITTED_FORK = jax.jit(fork, donate_argnums=0, compiler_options=QUICK)
JITTED_COMPACT = jax.jit(compact, donate_argnums=0, compiler_options=QUICK)
JITTED_DECODE = jax.jit(decode_token, donate_argnums=0, compiler_options=QUICK)
JITTED_MARK_DEAD = jax.jit(mark_dead, donate_argnums=0, compiler_options=QUICK)
JITTED_REPACK = jax.jit(repack, donate_argnums=0, static_argnames="max_keep", compiler_options=QUICK)
JITTED_DROP = jax.jit(drop_dead_pages, donate_argnums=0, static_argnames="max_slots", compiler_options=QUICK)
JITTED_USAGE = jax.jit(row_usage, static_argnames="max_slots", compiler_options=QUICK)
JITTED_RELEASE = jax.jit(release, donate_argnums=0, compiler_options=QUICK)


def padded(values, fill=0):
    return np.asarray(list(values) + [fill] * (LANES - len(values)), np.int32)


DISTINCT_ROWS = st.lists(st.integers(1, ROWS), min_size=1, max_size=LANES, unique=True)
DENSITY = st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])
SEED = st.integers(0, 2**16)


class CacheMachine(RuleBasedStateMachine):
    """Both caches take the same steps; after each of them they must agree in everything."""

    page_size: int
    granularity: str

    def __init__(self):
        super().__init__()
        self.layout = tiny_layout(self.page_size, self.granularity)
        self.max_new = MAX_NEW[self.page_size]
        # A bound that no row exceeds, unlike max_slots, which is not a whole number of pages.
        self.capacity = self.layout.max_entries_per_row * self.page_size
        self.cache = init_cache(self.layout)
        self.oracle = Oracle(self.layout)
        self.next_token = 1

    def extend(self, rows: list[int], counts: list[int]) -> bool:
        new = []
        for count in counts:
            new.append(list(range(self.next_token, self.next_token + count)))
            self.next_token += count
        size = LANES * self.max_new
        tokens, token_rows, back = (np.zeros(size, np.int32) for _ in range(3))
        at = 0
        for row, numbers in zip(rows, new, strict=True):
            here = slice(at, at + len(numbers))
            tokens[here], token_rows[here], back[here] = numbers, row, np.arange(len(numbers), 0, -1)
            at += len(numbers)
        contents = [key_value(tokens[:, None], layer, np.arange(HEADS), HEAD_DIM) for layer in range(LAYERS)]
        k, v = (np.stack(arrays) for arrays in zip(*contents, strict=True))
        # Padding tokens carry NaN: should one be written to a live slot, the comparison sees it.
        k[:, at:], v[:, at:] = np.nan, np.nan
        position = token_position(tokens).astype(np.int32)
        self.cache, ok = JITTED_APPEND(
            self.cache, padded(rows), padded(counts, 7), token_rows, back, k, v, position, max_count=self.max_new
        )
        assert bool(ok) == self.oracle.append(rows, new)
        return bool(ok)

    @rule(rows=DISTINCT_ROWS, data=st.data())
    def append(self, rows, data):
        self.extend(rows, [data.draw(st.integers(0, self.max_new)) for _ in rows])

    @rule(rows=DISTINCT_ROWS)
    def fill(self, rows):
        """Grows rows until something runs out, then by single tokens until nothing at all fits."""
        for row in rows:
            while self.extend([row], [self.max_new]):
                pass
            while self.extend([row], [1]):
                pass

    @rule(data=st.data())
    def fork(self, data):
        empty = [row for row in range(1, ROWS + 1) if self.oracle.is_empty(row)]
        # Now and then a target that is not empty: the call must refuse.
        candidates = st.sampled_from([*empty, 1] if empty else [1])
        target = data.draw(st.lists(candidates, min_size=1, max_size=LANES, unique=True))
        source = [data.draw(st.integers(0, ROWS)) for _ in target]
        count = [data.draw(st.integers(0, self.layout.max_slots)) for _ in target]
        self.cache, ok = JITTED_FORK(self.cache, padded(source, 1), padded(target), padded(count, 3))
        assert bool(ok) == self.oracle.fork(source, target, count)

    @rule(source=st.integers(1, ROWS), data=st.data())
    def share_and_compact(self, source, data):
        """Makes sharing certain: an emptied row takes over this one's full pages, then one or both are compacted."""
        target = source % ROWS + 1
        self.release([target])
        self.extend([source], [self.max_new])
        self.cache, ok = JITTED_FORK(self.cache, padded([source]), padded([target]), padded([self.layout.max_slots]))
        assert bool(ok) == self.oracle.fork([source], [target], [self.layout.max_slots])
        self.agrees_with_the_oracle()
        rows = data.draw(st.sampled_from([[source], [target], [source, target]]))
        self.compact(rows, data.draw(DENSITY), data.draw(SEED), data.draw(st.booleans()))

    @rule(rows=DISTINCT_ROWS, density=DENSITY, seed=SEED, prefix=st.booleans())
    def evict(self, rows, density, seed, prefix):
        self.compact(rows, density, seed, prefix)

    def compact(self, rows, density, seed, prefix):
        lanes = (self.layout.table_layers, LANES, self.layout.table_heads)
        bound = self.layout.max_slots
        keep = np.random.default_rng(seed).random((*lanes, bound)) < density
        if prefix:
            # Cuts the tail off: no holes, but a shared page may become the partial last one.
            cut = np.random.default_rng(seed).integers(0, bound + 1, lanes)
            keep = np.arange(bound) < cut[..., None]
        self.cache, ok = JITTED_COMPACT(self.cache, padded(rows), keep)
        assert bool(ok) == self.oracle.compact(rows, keep)

    @rule(rows=DISTINCT_ROWS, density=DENSITY, seed=SEED)
    def repack(self, rows, density, seed):
        lanes = (self.layout.table_layers, LANES, self.layout.table_heads)
        keep = np.random.default_rng(seed).random((*lanes, self.layout.max_slots)) < density
        self.cache, ok = JITTED_REPACK(self.cache, padded(rows), keep)
        assert bool(ok) == self.oracle.repack(rows, keep)

    @rule(row=st.integers(1, ROWS), density=DENSITY, seed=SEED)
    def mark_dead(self, row, density, seed):
        """Evicts by marks, in pages that are the row's own."""
        rng, bound = np.random.default_rng(seed), self.capacity
        slot = np.full((self.layout.table_layers, bound, self.layout.table_heads), -1, np.int32)
        for tl, ht in self.oracle.tables:
            victims = [s for s in self.oracle.own_slots(tl, row, ht, dead=False) if rng.random() < density]
            slot[tl, : len(victims), ht] = victims
            self.oracle.kill(tl, row, ht, victims)
        self.cache = JITTED_MARK_DEAD(self.cache, np.full(bound, row, np.int32), slot)

    @rule(rows=DISTINCT_ROWS)
    def drop_dead_pages(self, rows):
        self.cache = JITTED_DROP(self.cache, padded(rows), max_slots=self.capacity)
        self.oracle.drop_dead(rows)

    @rule(row=st.integers(1, ROWS), seed=SEED)
    def decode_over_dead_slots(self, row, seed):
        """A token takes a dead slot in some tables and a new one in the others, which alone allocate."""
        rng = np.random.default_rng(seed)
        token, self.next_token = self.next_token, self.next_token + 1
        shape = (self.layout.table_layers, LANES, self.layout.table_heads)
        count, slot, reused = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), {}
        count[:, 1:] = 1
        for tl, ht in self.oracle.tables:
            dead = self.oracle.own_slots(tl, row, ht, dead=True)
            if dead and rng.random() < 0.8:
                reused[tl, ht] = int(rng.choice(dead))
            count[tl, 0, ht] = (tl, ht) not in reused
            slot[tl, 0, ht] = reused.get((tl, ht), self.oracle.length(tl, row, ht))
        contents = [key_value(np.full((LANES, 1), token), layer, np.arange(HEADS), HEAD_DIM) for layer in range(LAYERS)]
        k, v = (np.stack(arrays) for arrays in zip(*contents, strict=True))
        position = np.full(LANES, token_position(token), np.int32)
        self.cache, ok = JITTED_DECODE(self.cache, padded([row]), count, slot, k, v, position)
        assert bool(ok) == self.oracle.decode(row, token, reused)

    @rule(rows=st.lists(st.integers(0, ROWS), min_size=1, max_size=LANES))
    def finish(self, rows):
        self.release(rows)

    def release(self, rows):
        self.cache = JITTED_RELEASE(self.cache, padded(rows))
        self.oracle.release([row for row in rows if row])

    @rule()
    def release_all(self):
        for rows in ([1, 2, 3], [4, 0, 0]):
            self.cache = JITTED_RELEASE(self.cache, padded(rows))
        self.oracle.release(list(range(1, ROWS + 1)))
        assert int(self.cache.free.count) == self.layout.num_entries - 1
        assert not np.asarray(self.cache.free.references).any()

    @invariant()
    def agrees_with_the_oracle(self):
        check_invariants(self.cache)
        check_contents(self.cache, self.oracle)
        check_usage(JITTED_USAGE(self.cache, max_slots=self.capacity), self.oracle)


@functools.cache
def machine(page_size: int, granularity: str):
    return type("Machine", (CacheMachine,), {"page_size": page_size, "granularity": granularity})


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("page_size", [1, 4, 32])
def test_random_traces(page_size, granularity):
    run_state_machine_as_test(
        machine(page_size, granularity),
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
