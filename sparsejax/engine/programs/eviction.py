"""Eviction at every decode step, with four ways to treat the places of the victims (SpvLLM's "memory strategies").

    cache, hole, report = evict_step(cache, hole, batch, spec=spec)

runs after a decode step, for the rows whose method evicts per step. A table (one layer and KV head of a row) that holds
more live tokens than its budget B evicts those of lowest score until B - n + 1 are left, n = `num_per_evict`. With
n = 1 a token goes for each that comes and attention sees B + 1 tokens, with a larger n it happens every n-th step.
Sinks and recent tokens are protected, by position; of equal scores, the older token goes. Which tokens go does not
depend on the strategy, so all four give the same attention:

| strategy      | the victims' slots               | pages freed                     | the next token goes to       |
|---------------|----------------------------------|---------------------------------|------------------------------|
| "reuse"       | dead (position -1)               | those with no live slot         | the lowest dead slot, if any |
| "free_block"  | dead                             | those with no live slot         | the end                      |
| "sparse_copy" | gone: the rest moves to new ones | all old ones, after the copying | the end                      |
| "no_op"       | dead                             | none                            | the end                      |

A decode step after it writes the next token of a table to slot `hole` where that is not negative, and appends it
elsewhere; nothing is copied by "reuse". The step has to run after every decode step of such a row, evicting or not: it
is what names the next hole.

Source: SpvLLM (the strategies; "reuse" is its slot reuse). The scores are the method's, e.g. H2O (Zhang et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import Implementation, PageScan, scan_pages
from sparsejax.cache import KVCache, repack, row_usage
from sparsejax.cache.compact import compact_and_count
from sparsejax.engine.programs.victims import MOST_FEW, PageCounts, evict_few, evict_many
from sparsejax.methods.base import Method
from sparsejax.methods.protection import priorities
from sparsejax.methods.slots import Slots, gather_slots

Strategy = Literal["reuse", "free_block", "sparse_copy", "no_op"]

_NONE = int(jnp.iinfo(jnp.int32).max)


@dataclass(frozen=True)
class EvictSpec:
    """What is fixed when an evict step is compiled.

    Attributes:
      method: gives the scores; it must evict per step.
      strategy: "reuse", "free_block", "sparse_copy" or "no_op".
      max_slots: bound on the slots that a table of these rows holds, dead ones included.
      num_query_heads: query heads of the model.
      num_per_evict: n, tokens that a table evicts at once, at most its budget.
      bulk: tables may be over budget by more than n, as after a long prompt. Slower: it selects among all slots, as any
        n of more than `victims.MOST_FEW` does. With "reuse", rows that evict are then compacted: as holes, the victims'
        slots would be refilled one by one, and hold their pages until then.
      implementation: "triton", "xla" or None, handed to the kernels that scan and copy.

    Raises:
      ValueError: the strategy is unknown, a number is not a positive int, or the method does not evict per step.
    """

    method: Method
    strategy: Strategy
    max_slots: int
    num_query_heads: int
    num_per_evict: int = 1
    bulk: bool = False
    implementation: Implementation | None = None

    def __post_init__(self):
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {self.strategy!r}")
        for name in ("max_slots", "num_query_heads", "num_per_evict"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if not self.method.evicts_per_step:
            raise ValueError(f"method must evict per step, which {self.method.name!r} does not")

    @property
    def copies(self) -> bool:
        """Whether evicting copies tokens, instead of marking their slots dead."""
        return self.strategy == "sparse_copy" or (self.strategy == "reuse" and self.bulk)


class EvictLane(NamedTuple):
    """What an evict step is told of a row.

    Attributes:
      row: of the table; the null row 0 pads a batch.
      budget: B, live tokens that each table may keep.
      text_length: tokens of the text so far, evicted ones and the newest cached one included.
      sink_tokens, recent_tokens: first and last positions that are protected, even where they are more than B - n + 1.
      recorded: queries that added to the scores.
      seed: of the request, in [0, 2^32).
    """

    row: Any
    budget: Any
    text_length: Any
    sink_tokens: Any
    recent_tokens: Any
    recorded: Any
    seed: Any


@partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=[])
@dataclass(frozen=True)
class EvictBatch:
    """The rows of an evict step, K of them; distinct, except that the null row may repeat.

    Attributes:
      numbers: i32[7, K], those of `EvictLane`: one array, because each that goes to a GPU costs time at every step.
    """

    numbers: Any

    @classmethod
    def of(cls, lanes: Sequence[EvictLane], size: int) -> EvictBatch:
        """On the host, padded to `size` lanes."""
        numbers = np.zeros((len(EvictLane._fields), size), np.int32)
        if lanes:
            wide = np.array(lanes, np.int64)  # which holds seeds, too
            numbers[:, : len(lanes)] = wide.T.astype(np.uint32).view(np.int32)
        return cls(numbers)

    @property
    def lanes(self) -> EvictLane:
        """i32[K] each, the seed u32[K]."""
        lanes = EvictLane._make(self.numbers)
        return lanes._replace(seed=jax.lax.bitcast_convert_type(lanes.seed, jnp.uint32))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["copied_bytes", "live", "active", "pages", "active_before", "pages_before", "ok"],
    meta_fields=[],
)
@dataclass(frozen=True)
class EvictReport:
    """What an evict step did.

    Attributes:
      copied_bytes: f32[], bytes of keys, values, scores and positions that were copied.
      live: i32[L, K, H], live tokens of each table afterwards.
      active: i32[K], their sum over layers and heads.
      pages: i32[K], pages of each row afterwards, likewise.
      active_before, pages_before: i32[K] each, live tokens and pages of each row before it, likewise: what the decode
        step attended to.
      ok: bool[K], False where the row may still be over budget: it had more than n tokens too many and the spec is not
        bulk (n went), it holds more than max_slots, a victim lies in a page that other rows hold too and the strategy
        marks in place (`repack` with all kept makes a row its own), or the free entries did not suffice for the copies.
        In the last three cases nothing of the row was evicted.
    """

    copied_bytes: jax.Array
    live: jax.Array
    active: jax.Array
    pages: jax.Array
    active_before: jax.Array
    pages_before: jax.Array
    ok: jax.Array


def evict_step(
    cache: KVCache, hole: jax.Array, batch: EvictBatch, *, spec: EvictSpec
) -> tuple[KVCache, jax.Array, EvictReport]:
    """Evicts what K rows hold over their budgets. Reads scores and positions, no keys or values unless it copies them.

    Args:
      cache: with granularity "per_head", scores and positions. Donate it.
      hole: i32[L, R, H], by table row; overwritten at the batch's rows. It must be -1 for a row that starts a request.
      batch: the rows.
      spec: the policy and the strategy, static.

    Returns:
      The cache, the holes and the report.

    Raises:
      ValueError: the cache has no table per head, no scores or no positions.
    """
    lanes, page_size = batch.lanes, cache.layout.page_size
    rows = lanes.row
    slots = _view(cache, lanes, spec)
    num_pages, num_slots = slots.pages.shape[-1], slots.live.shape[-1]
    length = cache.table.length[:, rows]
    fits = jnp.all(length <= num_slots, axis=(0, 2))
    used = jnp.arange(num_slots, dtype=jnp.int32) < length[..., None]
    scores = spec.method.scores(slots)
    scan = _scan(cache, lanes, slots, scores, length, spec)
    before = PageCounts(scan.live, scan.dead)
    pages_before = row_usage(cache, rows).held
    active = jnp.sum(before.live, axis=-1)
    budget = lanes.budget[:, None]
    excess = jnp.where(fits[:, None] & (active > budget), active - (budget - spec.num_per_evict + 1), 0)

    served = fits
    if not spec.bulk:
        served &= jnp.all(excess <= spec.num_per_evict, axis=(0, 2))
        excess = jnp.minimum(excess, spec.num_per_evict)
    if spec.bulk or spec.num_per_evict > MOST_FEW:
        victims = evict_many(priorities(scores, slots.live, slots.protected), slots, used, excess)
    else:
        victims = evict_few(scan, scores, slots, excess, most=spec.num_per_evict)
    if not spec.copies:
        # Marks in a page would evict from all the rows that hold it.
        shared = victims.pages(num_pages) & (cache.free.references[slots.pages] > 1)
        own = ~jnp.any(shared, axis=(0, 2, 3))
        victims, served = victims.among(own), served & own
    after = victims.counts_after(before)
    evicting = jnp.any(victims.count() > 0, axis=(0, 2))

    moved = jnp.zeros((), jnp.int32)
    next_hole = jnp.full(length.shape, -1, jnp.int32)
    if spec.copies:
        keep = slots.live & ~victims.mask(num_slots)
        cache, ok, moved = _relocate(cache, jnp.where(evicting, rows, 0), keep, spec)
        evicted = evicting & ok
        served &= ok | ~evicting
        if spec.strategy == "reuse":
            next_hole = jnp.where(evicted[:, None], -1, _lowest_dead(slots.pages > 0, before, page_size))
    else:
        evicted = evicting
        position = cache.pool.position
        assert position is not None, "gather_slots has checked it"
        position = victims.mark(position, slots.pages)
        cache = dataclasses.replace(cache, pool=dataclasses.replace(cache.pool, position=position))
        if spec.strategy != "no_op":
            cache = victims.drop_emptied(cache, rows, after)
        if spec.strategy == "reuse":
            next_hole = _lowest_dead(slots.pages > 0, after, page_size, *victims.moves(after))

    hole = hole.at[:, rows].set(jnp.where((rows > 0)[:, None], next_hole, -1))
    live = jnp.sum(jnp.where(evicted[:, None, None], after.live, before.live), axis=-1, dtype=jnp.int32)
    report = EvictReport(
        copied_bytes=moved.astype(jnp.float32) * _bytes_per_slot(cache),
        live=live,
        active=jnp.sum(live, axis=(0, 2), dtype=jnp.int32),
        pages=row_usage(cache, rows).held,
        active_before=jnp.sum(active, axis=(0, 2), dtype=jnp.int32),
        pages_before=pages_before,
        ok=served,
    )
    return cache, hole, report


def _view(cache: KVCache, lanes: EvictLane, spec: EvictSpec) -> Slots:
    return gather_slots(
        cache,
        lanes.row,
        max_slots=spec.max_slots,
        text_length=lanes.text_length,
        sink_tokens=lanes.sink_tokens,
        recent_tokens=lanes.recent_tokens,
        window_tokens=jnp.zeros_like(lanes.row),
        recorded=lanes.recorded,
        seed=lanes.seed,
        num_query_heads=spec.num_query_heads,
    )


def _scan(
    cache: KVCache, lanes: EvictLane, slots: Slots, scores: jax.Array, length: jax.Array, spec: EvictSpec
) -> PageScan:
    """Of the rows' pages. Scores that are the recorded ones are read where they are, not gathered first."""
    pool = cache.pool
    assert pool.position is not None, "gather_slots has checked it"
    assert pool.score is not None, "gather_slots has checked it"
    first, last = (
        jnp.broadcast_to(of_row[:, None], length.shape)
        for of_row in (lanes.sink_tokens, lanes.text_length - lanes.recent_tokens)
    )
    return scan_pages(
        pool.position,
        pool.score if scores is slots.score else scores.astype(jnp.float32),
        slots.pages,
        length,
        first,
        last,
        implementation=spec.implementation,
    )


