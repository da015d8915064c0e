"""The cache pytree: page pool, slot table, free list, and the layout they follow."""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .layout import CacheLayout


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "score", "position", "bounds"],
    meta_fields=[],
)
@dataclass(frozen=True)
class KVPool:
    """Physical pages. P pages of `page_size` slots; a slot is one token of one KV head of one layer.

    Attributes:
      k: dtype[P, page_size, D], keys as attention reads them (after RoPE).
      v: dtype[P, page_size, D].
      score: f32[P, page_size], importance of each slot, or None if the layout keeps none.
      position: i32[P, page_size], position of each slot's token in its request, or None if the layout keeps none.
      bounds: dtype[P, 2, D], the smallest and largest value of each dimension of the keys that a page got by appending;
        or None if the layout keeps none. `fork` leaves that of a copied page to the token that is appended next.
    """

    k: jax.Array
    v: jax.Array
    score: jax.Array | None
    position: jax.Array | None
    bounds: jax.Array | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "length"], meta_fields=[])
@dataclass(frozen=True)
class SlotTable:
    """Which entries a row holds. Lt, Ht as the layout's granularity says; row 0 is the null row.

    Logical slot t of a row lives in entry `pages[tl, row, ht, t // page_size]` at in-page slot `t % page_size`. Entries
    at and beyond `ceil(length / page_size)` are 0.

    Attributes:
      pages: i32[Lt, R, Ht, M], table entries.
      length: i32[Lt, R, Ht], tokens held. After an eviction it is less than the request's position.
    """

    pages: jax.Array
    length: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["stack", "count", "references"], meta_fields=[])
@dataclass(frozen=True)
class FreeList:
    """Which of the N entries are free. Entry 0, the null entry, is never on the stack and never referenced.

    Attributes:
      stack: i32[N], the first `count` elements are the free entries, the next one to go on top.
      count: i32[], free entries.
      references: i32[N], how many table cells name each entry; 0 for free entries.
    """

    stack: jax.Array
    count: jax.Array
    references: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["pool", "table", "free"], meta_fields=["layout"])
@dataclass(frozen=True)
class KVCache:
    """The whole cache. `layout` is static: it is part of the pytree's structure, not one of its leaves."""

    pool: KVPool
    table: SlotTable
    free: FreeList
    layout: CacheLayout


Paged = TypeVar("Paged", bound=Any)  # any of the caches that have a table, a free list and a layout


@partial(jax.tree_util.register_dataclass, data_fields=["entry", "slot"], meta_fields=[])
@dataclass(frozen=True)
class SlotMapping:
    """Where T tokens live, once per table.

    Attributes:
      entry: i32[Lt, T, Ht], table entry of each token; 0 for padding tokens, whose writes are dropped.
      slot: i32[Lt, T, Ht], slot inside the entry's pages.
    """

    entry: jax.Array
    slot: jax.Array


def init_cache(layout: CacheLayout) -> KVCache:
    """An empty cache: no row holds a token, every entry but the null one is free, low entries are handed out first."""
    slots = (layout.num_pages, layout.page_size)
    return KVCache(
        pool=KVPool(
            k=jnp.zeros((*slots, layout.head_dim), layout.dtype),
            v=jnp.zeros((*slots, layout.head_dim), layout.dtype),
            score=jnp.zeros(slots, jnp.float32) if layout.with_score else None,
            position=jnp.zeros(slots, jnp.int32) if layout.with_position else None,
            bounds=jnp.zeros((layout.num_pages, 2, layout.head_dim), layout.dtype) if layout.with_bounds else None,
        ),
        table=init_table(layout),
        free=init_free_list(layout),
        layout=layout,
    )


def init_table(layout: CacheLayout) -> SlotTable:
    """The table of empty rows."""
    rows = (layout.table_layers, layout.num_rows, layout.table_heads)
    return SlotTable(
        pages=jnp.zeros((*rows, layout.max_entries_per_row), jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
    )


def init_free_list(layout: CacheLayout) -> FreeList:
    """The list with every entry but the null one."""
    entries = layout.num_entries
    return FreeList(
        stack=jnp.arange(entries - 1, -1, -1, dtype=jnp.int32),
        count=jnp.asarray(entries - 1, jnp.int32),
        references=jnp.zeros(entries, jnp.int32),
    )


def free_entries(cache: KVCache) -> jax.Array:
    """i32[]: entries that can still be allocated."""
    return cache.free.count
