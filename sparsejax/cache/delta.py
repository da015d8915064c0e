"""The cache of an engine that stores requests compressed (DeltaKV), beside dense ones: three pools, a table each.

* `full`: all tokens of the layers that keep everything.
* `near`: full-precision tokens of the sparse layers. A dense request has all of its tokens there. A compressed one has
  its centers in its row, the center of ordinal c in slot c, and its recent tokens in a second row, its *ring*; both
  with their keys before RoPE.
* `latent`: compressed tokens of the sparse layers, the latent of ordinal i in slot i.

A row has the same number in all three tables; the ring of row r is row `layout.ring_row(r)` of the near table. Which
token has which ordinal is arithmetic on positions (`pallas_kernels.centers`), so there are no maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Implementation
from pallas_kernels.latents import LatentPages, init_latents
from pallas_kernels.store_kv import store_kv

from .allocate import allocate, release
from .append import slots_at
from .layout import CacheLayout
from .state import FreeList, KVCache, SlotMapping, SlotTable, init_cache, init_free_list, init_table


class Entries(NamedTuple):
    """Table entries of the three pools; ints, or i32[] arrays on the device."""

    full: Any
    near: Any
    latent: Any


@dataclass(frozen=True)
class DeltaCacheLayout:
    """The static shape of a `DeltaCache`. Hashable.

    Attributes:
      full_layers: layers of the model that keep everything, ascending.
      full, near: layouts of their pools, one shared table each.
      latent: likewise, for its table and the addresses of its pages; its one "head" is the latent, its head_dim the
        size of it. What a page takes is `latent_pages`' to say.
      neighbors: references of a latent (K).
      max_centers: most centers of a row.
      latent_dtype: "bfloat16", "float32" or "int4".
    """

    full_layers: tuple[int, ...]
    full: CacheLayout
    near: CacheLayout
    latent: CacheLayout
    neighbors: int
    max_centers: int
    latent_dtype: str

    @classmethod
    def make(
        cls,
        *,
        num_layers: int,
        full_layers: tuple[int, ...],
        num_kv_heads: int,
        head_dim: int,
        latent_size: int,
        neighbors: int,
        max_centers: int,
        latent_dtype: str,
        ring: int,
        entries: Entries,
        max_rows: int,
        max_slots: int,
        page_size: int,
        dtype: DTypeLike,
    ) -> DeltaCacheLayout:
        """The layout of `entries` table entries, the null ones included, and of `max_rows` rows of `max_slots` tokens.

        Args:
          latent_size: numbers of a latent (d).
          ring: most recent tokens of a compressed row.
        """
        common: dict[str, Any] = {"page_size": page_size, "dtype": dtype}
        sparse = num_layers - len(full_layers)
        kv = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, **common}
        return cls(
            full_layers=full_layers,
            full=CacheLayout(
                num_layers=len(full_layers),
                num_pages=entries.full * len(full_layers) * num_kv_heads,
                max_rows=max_rows,
                max_slots=max_slots,
                **kv,
            ),
            near=CacheLayout(
                num_layers=sparse,
                num_pages=entries.near * sparse * num_kv_heads,
                max_rows=2 * max_rows,
                max_slots=max(max_slots, ring),
                **kv,
            ),
            latent=CacheLayout(
                num_layers=sparse,
                num_kv_heads=1,
                head_dim=latent_size,
                num_pages=entries.latent * sparse,
                max_rows=max_rows,
                max_slots=max_slots,
                **common,
            ),
            neighbors=neighbors,
            max_centers=max_centers,
            latent_dtype=latent_dtype,
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.full.num_layers + self.near.num_layers

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers of the model that are stored compressed, ascending."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.full_layers)

    def is_full(self, layer: int) -> bool:
        """Whether a layer of the model keeps everything."""
        return layer in self.full_layers

    def index(self, layer: int) -> int:
        """Place of a layer of the model among the full, or among the sparse ones."""
        return (self.full_layers if self.is_full(layer) else self.sparse_layers).index(layer)

    def observes(self, layer: int) -> bool:
        """Whether the layers behind a full layer follow what it attends to."""
        return self.is_full(layer) and layer + 1 < self.num_layers and not self.is_full(layer + 1)

    def followers(self, layer: int) -> range:
        """The layers of the model that follow a full one: all up to the next full one."""
        behind = (each for each in range(layer + 1, self.num_layers) if self.is_full(each))
        return range(layer + 1, next(behind, self.num_layers))

    def ring_row(self, rows):
        """Near row of the recent tokens of rows (ints or arrays); the null row's is the null row."""
        return (self.full.max_rows + rows) * (rows > 0)

    @property
    def num_rows(self) -> int:
        """R: rows of the full and of the latent table, the null row included."""
        return self.full.num_rows

    @property
    def page_size(self) -> int:
        return self.full.page_size

    @property
    def dtype(self) -> DTypeLike:
        return self.full.dtype

    @property
    def num_entries(self) -> Entries:
        """Table entries of each pool, the null entry included."""
        return Entries(self.full.num_entries, self.near.num_entries, self.latent.num_entries)

    def latent_pages(self, num_pages: int) -> LatentPages:
        """Empty latent pages."""
        return init_latents(
            num_pages,
            self.page_size,
            size=self.latent.head_dim,
            neighbors=self.neighbors,
            max_centers=self.max_centers,
            dtype=self.latent_dtype,
        )

    @cached_property
    def entry_bytes(self) -> Entries:
        """Device memory of the pages of one table entry of each pool."""

        page = jax.eval_shape(lambda: self.latent_pages(1))
        latent = sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(page))
        return Entries(self.full.bytes_of(1), self.near.bytes_of(1), self.latent.pages_per_entry * latent)

    def pages_of(self, entries: Entries) -> int:
        """Pages of so many table entries, of all pools together."""
        parts = zip(entries, (self.full, self.near, self.latent), strict=True)
        return sum(layout.pages_of(count) for count, layout in parts)

    def bytes_of(self, entries: Entries) -> int:
        """Device memory of so many table entries."""
        return sum(count * size for count, size in zip(entries, self.entry_bytes, strict=True))

    def table_bytes(self) -> int:
        """Device memory of tables and lengths."""
        return sum(layout.table_bytes() for layout in (self.full, self.near, self.latent))

    def bytes(self) -> int:
        """Device memory of the whole cache."""
        free = 4 * sum(2 * entries + 1 for entries in self.num_entries)
        return self.bytes_of(self.num_entries) + self.table_bytes() + free

    # No scores and no positions of slots are kept: what evicts needs another cache.
    with_score = False


