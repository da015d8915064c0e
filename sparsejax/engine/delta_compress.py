"""Compressing tokens of the sparse layers: behind each layer of a prefill chunk, and in a program for decodes.

    cache, output = compress_full_rings(params, cache, rows, length, spec=..., implementation=...)

runs behind the decode step that filled the rings of some rows, which the host knows by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from sparsejax.cache import (
    DeltaCache,
    Entries,
    allocate_delta,
    free_delta_entries,
    near_slots,
    store_latents,
    store_near,
)
from sparsejax.compressor import Compressor
from sparsejax.engine.delta_ops import StoreSpec, find_references, read_near, reference_means, signals


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoreOutput:
    """What the host reads of a compression, one step late.

    Attributes:
      ok: bool[], false if a pool was out of pages, and what was compressed is lost.
      free_entries: i32[] each, table entries left in the pools.
      usage: none: the host counts rows exactly.
    """

    ok: jax.Array
    free_entries: Entries
    usage: None = None


def compress_full_rings(
    params: Any,
    cache: DeltaCache,
    rows: jax.Array,
    length: jax.Array,
    *,
    spec: StoreSpec,
    implementation: Implementation | None,
) -> tuple[DeltaCache, StoreOutput]:
    """Compresses the oldest `recent` tokens of rows whose rings are full. The cache is meant to be donated.

    Args:
      params: with those of the compressor, as the steps take them.
      rows: i32[U]; 0 for idle lanes.
      length: i32[U], tokens of each text.
    """
    geometry, layout = spec.geometry, cache.layout
    rows, length = jnp.asarray(rows), jnp.asarray(length)
    positions = geometry.history(length - 1)[:, None] + jnp.arange(geometry.recent, dtype=jnp.int32)  # [U, R]
    cache, ok = allocate_delta(
        cache,
        rows,
        near=geometry.centers(length) - geometry.centers(length - 1),
        latent=geometry.latents(length) - geometry.latents(length - 1),
        max_count=Entries(1, geometry.recent, geometry.recent),
    )
    live = jnp.broadcast_to((rows > 0)[:, None] & ok, positions.shape)
    ring_rows = jnp.where(live, layout.ring_row(rows)[:, None], 0)
    for layer in layout.sparse_layers:
        index = layout.index(layer)
        cache, (k, v) = take_near(cache, index, ring_rows, jnp.where(live, positions % geometry.ring, 0))
        cache = compress_tokens(
            cache, layer, rows, positions, live, k, v, spec=spec, params=params, implementation=implementation
        )
    return cache, StoreOutput(ok=ok, free_entries=free_delta_entries(cache))


def compress_chunk(
    cache: DeltaCache,
    layer: int,
    row: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: StoreSpec,
    params: Any,
    implementation: Implementation | None,
) -> DeltaCache:
    """Takes a chunk's tokens into one sparse layer: what leaves the recent window is compressed, the rest waits.

    Args:
      row, start, stop: i32[]: the row, tokens of its text before the chunk and with it.
      k, v: [T, H, D] of the packed chunk, the row's tokens first; keys before RoPE.
    """
    geometry, layout = spec.geometry, cache.layout
    index = layout.index(layer)
    # The ring holds what waited before the chunk.
    positions = geometry.history(start) + jnp.arange(k.shape[0] + geometry.ring, dtype=jnp.int32)  # [N]
    waited = (row > 0) & (positions < start)
    new = (row > 0) & (positions >= start) & (positions < stop)
    ring_row, ring_slot = layout.ring_row(row), positions % geometry.ring
    cache, held = take_near(cache, index, jnp.where(waited, ring_row, 0), jnp.where(waited, ring_slot, 0))
    place = jnp.clip(positions - start, 0, k.shape[0] - 1)
    k, v = (jnp.where(waited[:, None, None], old, fresh[place]) for old, fresh in zip(held, (k, v), strict=True))
    leaves = positions < geometry.history(stop)
    cache = compress_tokens(
        cache,
        layer,
        row[None],
        positions[None],
        (leaves & (waited | new))[None],
        k[None],
        v[None],
        spec=spec,
        params=params,
        implementation=implementation,
    )
    waits = near_slots(cache, jnp.where(new & ~leaves, ring_row, 0), ring_slot)
    return store_near(cache, index, waits, k, v, implementation=implementation)


def compress_tokens(
    cache: DeltaCache,
    layer: int,
    rows: jax.Array,
    positions: jax.Array,
    live: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: StoreSpec,
    params: Any,
    implementation: Implementation | None,
) -> DeltaCache:
    """Stores tokens of one sparse layer as centers and latents, for which the tables have room.

    Args:
      rows: i32[U].
      positions, live: i32 and bool [U, N].
      k, v: [U, N, H, D], keys before RoPE.
    """
    geometry, index = spec.geometry, cache.layout.index(layer)
    center = geometry.is_center(positions)
    owner = jnp.where(live, rows[:, None], 0)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    # Centers first: tokens of the same block may refer to them.
    mapping = near_slots(
        cache, flat(jnp.where(center, owner, 0)), flat(jnp.asarray(geometry.center_ordinals(positions), jnp.int32))
    )
    cache = store_near(cache, index, mapping, flat(k), flat(v), implementation=implementation)
    x = signals(k, v)  # [U, N, F]
    ids = find_references(cache, index, rows, positions, x, spec=spec)  # [U, N, K]
    mean = reference_means(cache, index, jnp.broadcast_to(rows[:, None], positions.shape), ids)
    compressor = Compressor(spec.compressor, x.dtype)
    latent: Any = compressor.apply({"params": params["compressor"][f"layers_{layer}"]}, x, mean, method="encode")
    return store_latents(
        cache,
        index,
        flat(jnp.where(center, 0, owner)),
        flat(jnp.asarray(geometry.latent_ordinals(positions), jnp.int32)),
        flat(latent),
        flat(ids),
    )


def take_near(
    cache: DeltaCache, index: int, rows: jax.Array, slots: jax.Array
) -> tuple[DeltaCache, tuple[jax.Array, jax.Array]]:
    """`read_near` of slots that are overwritten next, in an order that XLA keeps without copying the pool."""
    taken = read_near(cache, index, rows, slots)
    pool = cache.near.pool
    taken, (k_pages, v_pages) = jax.lax.optimization_barrier((taken, (pool.k, pool.v)))
    return replace(cache, near=replace(cache.near, pool=replace(pool, k=k_pages, v=v_pages))), taken
