"""Per-step eviction: the four strategies against one another and against a plain-Python policy, on random scores."""

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.cache import CacheLayout, allocate, append, fork, init_cache, release, repack, slots_at, stamp
from sparsejax.engine.programs.eviction import EvictBatch, EvictLane, EvictSpec, evict_step
from sparsejax.methods import get
from sparsejax.methods.base import Method

LAYERS, HEADS, HEAD_DIM, PAGE, ROWS = 2, 2, 4, 4, 3
TABLES = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
STRATEGIES = ("reuse", "free_block", "sparse_copy", "no_op")
MAX_SLOTS = 48
SLOT_BYTES = 2 * HEAD_DIM * 4 + 8


@dataclass(frozen=True)
class Recorded(Method):
    """The score as the decode steps recorded it."""

    name: ClassVar[str] = "recorded"
    summary: ClassVar[str] = "The recorded score."
    evicts_per_step: ClassVar[bool] = True

    def scores(self, slots):
        return slots.score


LAYOUT = CacheLayout(
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    num_pages=160,
    max_rows=ROWS,
    max_slots=MAX_SLOTS,
    page_size=PAGE,
    granularity="per_head",
    dtype=jnp.float32,
    with_score=True,
    with_position=True,
)

# The programs run a few times each, so the compiler is told not to try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def decode(cache, hole, rows, position):
    """What a decode step does to the cache: each table's token goes to its hole, or to its end."""
    append_here = hole[:, rows] < 0
    cache, ok = allocate(cache, rows, append_here.astype(jnp.int32), max_count=1)
    slot = jnp.where(append_here, cache.table.length[:, rows] - 1, hole[:, rows])
    mapping = slots_at(cache, jnp.where(ok, rows, 0), slot)
    k = jnp.broadcast_to(position.astype(jnp.float32)[:, None, None], (rows.shape[0], HEADS, HEAD_DIM))
    for layer in range(LAYERS):
        cache = append(cache, layer, mapping, k, -k)
    return stamp(cache, mapping, position), ok


@functools.cache
def compiled(strategy, num_per_evict=1, bulk=False, max_slots=MAX_SLOTS):
    spec = EvictSpec(
        method=Recorded(),
        strategy=strategy,
        max_slots=max_slots,
        num_query_heads=HEADS,
        num_per_evict=num_per_evict,
        bulk=bulk,
    )
    return jit(functools.partial(evict_step, spec=spec))


def ints(*values):
    return np.asarray(values, np.int32)


def empty_holes():
    return jnp.full((LAYERS, ROWS + 1, HEADS), -1, jnp.int32)


def batch_of(rows, budget, text_length, sinks=0, recent=1):
    each = np.broadcast_arrays(rows, budget, text_length, sinks, recent, text_length, 0)
    return EvictBatch.of([EvictLane(*lane) for lane in np.transpose(each).tolist()], len(rows))