@partial(jax.tree_util.register_dataclass, data_fields=["pool", "table", "free"], meta_fields=["layout"])
@dataclass(frozen=True)
class LatentCache:
    """Latents, with a table and a free list as `KVCache` has them."""

    pool: LatentPages
    table: SlotTable
    free: FreeList
    layout: CacheLayout


@partial(jax.tree_util.register_dataclass, data_fields=["full", "near", "latent"], meta_fields=["layout"])
@dataclass(frozen=True)
class DeltaCache:
    """The three caches; see the module's docstring."""

    full: KVCache
    near: KVCache
    latent: LatentCache
    layout: DeltaCacheLayout


def init_delta_cache(layout: DeltaCacheLayout) -> DeltaCache:
    """An empty cache."""
    return DeltaCache(
        full=init_cache(layout.full),
        near=init_cache(layout.near),
        latent=LatentCache(
            pool=layout.latent_pages(layout.latent.num_pages),
            table=init_table(layout.latent),
            free=init_free_list(layout.latent),
            layout=layout.latent,
        ),
        layout=layout,
    )


def allocate_delta(
    cache: DeltaCache,
    rows: jax.Array,
    *,
    full: jax.Array | None = None,
    near: jax.Array | None = None,
    ring: jax.Array | None = None,
    latent: jax.Array | None = None,
    max_count: Entries,
) -> tuple[DeltaCache, jax.Array]:
    """Makes room for more slots at the end of each row.

    Args:
      rows: i32[K], as `allocate` takes them.
      full, near, ring, latent: i32[K], new slots of each row in the full table, in the near table, in the near table's
        ring, and in the latent table; None: none.
      max_count: static bounds on full, on near and ring, and on latent.

    Returns:
      The cache and ok, bool[]. Without ok some of it may have been done: the cache is then of no use.
    """
    ok = jnp.asarray(True)

    def more(part, rows, count, bound):
        nonlocal ok
        if count is None:
            return part
        part, fitted = allocate(part, rows, count, max_count=bound)
        ok &= fitted
        return part

    near_cache = more(cache.near, rows, near, max_count.near)
    return replace(
        cache,
        full=more(cache.full, rows, full, max_count.full),
        near=more(near_cache, cache.layout.ring_row(rows), ring, max_count.near),
        latent=more(cache.latent, rows, latent, max_count.latent),
    ), ok


def release_delta(cache: DeltaCache, rows: jax.Array) -> DeltaCache:
    """Empties rows, their rings and latents included. rows: i32[K], as `release` takes them."""
    near_rows = jnp.concatenate([rows, cache.layout.ring_row(rows)])
    return replace(
        cache,
        full=release(cache.full, rows),
        near=release(cache.near, near_rows),
        latent=release(cache.latent, rows),
    )


def free_delta_entries(cache: DeltaCache) -> Entries:
    """i32[] each: entries that can still be allocated."""
    return Entries(cache.full.free.count, cache.near.free.count, cache.latent.free.count)


def near_slots(cache: DeltaCache, rows: jax.Array, slots: jax.Array) -> SlotMapping:
    """Where slots of near rows live. rows: i32[T], 0 for nowhere; slots: i32[T]."""
    return slots_at(cache.near, rows, slots[None, :, None])


def store_near(
    cache: DeltaCache,
    index: int,
    mapping: SlotMapping,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> DeltaCache:
    """Writes keys and values [T, H, D] of one sparse layer where the near table's mapping says.

    Args:
      index: place of the layer among the sparse ones.
    """
    pool = cache.near.pool
    k_pages, v_pages = store_kv(
        pool.k,
        pool.v,
        k,
        v,
        mapping.entry,
        mapping.slot,
        address=cache.layout.near.address(index),
        implementation=implementation,
    )
    return replace(cache, near=replace(cache.near, pool=replace(pool, k=k_pages, v=v_pages)))


def latent_slots(cache: DeltaCache, rows: jax.Array, slots: jax.Array) -> SlotMapping:
    """Where latents of rows live. rows: i32[T], 0 for nowhere; slots: i32[T], their ordinals."""
    return slots_at(cache.latent, rows, slots[None, :, None])


def read_near(cache: DeltaCache, index: int, rows: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K and V [T, H, D] in slots i32[T] of near rows i32[T], of one sparse layer; anything where a row is 0."""
    layout = cache.layout.near
    entry = cache.near.table.pages[0, rows, 0, slots // layout.page_size]
    page = layout.address(index).page(entry[:, None], jnp.arange(layout.num_kv_heads))  # [T, H]
    slot = (slots % layout.page_size)[:, None]
    return cache.near.pool.k[page, slot], cache.near.pool.v[page, slot]
