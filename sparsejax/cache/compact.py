"""Eviction made physical: keep some of a row's slots, close the holes, free the pages."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation

from . import free_list
from .move import move
from .state import KVCache, SlotTable


def compact(
    cache: KVCache,
    rows: jax.Array,
    keep: jax.Array,
    *,
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

    Args:
      cache: the cache.
      rows: i32[K], distinct, except that the null row 0 may repeat (its marks are ignored).
      keep: bool[Lt, K, Ht, S], which logical slots to keep, S a static bound on the lengths; marks at and beyond a
        length are ignored. With shared tables one mark keeps the token in all layers and heads that share.
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.

    Returns:
      The cache and ok, bool[]. If the free entries do not suffice for the copies of shared pages or a row is longer
      than S, then ok is False and the cache is as it was.

    Raises:
      ValueError: keep has another shape.
    """
    layout = cache.layout
    page_size = layout.page_size
    lanes = (layout.table_layers, rows.shape[0], layout.table_heads)
    if keep.ndim != 4 or keep.shape[:3] != lanes:
        raise ValueError(f"keep must have shape [Lt, K, Ht, S] = {(*lanes, 'S')}, got {keep.shape}")
    bound = keep.shape[3]
    columns = min(-(-bound // page_size), layout.max_entries_per_row)
    keep = _fit(keep, columns * page_size)

    pages = cache.table.pages[:, rows, :, :columns]  # [Lt, K, Ht, columns]
    length = cache.table.length[:, rows]  # [Lt, K, Ht]
    slot = jnp.arange(columns * page_size, dtype=jnp.int32)
    keep &= slot < length[..., None]
    kept = jnp.sum(keep, axis=-1, dtype=jnp.int32)
    hole = ~keep & (slot < kept[..., None])

    column = jnp.arange(columns, dtype=jnp.int32)
    staying = column < -(-kept[..., None] // page_size)
    has_hole = jnp.any(hole.reshape(*pages.shape, page_size), axis=-1)
    becomes_partial = (column == kept[..., None] // page_size) & (kept[..., None] % page_size > 0)
    copied = staying & (has_hole | becomes_partial) & (cache.free.references[pages] > 1)

    ok = jnp.all(length <= bound) & (jnp.sum(copied, dtype=jnp.int32) <= cache.free.count)
    copied &= ok
    free, fresh = free_list.pop(cache.free, copied.astype(jnp.int32), width=1)
    new_pages = jnp.where(copied, fresh[..., 0], jnp.where(staying, pages, 0))
    new_pages = jnp.where(ok, new_pages, pages)

    # A slot below n is written if it is a hole, or if its page is a copy. Targets lie in the row's own pages, at dead
    # slots or in fresh entries; sources are survivors in the old pages: the two are disjoint, within a row and across
    # rows.
    origin = jnp.where(hole, _survivors(keep, hole, kept), slot)
    pool = move(
        cache.pool,
        layout,
        source=_entry_slots(pages, origin, page_size),
        target=_entry_slots(new_pages, slot, page_size),
        live=ok & (slot < kept[..., None]) & (hole | jnp.repeat(copied, page_size, axis=-1)),
        implementation=implementation,
        interpret=interpret,
    )
    table = SlotTable(
        pages=cache.table.pages.at[:, rows, :, :columns].set(new_pages),
        length=cache.table.length.at[:, rows].set(jnp.where(ok, kept, length)),
    )
    free = free_list.drop(free, jnp.where(ok & (copied | ~staying), pages, 0))
    return dataclasses.replace(cache, pool=pool, table=table, free=free), ok


def _fit(keep: jax.Array, slots: int) -> jax.Array:
    """Cuts or pads the last axis to `slots`."""
    keep = keep[..., :slots]
    return jnp.pad(keep, [(0, 0)] * 3 + [(0, slots - keep.shape[-1])])


def _survivors(keep: jax.Array, hole: jax.Array, kept: jax.Array) -> jax.Array:
    """i32[Lt, K, Ht, S]: for every hole, the logical slot of the survivor that moves into it; undefined elsewhere."""
    slots = keep.shape[-1]
    slot = jnp.arange(slots, dtype=jnp.int32)
    mover = keep & (slot >= kept[..., None])
    # One running count ranks both sides: a hole by the dropped tokens before it, a mover by the kept ones before it, of
    # which those that need not move come first.
    kept_so_far = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
    unmoved = kept - jnp.sum(hole, axis=-1, dtype=jnp.int32)
    hole_rank = slot - kept_so_far
    mover_rank = kept_so_far - 1 - unmoved[..., None]
    lane = jnp.arange(kept.size, dtype=jnp.int32).reshape(kept.shape)[..., None] * slots
    by_rank = jnp.zeros(keep.size, jnp.int32)
    by_rank = by_rank.at[jnp.where(mover, lane + mover_rank, keep.size)].set(
        jnp.broadcast_to(slot, keep.shape), mode="drop"
    )
    return by_rank[jnp.where(hole, lane + hole_rank, 0)]


def _entry_slots(pages: jax.Array, slot: jax.Array, page_size: int) -> jax.Array:
    """Logical slots -> `entry * page_size + in-page slot`. pages [..., columns]; slot broadcasts to [..., S]."""
    slot = jnp.broadcast_to(slot, (*pages.shape[:-1], slot.shape[-1]))
    return jnp.take_along_axis(pages, slot // page_size, axis=-1, mode="clip") * page_size + slot % page_size
