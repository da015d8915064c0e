"""Both ways to choose victims against sorting in plain Python."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import scan_pages
from sparsejax.engine.programs.victims import count_pages, evict_few, evict_many
from sparsejax.methods.protection import priorities

SHAPE, PAGE = (2, 3, 2, 24), 4
SINKS, RECENT = 2, 3  # protected positions


def random_slots(seed):
    """Live, dead and unused slots, protected ones among them; scores with ties, NaN and infinities."""
    rng = np.random.default_rng(seed)
    used = np.arange(SHAPE[-1]) < rng.integers(0, SHAPE[-1] + 1, SHAPE[:-1])[..., None]
    live = used & (rng.random(SHAPE) < 0.8)
    position = np.where(live, np.argsort(rng.random(SHAPE), axis=-1), -1).astype(np.int32)
    protected = live & ((position < SINKS) | (position >= SHAPE[-1] - RECENT))
    score = rng.choice(np.float32([0, -0.0, 1, 2, -3, np.inf, -np.inf, np.nan]), SHAPE)
    slots = SimpleNamespace(live=live, position=position, protected=protected, page_size=PAGE)
    excess = rng.integers(0, 7, SHAPE[:-1]).astype(np.int32)
    return slots, used, score, excess


def sorted_victims(slots, score, count):
    """bool: the `count` unprotected live slots of lowest score, NaN below all, the older of equals first."""
    victims = np.zeros(SHAPE, bool)
    largest = np.finfo(np.float32).max
    for table in np.ndindex(*SHAPE[:-1]):
        free = np.flatnonzero(slots.live[table] & ~slots.protected[table])
        bounded = np.clip(score[table], -largest, largest)
        order = np.lexsort([slots.position[table], np.nan_to_num(bounded, nan=-np.inf)])
        victims[table][[slot for slot in order if slot in free][: count[table]]] = True
    return victims


def scan_of(slots, used, score):
    """The pages of all tables, one after the other."""
    pages = jnp.arange(np.prod(SHAPE) // PAGE, dtype=jnp.int32).reshape(*SHAPE[:-1], -1)
    length = jnp.sum(used, axis=-1, dtype=jnp.int32)
    sinks, last = jnp.full_like(length, SINKS), jnp.full_like(length, SHAPE[-1] - RECENT)
    return scan_pages(jnp.asarray(slots.position).reshape(-1, PAGE), jnp.asarray(score), pages, length, sinks, last)


@functools.cache
def few(most):
    def choose(live, position, protected, used, score, excess):
        slots = SimpleNamespace(live=live, position=position, protected=protected, page_size=PAGE)
        return evict_few(scan_of(slots, used, score), score, slots, excess, most=most).slot

    return jax.jit(choose)


@pytest.mark.parametrize("most", [1, 5])
def test_few(most):
    for seed in range(15):
        slots, used, score, excess = random_slots(seed)
        chosen = np.asarray(few(most)(slots.live, slots.position, slots.protected, used, score, excess))
        victims = np.zeros(SHAPE, bool)
        for table in np.ndindex(*SHAPE[:-1]):
            here = chosen[table][chosen[table] >= 0]
            assert len(set(here)) == len(here)
            victims[table][here] = True
        np.testing.assert_array_equal(victims, sorted_victims(slots, score, np.minimum(excess, most)))


def test_many():
    for seed in range(15):
        slots, used, score, excess = random_slots(seed)
        chosen = evict_many(priorities(score, slots.live, slots.protected), slots, used, excess)
        np.testing.assert_array_equal(chosen.marks, sorted_victims(slots, score, excess))


def test_both_kinds_of_victims_count_and_mark_alike():
    slots, used, score, excess = random_slots(3)
    priority = priorities(score, slots.live, slots.protected)
    one = evict_few(scan_of(slots, used, score), score, slots, excess, most=6)
    many = evict_many(priority, slots, used, excess)
    rows, columns = np.array([True, False, True]), SHAPE[-1] // PAGE
    before = count_pages(slots.live, used, PAGE)
    entries = 1 + jnp.arange(np.prod(SHAPE[:-1]) * columns).reshape(*SHAPE[:-1], columns)
    position = jnp.asarray(slots.position).reshape(-1, PAGE)
    position = jnp.concatenate([jnp.zeros((1, PAGE), jnp.int32), position])
    for a, b in ((one, many), (one.among(rows), many.among(rows))):
        np.testing.assert_array_equal(a.mask(SHAPE[-1]), b.mask(SHAPE[-1]))
        np.testing.assert_array_equal(a.count(), b.count())
        np.testing.assert_array_equal(a.pages(columns), b.pages(columns))
        for x, y in zip(vars(a.counts_after(before)).values(), vars(b.counts_after(before)).values(), strict=True):
            np.testing.assert_array_equal(np.minimum(x, PAGE), np.minimum(y, PAGE))
        marked = np.asarray(a.mark(position, entries))
        np.testing.assert_array_equal(marked, b.mark(position, entries))
        np.testing.assert_array_equal(
            marked[1:].reshape(SHAPE), np.where(np.asarray(a.mask(SHAPE[-1])), -1, slots.position)
        )
    assert int(one.among(rows).count()[:, 1].sum()) == 0 < int(one.count()[:, 1].sum())


def test_pages_that_victims_leave_empty_are_named_once():
    for seed in range(15):
        slots, used, score, excess = random_slots(seed)
        victims = evict_few(scan_of(slots, used, score), score, slots, excess, most=6)
        before = count_pages(slots.live, used, PAGE)
        after = victims.counts_after(before)
        columns = np.asarray(victims.emptied(after))
        for table in np.ndindex(*SHAPE[:-1]):
            named = [column for column in columns[table] if column >= 0]
            emptied = np.flatnonzero((np.asarray(before.live[table]) > 0) & (np.asarray(after.live[table]) == 0))
            assert sorted(named) == emptied.tolist()
