"""Eviction made physical: keep some of a row's slots, close the holes, free the pages."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation

from . import free_list
from .move import move
from .state import KVCache, SlotTable
from .survivors import list_survivors, mark_rows, slots_by_rank


def compact(
    cache: KVCache,
    rows: jax.Array,
    keep: jax.Array,
    *,
    max_keep: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[KVCache, jax.Array]:
    """Keeps the marked tokens of each row, moves them to the front and frees the pages that this empties.

    With n the number of tokens kept, the i-th hole below n takes the i-th survivor at or beyond n (as in KV-Compress,
    Rehg 2024, "cache moves"; the pairing here is ascending on both sides). Every token moves at most once, those below
    n stay where they are, and keeping everything changes nothing. The order of the slots is not preserved.

    A page with more than one reference is immutable: if it has a hole, or would become the partial last page, its
    survivors are copied into an entry of the row's own first. Such copies need free entries; pages that this very call
    frees do not count towards them.

    The marks are the whole decision: positions are not read. A dead slot (position < 0) that is marked stays, dead;
    callers that have dead slots mark live ones only (see `live_slots`).

    With N = Lt * K * Ht * S the work is a few passes over N marks, and one copy program for each of `max_keep` tokens
    at most: a copy goes to one of the first n slots of its table, so there are never more than tokens kept.

    Args:
      cache: the cache.
      rows: i32[K], distinct, except that the null row 0 may repeat (its marks are ignored).
      keep: bool[Lt, K, Ht, S], which logical slots to keep, S a static bound on the lengths; marks at and beyond a
        length are ignored. With shared tables one mark keeps the token in all layers and heads that share.
      max_keep: static bound on the tokens kept, summed over all Lt * K * Ht tables of the call (the budgets of the rows
        times Lt * Ht, whatever the rule that spreads them). None: N.
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.

    Returns:
      The cache and ok, bool[]. If the free entries do not suffice for the copies of shared pages, a row is longer than
      S, or more than `max_keep` tokens are to be kept, then ok is False and the cache is as it was.

    Raises:
      ValueError: keep has another shape, or max_keep is not positive.
    """
    cache, ok, _ = compact_and_count(
        cache, rows, keep, max_keep=max_keep, implementation=implementation, interpret=interpret
    )
    return cache, ok


def compact_and_count(
    cache: KVCache,
    rows: jax.Array,
    keep: jax.Array,
    *,
    max_keep: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[KVCache, jax.Array, jax.Array]:
    """`compact`, and the number of slots copied, i32[]: a slot of an entry, whatever the number of its pages."""
    layout = cache.layout
    page_size = layout.page_size
    marked = mark_rows(cache, rows, keep, max_keep)
    pages, length, keep, kept, size = marked.pages, marked.length, marked.keep, marked.kept, marked.size
    columns, slots = pages.shape[-1], keep.shape[-1]
    slot = jnp.arange(slots, dtype=jnp.int32)

    column = jnp.arange(columns, dtype=jnp.int32)
    staying = column < layout.pages_for(kept)[..., None]
    hole = ~keep & (slot < kept[..., None])
    has_hole = jnp.any(hole.reshape(*pages.shape, page_size), axis=-1)
    becomes_partial = (column == kept[..., None] // page_size) & (kept[..., None] % page_size > 0)
    copied = staying & (has_hole | becomes_partial) & (cache.free.references[pages] > 1)

    # From here on a lane is one table: [lanes, S] and [lanes, columns].
    marks, lane_kept = keep.reshape(-1, slots), kept.reshape(-1)
    items = list_survivors(lane_kept, size)
    ok = marked.fits & items.complete & (jnp.sum(copied, dtype=jnp.int32) <= cache.free.count)
    copied &= ok
    free, fresh = free_list.pop(cache.free, copied.astype(jnp.int32), width=1)
    new_pages = jnp.where(copied, fresh[..., 0], jnp.where(staying, pages, 0))
    new_pages = jnp.where(ok, new_pages, pages)

    # One running count ranks both sides: a hole by the dropped tokens before it, a mover by the kept ones before it, of
    # which those that need not move come first.
    kept_so_far = jnp.cumsum(marks, axis=-1, dtype=jnp.int32)
    unmoved = lane_kept - jnp.sum(hole, axis=-1, dtype=jnp.int32).reshape(-1)
    mover = marks & (slot >= lane_kept[:, None])
    movers = slots_by_rank(mover, kept_so_far - 1 - unmoved[:, None], lane_kept, size)
    to_fill = ~marks[items.lane, items.slot]
    hole_rank = items.slot - kept_so_far[items.lane, items.slot]
    origin = jnp.where(to_fill, movers[items.first + hole_rank], items.slot)

    # A slot below n is written if it is a hole, or if its page is a copy. Targets lie in the row's own pages, at dead
    # slots or in fresh entries; sources are survivors in the old pages: the two are disjoint, within a row and across
    # rows.
    old_pages, target_pages = pages.reshape(-1, columns), new_pages.reshape(-1, columns)
    live = ok & items.valid & (to_fill | copied.reshape(-1, columns)[items.lane, items.slot // page_size])
    pool = move(
        cache.pool,
        layout,
        source=old_pages[items.lane, origin // page_size] * page_size + origin % page_size,
        target=target_pages[items.lane, items.slot // page_size] * page_size + items.slot % page_size,
        live=live,
        implementation=implementation,
        interpret=interpret,
    )
    table = SlotTable(
        pages=cache.table.pages.at[:, rows, :, :columns].set(new_pages),
        length=cache.table.length.at[:, rows].set(jnp.where(ok, kept, length)),
    )
    free = free_list.drop(free, jnp.where(ok & (copied | ~staying), pages, 0))
    return dataclasses.replace(cache, pool=pool, table=table, free=free), ok, jnp.sum(live, dtype=jnp.int32)