def logical(cache, row, layer, head):
    """(position, score, K) of the used slots of a table, dead ones included, in their order."""
    slot = np.arange(int(cache.table.length[layer, row, head]))
    entry = np.asarray(cache.table.pages)[layer, row, head, slot // PAGE]
    where = (entry, slot % PAGE)
    return tuple(np.asarray(array)[where] for array in (cache.pool.position, cache.pool.score, cache.pool.k))


def live_positions(cache, row, layer, head):
    position, _, k = logical(cache, row, layer, head)
    live = position >= 0
    # What a live slot holds is the token that its position says.
    np.testing.assert_array_equal(k[live], np.repeat(position[live, None], HEAD_DIM, axis=1))
    return sorted(position[live].tolist())


def record(cache, gain):
    """Adds gain[layer, row, head, position] to the score of every live slot of the rows."""
    score = np.array(cache.pool.score)
    pages, length = np.asarray(cache.table.pages), np.asarray(cache.table.length)
    for row in range(1, ROWS + 1):
        for layer, head in TABLES:
            slot = np.arange(length[layer, row, head])
            where = (pages[layer, row, head, slot // PAGE], slot % PAGE)
            position = np.asarray(cache.pool.position)[where]
            score[where] += np.where(position >= 0, gain[layer, row, head, position], 0)
    return dataclasses.replace(cache, pool=dataclasses.replace(cache.pool, score=jnp.asarray(score)))


def check_pages(cache):
    """Every page has one owner or is free, a table holds exactly the pages that its slots need."""
    pages, length = np.asarray(cache.table.pages), np.asarray(cache.table.length)
    owned = pages[pages > 0]
    assert len(set(owned)) == len(owned)
    free = np.asarray(cache.free.stack)[: int(cache.free.count)]
    assert sorted([*owned, *free]) == list(range(1, LAYOUT.num_entries))
    np.testing.assert_array_equal((pages > 0).sum(axis=-1), -(-length // PAGE))


@dataclass
class Request:
    """One request of the trace, and the policy in plain Python: what its tables must hold."""

    row: int
    prompt: int
    budget: int
    sinks: int
    recent: int
    length: int = 0
    held: dict = field(default_factory=lambda: {table: {} for table in TABLES})

    def receive(self, gain):
        for (layer, head), scores in self.held.items():
            scores[self.length] = np.float32(0)
            for position in scores:
                scores[position] += gain[layer, self.row, head, position]
        self.length += 1

    def evict(self, num_per_evict):
        for scores in self.held.values():
            excess = len(scores) - (self.budget - num_per_evict + 1) if len(scores) > self.budget else 0
            free = [p for p in scores if self.sinks <= p < self.length - self.recent]
            for position in sorted(free, key=lambda p: (scores[p], p))[:excess]:
                del scores[position]


def requests():
    """One below its budget to begin with, one far above, and a lane of padding beside them."""
    return [
        Request(row=1, prompt=5, budget=8, sinks=1, recent=3),
        Request(row=3, prompt=15, budget=6, sinks=0, recent=2),
    ]


def run(strategy, num_per_evict, steps, seed=0, cache=None):
    """Prompts token by token, then `steps` decode steps with eviction. Returns what each step left and reported."""
    rng = np.random.default_rng(seed)
    cache = init_cache(LAYOUT) if cache is None else cache
    hole, trace, batch = empty_holes(), [], requests()
    for step in range(-max(r.prompt for r in batch), steps):
        active = [r for r in batch if r.prompt + step >= 0]
        rows = [r.row if r in active else 0 for r in batch] + [0]
        # Few values, so that equal scores are common.
        gain = rng.integers(0, 3, (LAYERS, ROWS + 1, HEADS, MAX_SLOTS)).astype(np.float32)
        before = {(r.row, *t): logical(cache, r.row, *t)[0] for r in active for t in TABLES}
        cache, ok = decode(cache, hole, ints(*rows), ints(*(r.length for r in batch), 0))
        assert ok
        check_writes(cache, np.asarray(hole), before, active)
        for request in active:
            request.receive(gain)
        cache = record(cache, gain)
        if step < 0:
            continue
        # The first step after the prompts finds the second request far over budget.
        evict = compiled(strategy, num_per_evict, bulk=step == 0)
        arguments = batch_of(
            rows,
            [*(r.budget for r in batch), 1],
            [*(r.length for r in batch), 0],
            ints(*(r.sinks for r in batch), 0),
            ints(*(r.recent for r in batch), 0),
        )
        pages_before = [pages_of(cache, r.row) for r in batch]
        cache, hole, report = evict(cache, hole, arguments)
        assert np.asarray(report.ok).all()
        for request in batch:
            request.evict(num_per_evict)
        check_step(cache, np.asarray(hole), report, batch, strategy, pages_before)
        trace.append((report, {(r.row, *t): live_positions(cache, r.row, *t) for r in batch for t in TABLES}))
    return cache, trace


def pages_of(cache, row):
    return int((np.asarray(cache.table.pages)[:, row] > 0).sum())


def check_writes(cache, hole, before, active):
    """A token goes to the hole if there is one, which was dead and starts afresh; only else does the table grow."""
    for request in active:
        for layer, head in TABLES:
            old = before[request.row, layer, head]
            position, score, _ = logical(cache, request.row, layer, head)
            slot = hole[layer, request.row, head]
            if slot >= 0:
                assert slot == np.flatnonzero(old < 0)[0]
            else:
                slot = len(old)
            assert len(position) == max(len(old), slot + 1)
            assert position[slot] == request.length
            assert score[slot] == 0
            np.testing.assert_array_equal(np.delete(position, slot), np.delete(old, slot) if slot < len(old) else old)


def check_step(cache, hole, report, batch, strategy, pages_before):
    check_pages(cache)
    assert (hole[:, 0] == -1).all()
    for lane, request in enumerate(batch):
        assert int(report.pages[lane]) == pages_of(cache, request.row)
        assert int(report.active[lane]) == sum(len(scores) for scores in request.held.values())
        assert 0 <= 1 - int(report.active[lane]) / (int(report.pages[lane]) * PAGE) <= 1
        if strategy == "no_op":
            assert int(report.pages[lane]) == pages_before[lane]
        for layer, head in TABLES:
            position, score, _ = logical(cache, request.row, layer, head)
            scores = request.held[layer, head]
            assert int(report.live[layer, lane, head]) == len(scores)
            assert live_positions(cache, request.row, layer, head) == sorted(scores)
            assert {int(p): s for p, s in zip(position, score, strict=True) if p >= 0} == scores
            # Budget and protection.
            assert len(scores) <= request.budget
            newest = range(request.length - request.recent, request.length)
            assert {*newest, *range(min(request.sinks, request.length))} <= scores.keys()
            # The places of the dead.
            dead = np.flatnonzero(position < 0)
            assert hole[layer, request.row, head] == (dead[0] if strategy == "reuse" and len(dead) else -1)
            if strategy == "sparse_copy":
                assert not len(dead)
            elif strategy != "no_op":
                for start in range(0, len(position), PAGE):
                    assert (position[start : start + PAGE] >= 0).any()
    assert int(report.pages[-1]) == int(report.active[-1]) == 0


@pytest.fixture
def many_are_two(monkeypatch):
    """Victims are marked, not named, where a step may take more than one."""
    monkeypatch.setattr("sparsejax.engine.programs.eviction.MOST_FEW", 1)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.parametrize("num_per_evict", [1, 3, 5])
def test_strategies_keep_the_same_tokens(num_per_evict):
    """Each against the policy, at every step, and their pages against one another."""
    check_strategies(num_per_evict)


@pytest.mark.usefixtures("many_are_two")
def test_marked_victims_are_those_of_the_policy():
    check_strategies(num_per_evict=4)


@pytest.mark.usefixtures("many_are_two")
def test_no_more_are_marked_than_asked_for():
    cache, _, report = compiled("free_block", 3)(filled(12), empty_holes(), batch_of([1, 0, 0], [7, 1, 1], [12, 0, 0]))
    assert np.asarray(report.ok).tolist() == [False, True, True]
    assert live_positions(cache, 1, 0, 0) == list(range(3, 12))


def check_strategies(num_per_evict):
    steps = 22
    traces = {strategy: run(strategy, num_per_evict, steps)[1] for strategy in STRATEGIES}
    for step in range(steps):
        reports = {strategy: trace[step][0] for strategy, trace in traces.items()}
        tokens = [trace[step][1] for trace in traces.values()]
        assert all(held == tokens[0] for held in tokens)
        pages = {strategy: np.asarray(report.pages) for strategy, report in reports.items()}
        assert all(
            (pages["sparse_copy"] <= other).all() and (other <= pages["no_op"]).all() for other in pages.values()
        )
        least = [sum(math.ceil(len(tokens[0][row, *t]) / PAGE) for t in TABLES) for row in (1, 3)]
        assert pages["sparse_copy"][:2].tolist() == least
        for strategy in ("free_block", "no_op"):
            assert float(reports[strategy].copied_bytes) == 0
        # Only the bulk eviction after the prompt compacts.
        assert (float(reports["reuse"].copied_bytes) > 0) == (step == 0)
        evicted = step == 0 or any(len(tokens[0][key]) <= len(traces["no_op"][step - 1][1][key]) for key in tokens[0])
        assert (float(reports["sparse_copy"].copied_bytes) > 0) == evicted


def test_one_in_one_out_needs_no_page_and_no_copy():
    _, trace = run("reuse", 1, 22)
    # From the fifth step on both requests are at their budgets, B, and hold B + 1 while they attend. A budget of whole
    # pages overflows by a page of one slot, which goes when its token does; the other request's pages never change.
    for report, _ in trace[5:]:
        assert int(report.pages[0]) <= len(TABLES) * math.ceil((8 + 1) / PAGE)
        assert int(report.pages[1]) == len(TABLES) * math.ceil((6 + 1) / PAGE)
    assert all(float(report.copied_bytes) == 0 for report, _ in trace[5:])


def test_a_request_starts_afresh_in_a_used_row():
    """Nothing of an earlier request in its rows, dead slots and scores included, shows in the next one."""
    cache, first = run("reuse", 1, 8, seed=1)
    _, again = run("reuse", 1, 8, seed=1, cache=jit(release)(cache, ints(1, 3)))
    assert [held for _, held in again] == [held for _, held in first]


# What is refused, and said so.


def filled(tokens, row=1):
    """A cache with one row of `tokens` tokens, of rising score."""
    cache = init_cache(LAYOUT)
    for position in range(tokens):
        cache, _ = decode(cache, empty_holes(), ints(row, 0, 0), ints(position, 0, 0))
    gain = np.broadcast_to(np.arange(MAX_SLOTS, dtype=np.float32), (LAYERS, ROWS + 1, HEADS, MAX_SLOTS))
    return record(cache, gain)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_more_than_one_call_can_evict_is_reported():
    cache = filled(12)
    batch = batch_of([1, 0, 0], [8, 1, 1], [12, 0, 0])
    cache, hole, report = compiled("reuse")(cache, empty_holes(), batch)
    assert np.asarray(report.ok).tolist() == [False, True, True]
    assert live_positions(cache, 1, 0, 0) == list(range(1, 12))
    assert int(hole[0, 1, 0]) == 0


def test_bulk_copies_what_it_says():
    cache = filled(12)
    batch = batch_of([1, 0, 0], [5, 1, 1], [12, 0, 0])
    after, hole, report = compiled("reuse", bulk=True)(cache, empty_holes(), batch)
    assert np.asarray(report.ok).all()
    assert live_positions(after, 1, 1, 1) == list(range(7, 12))
    assert (np.asarray(hole) == -1).all()
    # All five survivors lay behind the first five slots.
    assert float(report.copied_bytes) == 5 * len(TABLES) * SLOT_BYTES
    after, _, report = compiled("sparse_copy")(cache, empty_holes(), batch_of([1, 0, 0], [11, 1, 1], [12, 0, 0]))
    assert float(report.copied_bytes) == 11 * len(TABLES) * SLOT_BYTES


@pytest.mark.parametrize("strategy", ["reuse", "free_block", "no_op"])
def test_victims_in_shared_pages_stay_until_the_row_is_its_own(strategy):
    cache, ok = jit(fork)(filled(12), ints(1, 0, 0), ints(2, 0, 0), ints(12, 0, 0))
    assert ok
    batch = batch_of([2, 0, 0], [11, 1, 1], [12, 0, 0])
    after, hole, report = compiled(strategy)(cache, empty_holes(), batch)
    assert np.asarray(report.ok).tolist() == [False, True, True]
    assert_same((after, hole), (cache, empty_holes()))
    cache, ok = jit(repack)(cache, ints(2, 0, 0), np.ones((LAYERS, 3, HEADS, MAX_SLOTS), bool))
    assert ok
    after, hole, report = compiled(strategy)(cache, empty_holes(), batch)
    assert np.asarray(report.ok).all()
    assert live_positions(after, 2, 0, 0) == list(range(1, 12))
    assert live_positions(after, 1, 0, 0) == list(range(12))


def test_sparse_copy_waits_for_free_pages():
    cache = filled(12)
    scarce = dataclasses.replace(cache.free, count=jnp.asarray(3 * len(TABLES) - 1, jnp.int32))
    cache = dataclasses.replace(cache, free=scarce)
    after, _, report = compiled("sparse_copy")(cache, empty_holes(), batch_of([1, 0, 0], [11, 1, 1], [12, 0, 0]))
    assert np.asarray(report.ok).tolist() == [False, True, True]
    assert int(report.active[0]) == 12 * len(TABLES)
    assert float(report.copied_bytes) == 0
    assert_same(after, cache)


def test_a_row_longer_than_the_bound_is_left_alone():
    cache = filled(12)
    after, _, report = compiled("reuse", max_slots=8)(cache, empty_holes(), batch_of([1, 0, 0], [4, 1, 1], [12, 0, 0]))
    assert np.asarray(report.ok).tolist() == [False, True, True]
    assert_same(after, cache)


def test_protection_outranks_the_budget():
    cache = filled(12)
    batch = batch_of([1, 0, 0], [4, 1, 1], [12, 0, 0], sinks=ints(3, 0, 0), recent=ints(5, 0, 0))
    after, _, report = compiled("no_op", bulk=True)(cache, empty_holes(), batch)
    assert np.asarray(report.ok).all()
    assert live_positions(after, 1, 1, 0) == [0, 1, 2, 7, 8, 9, 10, 11]


def test_spec_is_checked():
    good = EvictSpec(method=Recorded(), strategy="reuse", max_slots=8, num_query_heads=2)
    with pytest.raises(ValueError, match=r"strategy must be one of \('reuse', .*\), got 'copy'"):
        dataclasses.replace(good, strategy="copy")
    with pytest.raises(ValueError, match="num_per_evict must be a positive int, got 0"):
        dataclasses.replace(good, num_per_evict=0)
    with pytest.raises(ValueError, match="method must evict per step, which 'snapkv' does not"):
        dataclasses.replace(good, method=get("snapkv")())
