"""Compressing tokens of the sparse layers: behind each layer of a prefill chunk, and in a program for decodes.

    cache, output = compress_full_rings(params, cache, rows, length, spec=..., implementation=...)

runs behind the decode step that filled the rings of some rows, which the host knows by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation, delta_compress, in_order, reference_mean, reference_search, store_latents
from pallas_kernels.reference_search import token_rows
from sparsejax.cache import (
    DeltaCache,
    Entries,
    allocate_delta,
    free_delta_entries,
    latent_slots,
    near_slots,
    read_near,
    store_near,
)
from sparsejax.compressor import Compressor
from sparsejax.engine.programs.delta_ops import SparseLayer, StoreSpec

_Values = TypeVar("_Values")


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
      rows: i32[U]; 0 for idle lanes, which come last.
      length: i32[U], tokens of each text.
    """
    geometry, layout = spec.geometry, cache.layout
    rows, length = jnp.asarray(rows), jnp.asarray(length)
    cache, ok = allocate_delta(
        cache,
        rows,
        near=geometry.centers(length) - geometry.centers(length - 1),
        latent=geometry.latents(length) - geometry.latents(length - 1),
        max_count=Entries(1, geometry.recent, geometry.recent),
    )
    rows = jnp.where(ok, rows, 0)
    num_lanes = rows.shape[0]
    starts = geometry.recent * jnp.minimum(jnp.arange(num_lanes + 1, dtype=jnp.int32), (rows > 0).sum())
    positions = geometry.history(length - 1)[:, None] + jnp.arange(geometry.recent, dtype=jnp.int32)
    positions = positions.reshape(-1)  # [U * R]
    ring_rows = jnp.repeat(jnp.asarray(layout.ring_row(rows)), geometry.recent)
    for layer in layout.sparse_layers:
        cache, (k, v) = take_near(
            cache, layout.index(layer), ring_rows, positions % geometry.ring, implementation=implementation
        )
        at = SparseLayer(cache, layer, spec, params["compressor"][f"layers_{layer}"], implementation)
        cache = compress_tokens(at, rows, starts, positions, k, v)
    return cache, StoreOutput(ok=ok, free_entries=free_delta_entries(cache))


def compress_chunk(
    at: SparseLayer, row: jax.Array, start: jax.Array, stop: jax.Array, k: jax.Array, v: jax.Array
) -> DeltaCache:
    """Takes a chunk's tokens into a sparse layer: what leaves the recent window is compressed, the rest waits.

    Args:
      row, start, stop: i32[]: the row, tokens of its text before the chunk and with it. The tables have room.
      k, v: [T, H, D] of the packed chunk, the row's tokens first; keys before RoPE.
    """
    geometry, layout = at.spec.geometry, at.cache.layout
    index = layout.index(at.layer)
    # The ring holds what waited before the chunk.
    first = geometry.history(start)
    positions = first + jnp.arange(k.shape[0] + geometry.ring, dtype=jnp.int32)  # [N]
    waited = (row > 0) & (positions < start)
    new = (row > 0) & (positions >= start) & (positions < stop)
    ring_row, ring_slot = layout.ring_row(row), positions % geometry.ring
    cache, held = take_near(
        at.cache,
        index,
        jnp.where(waited, ring_row, 0),
        jnp.where(waited, ring_slot, 0),
        implementation=at.implementation,
    )
    place = jnp.clip(positions - start, 0, k.shape[0] - 1)
    k, v = (jnp.where(waited[:, None, None], old, fresh[place]) for old, fresh in zip(held, (k, v), strict=True))
    leaving = jnp.where(row > 0, geometry.history(stop) - first, 0)
    starts = jnp.stack([jnp.zeros_like(leaving), leaving])
    cache = compress_tokens(replace(at, cache=cache), row[None], starts, positions, k, v)
    waits = new & (positions >= geometry.history(stop))
    mapping = near_slots(cache, jnp.where(waits, ring_row, 0), ring_slot)
    return store_near(cache, index, mapping, k, v, implementation=at.implementation)


def compress_tokens(
    at: SparseLayer, rows: jax.Array, starts: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array
) -> DeltaCache:
    """Stores tokens of a sparse layer as centers and latents, for which the tables have room.

    Args:
      rows: i32[S], one segment each.
      starts: i32[S + 1], tokens of the segments; what is behind the last is padding.
      positions: i32[N], ascending in each segment.
      k, v: [N, H, D], keys before RoPE.
    """
    geometry, config, cache = at.spec.geometry, at.spec.compressor, at.cache
    address, implementation = at.layout.near, at.implementation
    center, owner = geometry.is_center(positions), token_rows(rows, starts, positions.shape[0])
    # Centers first: tokens of the same block may refer to them.
    ordinals = jnp.asarray(geometry.center_ordinals(positions), jnp.int32)
    mapping = near_slots(cache, jnp.where(center, owner, 0), ordinals)
    cache = store_near(cache, cache.layout.index(at.layer), mapping, k, v, implementation=implementation)
    near = (cache.near.pool.k, cache.near.pool.v, cache.near.table.pages)
    common: dict[str, Any] = {
        "address": address,
        "num_kv_heads": at.num_kv_heads,
        "implementation": implementation,
    }
    x = jnp.concatenate([k.reshape(k.shape[0], -1), v.reshape(v.shape[0], -1)], axis=-1)  # [N, F]
    ids = reference_search(
        x if config.cluster_on_kv else x[:, : x.shape[1] // 2],
        *near,
        rows,
        starts,
        positions,
        neighbors=config.neighbors,
        sinks=geometry.sinks,
        step=geometry.step,
        metric=config.cluster_metric,
        **common,
    )
    down = at.matrix("down")
    if down is not None:
        latent = delta_compress(x, *near, rows, starts, ids, down["kernel"], **common)
    else:
        mean = reference_mean(*near, rows, starts, ids, **common)
        compressor = Compressor(config, x.dtype)
        latent: Any = compressor.apply({"params": at.params}, x, mean, method="encode")
    mapping = latent_slots(
        cache, jnp.where(center, 0, owner), jnp.asarray(geometry.latent_ordinals(positions), jnp.int32)
    )
    pool = store_latents(
        cache.latent.pool, latent, ids, mapping.entry[0, :, 0], mapping.slot[0, :, 0], address=at.layout.latent
    )
    cache = replace(cache, latent=replace(cache.latent, pool=pool))
    # The next layer writes to the pools in which the references have been searched.
    return written_after(cache, ids, implementation=implementation)[0]


def take_near(
    cache: DeltaCache, index: int, rows: jax.Array, slots: jax.Array, *, implementation: Implementation | None
) -> tuple[DeltaCache, tuple[jax.Array, jax.Array]]:
    """`read_near` of slots that are overwritten next."""
    return written_after(cache, read_near(cache, index, rows, slots), implementation=implementation)


def written_after(
    cache: DeltaCache, values: _Values, *, implementation: Implementation | None
) -> tuple[DeltaCache, _Values]:
    """The cache and the values, such that what is written to the sparse layers' pools next comes behind the values.

    Where nothing else orders a read and a write of a pool, XLA may take the write first, and must copy the pool then.
    """
    near, latent = cache.near, cache.latent
    values, (k, v, latents) = in_order((values, (near.pool.k, near.pool.v, latent.pool)), implementation=implementation)
    near = replace(near, pool=replace(near.pool, k=k, v=v))
    return replace(cache, near=near, latent=replace(latent, pool=latents)), values
