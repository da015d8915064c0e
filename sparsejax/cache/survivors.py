"""The slots that an eviction keeps, as one ragged list: what `compact` and `repack` make their copies from.

Heads keep different numbers of tokens, and together far fewer than the rows' bound on slots. The list lays the kept
slots of all tables end to end, so what follows from it costs as much as is kept, not as much as there was.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .state import KVCache


@dataclass(frozen=True)
class Survivors:
    """The first `kept` slots of each table after the eviction, N items long. A lane is one of the Lt * K * Ht tables.

    Attributes:
      lane: i32[N], the table of each item, ascending.
      slot: i32[N], the logical slot after the eviction, ascending within a lane.
      first: i32[N], where the item's lane begins in the list.
      valid: bool[N], False behind the last item.
      complete: bool[], whether the list is long enough for all.
    """

    lane: jax.Array
    slot: jax.Array
    first: jax.Array
    valid: jax.Array
    complete: jax.Array


def list_survivors(kept: jax.Array, size: int) -> Survivors:
    """kept: i32[lanes], slots that each table keeps; size: N, static bound on their sum."""
    end = jnp.cumsum(kept, dtype=jnp.int32)
    index = jnp.arange(size, dtype=jnp.int32)
    # Unrolled, the search is a handful of reads from an array that stays in the cache, all in one program.
    lane = jnp.searchsorted(end, index, side="right", method="scan_unrolled").astype(jnp.int32)
    lane = jnp.minimum(lane, kept.shape[0] - 1)
    first = (end - kept)[lane]
    return Survivors(lane=lane, slot=index - first, first=first, valid=index < end[-1], complete=end[-1] <= size)


def slots_by_rank(chosen: jax.Array, rank: jax.Array, kept: jax.Array, size: int) -> jax.Array:
    """i32[N]: at `first + rank` of its lane, the slot that has this rank; 0 where no slot has it.

    Args:
      chosen: bool[lanes, S], the slots to list.
      rank: i32[lanes, S], place of each chosen slot among those of its lane, below the lane's `kept`.
      kept: i32[lanes], as in `list_survivors`.
      size: N.
    """
    first = jnp.cumsum(kept, dtype=jnp.int32) - kept
    slot = jnp.broadcast_to(jnp.arange(chosen.shape[1], dtype=jnp.int32), chosen.shape)
    place = jnp.where(chosen, first[:, None] + rank, size)
    return jnp.zeros(size, jnp.int32).at[place].set(slot, mode="drop")


@dataclass(frozen=True)
class MarkedRows:
    """Rows whose slots are marked to be kept, cut to the columns that they can use. S slots, C columns.

    Attributes:
      pages: i32[Lt, K, Ht, C], the rows' entries.
      length: i32[Lt, K, Ht].
      keep: bool[Lt, K, Ht, S], only below the lengths.
      kept: i32[Lt, K, Ht], how many.
      size: static bound on the sum of `kept`: the length of the list of survivors.
      fits: bool[], no row is longer than the marks given.
    """

    pages: jax.Array
    length: jax.Array
    keep: jax.Array
    kept: jax.Array
    size: int
    fits: jax.Array


def mark_rows(cache: KVCache, rows: jax.Array, keep: jax.Array, max_keep: int | None) -> MarkedRows:
    """Args as `compact` takes them.

    Raises:
      ValueError: keep is not [Lt, K, Ht, S], or max_keep is not positive.
    """
    layout = cache.layout
    tables = (layout.table_layers, rows.shape[0], layout.table_heads)
    if keep.ndim != 4 or keep.shape[:3] != tables:
        raise ValueError(f"keep must have shape [Lt, K, Ht, S] = {(*tables, 'S')}, got {keep.shape}")
    if max_keep is not None and max_keep < 1:
        raise ValueError(f"max_keep must be positive or None, got {max_keep}")
    bound = keep.shape[3]
    columns = min(layout.pages_for(bound), layout.max_entries_per_row)
    slots = columns * layout.page_size
    keep = keep[..., :slots]
    keep = jnp.pad(keep, [(0, 0)] * 3 + [(0, slots - keep.shape[-1])])
    length = cache.table.length[:, rows]
    keep &= jnp.arange(slots, dtype=jnp.int32) < length[..., None]
    return MarkedRows(
        pages=cache.table.pages[:, rows, :, :columns],
        length=length,
        keep=keep,
        kept=jnp.sum(keep, axis=-1, dtype=jnp.int32),
        size=keep.size if max_keep is None else min(max_keep, keep.size),
        fits=jnp.all(length <= bound),
    )
