"""Writing tokens into the slots that `allocate` has backed, and what is recorded about them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.in_order import in_order_for_xla
from pallas_kernels.page_bounds import update_page_bounds
from pallas_kernels.rotate_and_store import rotate_and_store
from pallas_kernels.store_kv import store_kv

from .state import KVCache, SlotMapping


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
    return slots_at(cache, rows, cache.table.length[:, rows] - back[:, None])


def slots_at(cache: Any, rows: jax.Array, slot: jax.Array) -> SlotMapping:
    """Where given slots of rows live.

    Args:
      cache: a `KVCache`, or another that has its table and layout.
      rows: i32[T], the row of each token; the null row 0 for padding tokens.
      slot: i32[Lt, T, Ht], logical slot of each token in each table of its row.

    Returns:
      The mapping. Tokens of the null row, and those whose slot is negative or not below the length, get entry 0.
    """
    layout = cache.layout
    length = cache.table.length[:, rows]  # [Lt, T, Ht]
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

    Tokens of a row follow one another, in the order of their slots. If the layout keeps bounds, those of the pages that
    they go to are taken anew.

    Args:
      cache: the cache.
      layer: which layer, static.
      mapping: where the tokens live, from `slot_mapping`.
      k: [T, H, D], keys after RoPE; cast to the pool's dtype.
      v: [T, H, D].
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.
    """
    pool, address = cache.pool, cache.layout.address(layer)
    k_pages, v_pages = store_kv(
        pool.k,
        pool.v,
        k,
        v,
        mapping.entry,
        mapping.slot,
        address=address,
        implementation=implementation,
        interpret=interpret,
    )
    return _written(cache, layer, mapping, k_pages, v_pages, implementation=implementation, interpret=interpret)


def rotate_and_append(
    cache: KVCache,
    layer: int,
    mapping: SlotMapping,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, KVCache]:
    """As `append`, from one layer's queries, keys and values before RoPE, which it applies.

    Args:
      cache, layer, mapping: as in `append`.
      qkv: [T, Hq + 2 * H, D], query heads, then key heads, then value heads.
      cos, sin: f32[T, D/2].
      implementation, interpret: as the kernels take them.

    Returns:
      (q [T, Hq, D] after RoPE, cache).
    """
    pool, layout = cache.pool, cache.layout
    q, k_pages, v_pages = rotate_and_store(
        pool.k,
        pool.v,
        qkv,
        cos,
        sin,
        mapping.entry,
        mapping.slot,
        num_kv_heads=layout.num_kv_heads,
        address=layout.address(layer),
        implementation=implementation,
        interpret=interpret,
    )
    return q, _written(cache, layer, mapping, k_pages, v_pages, implementation=implementation, interpret=interpret)


def _written(
    cache: KVCache,
    layer: int,
    mapping: SlotMapping,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    implementation: Implementation | None,
    interpret: bool | None,
) -> KVCache:
    """The cache with pages that new tokens were written to, the bounds of their keys brought up to date."""
    bounds, address = cache.pool.bounds, cache.layout.address(layer)
    if bounds is not None:
        entry, slot = mapping.entry[address.table_layer], mapping.slot[address.table_layer]  # [T, Ht]
        is_last = jnp.pad(entry[1:] != entry[:-1], ((0, 1), (0, 0)), constant_values=True)
        bounds = update_page_bounds(
            bounds,
            k_pages,
            entry,
            jnp.where(is_last & (entry > 0), slot + 1, 0),
            address=address,
            num_kv_heads=cache.layout.num_kv_heads,
            implementation=implementation,
            interpret=interpret,
        )
        bounds, k_pages = in_order_for_xla((bounds, k_pages), implementation=implementation, interpret=interpret)
    return dataclasses.replace(cache, pool=dataclasses.replace(cache.pool, k=k_pages, v=v_pages, bounds=bounds))


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
    return dataclasses.replace(cache, pool=dataclasses.replace(pool, score=score, position=positions))


def add_scores(cache: KVCache, layer: int, mapping: SlotMapping, values: jax.Array) -> KVCache:
    """Adds to the scores of T tokens in one layer.

    Args:
      cache: the cache.
      layer: which layer, static.
      mapping: where the tokens live, from `slot_mapping` or `slots_at`.
      values: f32[T, H], what each token's score gains in each KV head.

    Raises:
      ValueError: the layout keeps no scores.
    """
    layout, pool = cache.layout, cache.pool
    if pool.score is None:
        raise ValueError("add_scores needs a layout with_score=True")
    address = layout.address(layer)
    entry, slot = mapping.entry[address.table_layer], mapping.slot[address.table_layer]  # [T, Ht]
    page = address.page(entry, jnp.arange(layout.num_kv_heads))  # [T, H]
    page = jnp.where(entry > 0, page, layout.num_pages)
    score = pool.score.at[page, slot].add(values, mode="drop")
    return dataclasses.replace(cache, pool=dataclasses.replace(pool, score=score))
