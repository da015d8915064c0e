"""Eviction by copying: the kept slots of a row go, in order, to pages of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation

from . import free_list
from .move import move
from .state import KVCache, SlotTable
from .survivors import list_survivors, mark_rows, slots_by_rank


def repack(
    cache: KVCache,
    rows: jax.Array,
    keep: jax.Array,
    *,
    max_keep: int | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[KVCache, jax.Array]:
    """Copies the marked tokens of each row, in the order of their slots, to fresh pages, and gives the old ones back.

    The fresh pages are allocated before the old ones are freed, so a row needs room for both (SpvLLM's "sparse-copy").
    Afterwards a row holds no hole and shares no page: with every token kept this makes a forked row its own.

    The marks are the whole decision: positions are not read. A dead slot (position < 0) that is marked is copied, dead.

    Args:
      cache: the cache.
      rows: i32[K], distinct, except that the null row 0 may repeat (its marks are ignored).
      keep: bool[Lt, K, Ht, S], which logical slots to keep, S a static bound on the lengths; marks at and beyond a
        length are ignored.
      max_keep: static bound on the tokens kept, summed over all Lt * K * Ht tables of the call. None: Lt * K * Ht * S.
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.

    Returns:
      The cache and ok, bool[]. If the free entries do not suffice for the fresh pages of all rows, a row is longer than
      S, or more than `max_keep` tokens are to be kept, then ok is False and the cache is as it was.

    Raises:
      ValueError: keep has another shape, or max_keep is not positive.
    """
    layout = cache.layout
    page_size = layout.page_size
    marked = mark_rows(cache, rows, keep, max_keep)
    pages, length, kept, size = marked.pages, marked.length, marked.kept, marked.size
    columns = pages.shape[-1]
    items = list_survivors(kept.reshape(-1), size)
    need = layout.pages_for(kept)
    ok = marked.fits & items.complete & (jnp.sum(need, dtype=jnp.int32) <= cache.free.count)

    free, fresh = free_list.pop(cache.free, jnp.where(ok, need, 0), width=columns)  # fresh: [Lt, K, Ht, columns]
    # From here on a lane is one table. The survivor of rank r goes to slot r.
    marks = marked.keep.reshape(-1, columns * page_size)
    origin = slots_by_rank(marks, jnp.cumsum(marks, axis=-1, dtype=jnp.int32) - 1, kept.reshape(-1), size)
    source = pages.reshape(-1, columns)[items.lane, origin // page_size] * page_size + origin % page_size
    target = fresh.reshape(-1, columns)[items.lane, items.slot // page_size] * page_size + items.slot % page_size
    pool = move(
        cache.pool,
        layout,
        source=source,
        target=target,
        live=ok & items.valid,
        implementation=implementation,
        interpret=interpret,
    )
    table = SlotTable(
        pages=cache.table.pages.at[:, rows, :, :columns].set(jnp.where(ok, fresh, pages)),
        length=cache.table.length.at[:, rows].set(jnp.where(ok, kept, length)),
    )
    free = free_list.drop(free, jnp.where(ok, pages, 0))
    return dataclasses.replace(cache, pool=pool, table=table, free=free), ok
