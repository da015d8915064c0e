"""Writing new tokens into the slots that `allocate` has backed."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.store_kv import store_kv

from .state import KVCache, KVPool, SlotMapping


def slot_mapping(cache: KVCache, rows: jax.Array, back: jax.Array) -> SlotMapping:
    """Where tokens near the end of their rows live.

    Args:
      cache: the cache, after `allocate`.
      rows: i32[T], the row of each token; the null row 0 for padding tokens.
      back: i32[T], how far from the end of its row each token is: 1 is the newest. Counting from the end is what makes
        one number serve all layers and heads, whose lengths differ after an eviction.

    Returns:
      The mapping. Tokens of the null row, and those that `back` puts outside their row, get entry 0.
    """
    layout = cache.layout
    length = cache.table.length[:, rows]  # [Lt, T, Ht]
    slot = length - back[:, None]
    valid = (rows[:, None] > 0) & (slot >= 0) & (slot < length)
    slot = jnp.where(valid, slot, 0)
    layer = jnp.arange(layout.table_layers)[:, None, None]
    head = jnp.arange(layout.table_heads)
    entry = cache.table.pages[layer, rows[:, None], head, slot // layout.page_size]
    return SlotMapping(entry=jnp.where(valid, entry, 0), slot=slot % layout.page_size)


def append(
    cache: KVCache,
    layer: int,
    mapping: SlotMapping,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> KVCache:
    """Writes one layer's keys and values of T tokens, in place when the cache is donated.

    Args:
      cache: the cache.
      layer: which layer, static.
      mapping: where the tokens live, from `slot_mapping`.
      k: [T, H, D], keys after RoPE; cast to the pool's dtype.
      v: [T, H, D].
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.
    """
    pool = cache.pool
    k_pages, v_pages = store_kv(
        pool.k,
        pool.v,
        k,
        v,
        mapping.entry,
        mapping.slot,
        address=cache.layout.address(layer),
        implementation=implementation,
        interpret=interpret,
    )
    return dataclasses.replace(cache, pool=dataclasses.replace(pool, k=k_pages, v=v_pages))


def stamp(cache: KVCache, mapping: SlotMapping, position: jax.Array) -> KVCache:
    """Starts the records of T new tokens in all layers and heads: their positions, and scores of 0.

    Does nothing if the layout keeps neither scores nor positions.

    Args:
      cache: the cache.
      mapping: where the tokens live, from `slot_mapping`.
      position: i32[T], position of each token in its request.
    """
    layout, pool = cache.layout, cache.pool
    if pool.score is None and pool.position is None:
        return cache
    offset = jnp.arange(layout.pages_per_entry, dtype=jnp.int32)
    # An entry's pages are consecutive, so every one of them is reached without naming layers or heads.
    page = mapping.entry[..., None] * layout.pages_per_entry + offset  # [Lt, T, Ht, pages_per_entry]
    page = jnp.where(mapping.entry[..., None] > 0, page, layout.num_pages)
    slot = mapping.slot[..., None]
    score, positions = pool.score, pool.position
    if score is not None:
        score = score.at[page, slot].set(0.0, mode="drop")
    if positions is not None:
        positions = positions.at[page, slot].set(position[:, None, None], mode="drop")
    return dataclasses.replace(cache, pool=KVPool(k=pool.k, v=pool.v, score=score, position=positions))
