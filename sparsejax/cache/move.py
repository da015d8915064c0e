"""Moving slots inside the pool: what `fork`, `compact` and `repack` share."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.move_slots import move_slots

from .layout import CacheLayout
from .state import KVPool


def move(
    pool: KVPool,
    layout: CacheLayout,
    source: jax.Array,
    target: jax.Array,
    live: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> KVPool:
    """Copies slots of table entries, with all that belongs to them, in every page of the entries.

    Args:
      pool: the pool.
      layout: its layout.
      source: i32[...], `entry * page_size + in-page slot`, which one to read.
      target: i32[...], likewise, which one to write. Live targets are distinct and disjoint from live sources, so that
        the order of the copies does not matter.
      live: bool[...], which of them to copy.
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.
    """
    sentinel = layout.num_pages * layout.page_size
    source = jnp.where(live[..., None], _slot_ids(source, layout), 0).reshape(-1)
    target = jnp.where(live[..., None], _slot_ids(target, layout), sentinel).reshape(-1)
    k, v = move_slots(pool.k, pool.v, source, target, implementation=implementation, interpret=interpret)
    score, position = (_move_scalars(values, source, target) for values in (pool.score, pool.position))
    return dataclasses.replace(pool, k=k, v=v, score=score, position=position)


def _slot_ids(entry_slot: jax.Array, layout: CacheLayout) -> jax.Array:
    """i32[...] slots of entries -> i32[..., pages_per_entry] slot ids `page * page_size + in-page slot` of the pool."""
    entry, slot = entry_slot // layout.page_size, entry_slot % layout.page_size
    page = entry[..., None] * layout.pages_per_entry + jnp.arange(layout.pages_per_entry, dtype=jnp.int32)
    return page * layout.page_size + slot[..., None]


def _move_scalars(values: jax.Array | None, source: jax.Array, target: jax.Array) -> jax.Array | None:
    """`values` [P, page_size] with the slots `source` copied to `target`; targets out of range are dropped."""
    if values is None:
        return None
    flat = values.reshape(-1)
    return flat.at[target].set(flat[source], mode="drop").reshape(values.shape)