def _relocate(
    cache: KVCache, rows: jax.Array, keep: jax.Array, spec: EvictSpec
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Keeps the marked slots of rows by copying. Returns the cache, ok and the number of slots copied, i32[]."""
    if spec.strategy == "reuse":
        return compact_and_count(cache, rows, keep, implementation=spec.implementation)
    kept = jnp.sum(keep & (rows > 0)[:, None, None], dtype=jnp.int32)
    cache, ok = repack(cache, rows, keep, implementation=spec.implementation)
    return cache, ok, jnp.where(ok, kept, 0)


def _lowest_dead(
    held: jax.Array, counts: PageCounts, page_size: int, gone: ArrayLike = False, shift: ArrayLike = 0
) -> jax.Array:
    """i32[L, K, H]: the lowest dead slot; -1 if there is none.

    Args:
      held: bool[L, K, H, C], which pages the tables held before.
      counts: of these.
      gone, shift: bool and i32[L, K, H, C], which of them are gone since, and by how many columns the others moved up.
    """
    place = jnp.arange(held.shape[-1], dtype=jnp.int32) - shift
    has_dead = held & jnp.logical_not(gone) & (counts.dead < page_size)
    slot = jnp.where(has_dead, place * page_size + counts.dead, _NONE)
    lowest = jnp.min(slot, axis=-1)
    return jnp.where(lowest == _NONE, -1, lowest)


def _bytes_per_slot(cache: KVCache) -> int:
    """What copying one slot moves: K and V, and 4 bytes each of score and position."""
    return 2 * cache.layout.head_dim * jnp.dtype(cache.layout.dtype).itemsize + 8
