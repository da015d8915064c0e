"""Dead slots: tokens evicted by a mark, position < 0, whose place has not been reclaimed yet."""

import dataclasses

import jax
import jax.numpy as jnp

from . import free_list
from .layout import CacheLayout
from .state import KVCache, SlotTable


def live_slots(cache: KVCache, rows: jax.Array, *, max_slots: int) -> jax.Array:
    """bool[Lt, K, Ht, max_slots]: the slots that hold a token, below the length and not dead.

    A slot of a shared table is dead when it is so in all the layers and heads that share. Without positions no slot is.
    """
    layout, position = cache.layout, cache.pool.position
    length = cache.table.length[:, rows]  # [Lt, K, Ht]
    used = jnp.arange(max_slots, dtype=jnp.int32) < length[..., None]
    if position is None:
        return used
    columns = min(layout.pages_for(max_slots), layout.max_entries_per_row)
    live = _live_in_pages(position, cache.table.pages[:, rows, :, :columns], layout)
    live = live.reshape(*live.shape[:3], -1)[..., :max_slots]
    return used & jnp.pad(live, [(0, 0)] * 3 + [(0, max_slots - live.shape[-1])])


def drop_dead_pages(cache: KVCache, rows: jax.Array, *, max_slots: int) -> KVCache:
    """Gives back the pages of which no used slot is live. Later pages move up in the table; nothing is copied.

    A row's slots shift by `page_size` for every page dropped before them, and its length shrinks by the used slots of
    the pages dropped (a partial last page goes too if all its used slots are dead). A page that other rows hold as well
    loses this row's reference only.

    Args:
      cache: the cache; its layout keeps positions.
      rows: i32[K], distinct, except that the null row 0 may repeat.
      max_slots: static bound on the lengths. A table longer than that is left as it is.

    Raises:
      ValueError: the layout keeps no positions.
    """
    layout, position = cache.layout, cache.pool.position
    if position is None:
        raise ValueError("drop_dead_pages needs a layout with_position=True: dead slots are marked there")
    columns = min(layout.pages_for(max_slots), layout.max_entries_per_row)
    length = cache.table.length[:, rows]  # [Lt, K, Ht]
    live = _live_in_pages(position, cache.table.pages[:, rows, :, :columns], layout)
    used = jnp.arange(columns * layout.page_size, dtype=jnp.int32) < length[..., None]
    live &= used.reshape(live.shape)
    return drop_pages(cache, rows, ~jnp.any(live, axis=-1) & (length <= columns * layout.page_size)[..., None])


def drop_pages(cache: KVCache, rows: jax.Array, dropped: jax.Array) -> KVCache:
    """Takes pages out of rows, with the tokens in them; later pages move up. The pool is not touched.

    Args:
      cache: the cache.
      rows: i32[K], distinct, except that the null row 0 may repeat.
      dropped: bool[Lt, K, Ht, C], which of the first C pages of each table; those that a table does not hold are
        ignored. The tables hold no more than C.
    """
    columns = dropped.shape[-1]
    pages = cache.table.pages[:, rows, :, :columns]
    held = pages > 0
    staying = held & ~dropped
    column = jnp.arange(columns, dtype=jnp.int32)
    place = jnp.cumsum(staying, axis=-1, dtype=jnp.int32) - 1
    lane = jnp.arange(pages.size // columns, dtype=jnp.int32).reshape(pages.shape[:-1])[..., None] * columns
    closed = jnp.zeros(pages.size, jnp.int32)
    closed = closed.at[jnp.where(staying, lane + place, pages.size)].set(pages, mode="drop").reshape(pages.shape)
    return _close_up(cache, rows, closed, column, jnp.where(dropped, pages, 0))


def drop_few_pages(cache: KVCache, rows: jax.Array, columns: jax.Array, *, num_columns: int) -> KVCache:
    """As `drop_pages`, of pages named by column: what is given back is counted by them, not by all pages.

    Args:
      cache, rows: as `drop_pages` takes them.
      columns: i32[Lt, K, Ht, n], distinct within a table; -1 for none. Columns that a table does not hold are ignored.
      num_columns: C, static; tables that drop pages hold no more.
    """
    pages = cache.table.pages[:, rows, :, :num_columns]
    entries = jnp.take_along_axis(pages, jnp.maximum(columns, 0), axis=-1, mode="clip")
    entries = jnp.where((columns >= 0) & (columns < num_columns), entries, 0)
    columns = jnp.where(entries > 0, columns, num_columns)  # those of no page lie behind all
    # The page behind a dropped one moves up to its column, or further by as many as are dropped before that.
    before = jnp.sum(columns[..., None, :] < columns[..., :, None], axis=-1, dtype=jnp.int32)
    place = jnp.arange(num_columns, dtype=jnp.int32)
    source = place + jnp.sum((columns - before)[..., None, :] <= place[:, None], axis=-1, dtype=jnp.int32)
    closed = jnp.take_along_axis(pages, jnp.minimum(source, num_columns - 1), axis=-1)
    return _close_up(cache, rows, jnp.where(source < num_columns, closed, 0), columns, entries)


def _close_up(cache: KVCache, rows: jax.Array, pages: jax.Array, columns: jax.Array, entries: jax.Array) -> KVCache:
    """The cache with these pages i32[Lt, K, Ht, C] in its rows, without the `entries`, 0 for none, from `columns`."""
    page_size, length = cache.layout.page_size, cache.table.length[:, rows]
    tokens = jnp.clip(length[..., None] - columns * page_size, 0, page_size)
    table = SlotTable(
        pages=cache.table.pages.at[:, rows, :, : pages.shape[-1]].set(pages),
        length=cache.table.length.at[:, rows].add(-jnp.sum(jnp.where(entries > 0, tokens, 0), axis=-1)),
    )
    return dataclasses.replace(cache, table=table, free=free_list.drop(cache.free, entries))


def _live_in_pages(position: jax.Array, entries: jax.Array, layout: CacheLayout) -> jax.Array:
    """bool[..., page_size]: the in-page slots of each entry [...] that are not dead in all the pages it stands for."""
    page = entries[..., None] * layout.pages_per_entry + jnp.arange(layout.pages_per_entry, dtype=jnp.int32)
    return jnp.any(position[page] >= 0, axis=-2)
