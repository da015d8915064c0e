"""Where a step's tokens go in the cache, whichever kind it is, and storing them there layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from sparsejax.cache import (
    DeltaCache,
    Entries,
    KVCache,
    SlotMapping,
    append,
    free_delta_entries,
    free_entries,
    near_slots,
    slot_mapping,
    slots_at,
    stamp,
    store_near,
)
from sparsejax.engine.programs.parts import Tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeltaMapping:
    """Where tokens live in a `DeltaCache`: in its full layers, and in its sparse ones.

    Attributes:
      pre_rope: bool[N], the token's key is stored before RoPE in the sparse layers.
    """

    full: SlotMapping
    near: SlotMapping
    pre_rope: jax.Array


def place(cache: KVCache | DeltaCache, tokens: Tokens) -> tuple[KVCache | DeltaCache, SlotMapping | DeltaMapping]:
    """Where the tokens' K and V go: the end of their rows, or the slot of an evicted token. Starts their records."""
    if isinstance(cache, DeltaCache):
        assert tokens.near is not None, "the parts of a DeltaCache say where its sparse layers have their tokens"
        return cache, DeltaMapping(
            full=slot_mapping(cache.full, tokens.rows, tokens.back),
            near=near_slots(cache, tokens.near.rows, tokens.near.slots),
            pre_rope=tokens.near.pre_rope,
        )
    if tokens.hole is None:
        mapping = slot_mapping(cache, tokens.rows, tokens.back)
    else:
        end = cache.table.length[:, tokens.rows] - tokens.back[:, None]  # [Lt, N, Ht]
        hole = tokens.hole.swapaxes(0, 1)
        mapping = slots_at(cache, tokens.rows, jnp.where(hole >= 0, hole, end))
    return stamp(cache, mapping, tokens.positions), mapping


def entries_left(cache: KVCache | DeltaCache) -> jax.Array | Entries:
    """Table entries that can still be allocated: i32[], of a `DeltaCache` of each pool."""
    return free_delta_entries(cache) if isinstance(cache, DeltaCache) else free_entries(cache)


def store(
    cache: KVCache | DeltaCache,
    layer: int,
    mapping: SlotMapping | DeltaMapping,
    k: jax.Array,
    v: jax.Array,
    k_pre_rope: jax.Array,
    *,
    implementation: Implementation | None,
) -> KVCache | DeltaCache:
    """Writes one layer's keys and values. k, v, k_pre_rope: [N, H, D], the keys after and before RoPE."""
    if isinstance(mapping, SlotMapping):
        assert isinstance(cache, KVCache)
        return append(cache, layer, mapping, k, v, implementation=implementation)
    assert isinstance(cache, DeltaCache)
    index = cache.layout.index(layer)
    if cache.layout.is_full(layer):
        return replace(cache, full=append(cache.full, index, mapping.full, k, v, implementation=implementation))
    k = jnp.where(mapping.pre_rope[:, None, None], k_pre_rope, k)
    return store_near(cache, index, mapping.near, k, v, implementation=implementation)
