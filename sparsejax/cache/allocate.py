"""Backing new tokens with pages, and taking a finished row's pages back."""

import dataclasses

import jax
import jax.numpy as jnp

from . import free_list
from .state import Paged, SlotTable


def allocate(
    cache: Paged, rows: jax.Array, count: jax.Array, *, max_count: int | None = None
) -> tuple[Paged, jax.Array]:
    """Makes room for more tokens at the end of each row: as many in all layers and heads, or a number for each.

    Pure bookkeeping: it changes table, lengths and free list, and touches no array of the pool. The page that a row's
    next token goes to is always owned by that row alone (`fork` and `compact` see to it), so nothing is ever copied
    here.

    Args:
      cache: a `KVCache`, or another that has its table, free list and layout.
      rows: i32[K], distinct, except that the null row 0 may repeat; its `count` is ignored.
      count: i32[K], new tokens of each row in every layer and head, or i32[Lt, K, Ht], new tokens of each table of it
        (0 where a token takes the slot of an evicted one), >= 0.
      max_count: static bound on `count`; the work grows with Lt * K * Ht * ceil(max_count / page_size). Decode steps
        pass 1. None: as much as a row can hold.

    Returns:
      The cache and ok, bool[]. If the free entries do not suffice, a row would need more than M entries, or a count is
      negative or above `max_count`, then ok is False and the cache is as it was.

    Raises:
      ValueError: max_count is not positive, or count has another shape.
    """
    layout = cache.layout
    lanes = (layout.table_layers, rows.shape[0], layout.table_heads)
    if count.shape not in (rows.shape, lanes):
        raise ValueError(f"count must have shape [K] = {rows.shape} or [Lt, K, Ht] = {lanes}, got {count.shape}")
    if max_count is not None and max_count < 1:
        raise ValueError(f"max_count must be positive or None, got {max_count}")
    capacity: int = layout.max_entries_per_row * layout.page_size
    max_count = capacity if max_count is None else min(max_count, capacity)
    width = -(-max_count // layout.page_size)

    count = jnp.broadcast_to(count if count.ndim == 3 else count[:, None], lanes)
    count = jnp.where(rows[:, None] > 0, count, 0)
    length = cache.table.length[:, rows]  # [Lt, K, Ht]
    held = layout.pages_for(length)
    need = layout.pages_for(length + count) - held
    # The bound on count comes first and keeps the sum from overflowing: need <= width in every accepted call.
    ok = jnp.all((count >= 0) & (count <= max_count)) & jnp.all(held + need <= layout.max_entries_per_row)
    ok &= jnp.sum(jnp.where(ok, need, 0)) <= cache.free.count
    need = jnp.where(ok, need, 0)
    count = jnp.where(ok, count, 0)

    free, entries = free_list.pop(cache.free, need, width=width)
    step = jnp.arange(width, dtype=jnp.int32)
    column = jnp.where(step < need[..., None], held[..., None] + step, layout.max_entries_per_row)
    layer = jnp.arange(layout.table_layers)[:, None, None, None]
    head = jnp.arange(layout.table_heads)[:, None]
    table = SlotTable(
        pages=cache.table.pages.at[layer, rows[:, None, None], head, column].set(entries, mode="drop"),
        length=cache.table.length.at[:, rows].add(count),
    )
    return dataclasses.replace(cache, table=table, free=free), ok


def release(cache: Paged, rows: jax.Array) -> Paged:
    """Empties rows: every entry loses the row's reference, and entries that have none left become free.

    Args:
      cache: as `allocate` takes it.
      rows: i32[K]. Empty rows, the null row and repetitions have no effect.
    """
    repeated = jnp.any(jnp.tril(rows[:, None] == rows[None, :], k=-1), axis=1)
    rows = jnp.where(repeated, 0, rows)
    free = free_list.drop(cache.free, cache.table.pages[:, rows])
    table = SlotTable(
        pages=cache.table.pages.at[:, rows].set(0),
        length=cache.table.length.at[:, rows].set(0),
    )
    return dataclasses.replace(cache, table=table, free=free)
