"""The allocator's two moves: take entries off the free list, and give references back to it.

Both are vectorised over lanes (a lane is one table cell or one row of one table) and touch only the cells they change,
so their cost follows the lanes, not the size of the pool.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.prefix_sums import exclusive_sums

from .state import FreeList


def pop(free: FreeList, need: jax.Array, *, width: int) -> tuple[FreeList, jax.Array]:
    """Takes `need[lane]` entries for each lane, with one reference each.

    Args:
      free: the free list.
      need: i32[...], entries each lane takes, 0 <= need <= width. The caller has checked that their sum does not exceed
        `free.count`.
      width: static bound on `need`.

    Returns:
      The free list without them, and the entries, i32[..., width], 0 at and beyond `need`.
    """
    flat = need.reshape(-1)
    before = exclusive_sums(flat)
    first = before.reshape(need.shape)
    step = jnp.arange(width, dtype=jnp.int32)
    taken = step < need[..., None]
    # The clip only serves lanes that take nothing: a negative index would wrap.
    depth = jnp.maximum(free.count - 1 - first[..., None] - step, 0)
    entries = jnp.where(taken, free.stack[depth], 0)  # [..., width]
    references = free.references.at[_or_dropped(entries, free)].set(1, mode="drop")
    return FreeList(stack=free.stack, count=free.count - before[-1] - flat[-1], references=references), entries


def share(free: FreeList, entries: jax.Array) -> FreeList:
    """Adds one reference for every occurrence of an entry in `entries` (i32, any shape; 0 is ignored)."""
    references = free.references.at[_or_dropped(entries, free)].add(1, mode="drop")
    return FreeList(stack=free.stack, count=free.count, references=references)


def drop(free: FreeList, entries: jax.Array) -> FreeList:
    """Takes back one reference for every occurrence of an entry, and frees each entry that has none left.

    Args:
      free: the free list.
      entries: i32, any shape. 0 is ignored. An entry may occur as often as it is referenced.
    """
    size = free.stack.shape[0]
    entries = entries.reshape(-1)
    lane = jnp.arange(entries.shape[0], dtype=jnp.int32)
    references = free.references.at[_or_dropped(entries, free)].add(-1, mode="drop")
    unreferenced = (entries > 0) & (references[entries] == 0)
    # An entry that lost its last references in several lanes must be pushed once. Each such lane writes its own mark
    # into the (now unused) reference count; the lane whose mark stays pushes. The minimum makes the choice
    # deterministic.
    mark = -1 - lane
    unreferenced_entry = jnp.where(unreferenced, entries, size)
    marked = references.at[unreferenced_entry].min(mark, mode="drop")
    freed = unreferenced & (marked[entries] == mark)
    references = marked.at[unreferenced_entry].set(0, mode="drop")
    before = exclusive_sums(freed.astype(jnp.int32))
    stack = free.stack.at[jnp.where(freed, free.count + before, size)].set(entries, mode="drop")
    return FreeList(stack=stack, count=free.count + before[-1] + freed[-1], references=references)


def _or_dropped(entries: jax.Array, free: FreeList) -> jax.Array:
    """`entries` with 0 replaced by an index that scatters in drop mode ignore (they wrap negative ones)."""
    return jnp.where(entries > 0, entries, free.stack.shape[0])
