"""What a sparse layer does with its pools, in plain XLA: read tokens back, attend to some of them, find references.

A stand-in for kernels of the same meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.cache import DeltaCache
from sparsejax.compressor import Compressor, CompressorConfig, StoreGeometry, reference_search
from sparsejax.models.rope import RopeConfig, apply_rope, rope_cos_sin


@dataclass(frozen=True)
class StoreSpec:
    """How an engine stores requests compressed: static.

    Attributes:
      compressor: sizes and kinds of the projections, and how references are chosen.
      geometry: which tokens are sinks, centers, latents and recent.
      rope: of the model.
    """

    compressor: CompressorConfig
    geometry: StoreGeometry
    rope: RopeConfig


def rotate(spec: StoreSpec, k: jax.Array, positions: jax.Array) -> jax.Array:
    """Keys [..., H, D] at their positions [...]."""
    shape = k.shape
    cos, sin = rope_cos_sin(spec.rope, shape[-1], positions.reshape(-1))
    return apply_rope(k.reshape(-1, *shape[-2:]), cos, sin).reshape(shape)


def read_near(cache: DeltaCache, index: int, rows: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K and V [..., H, D] in slots [...] of near rows [...], which hold them."""
    layout = cache.layout.near
    entry = cache.near.table.pages[0, rows, 0, slots // layout.page_size]
    page = layout.address(index).page(entry[..., None], jnp.arange(layout.num_kv_heads))  # [..., H]
    slot = (slots % layout.page_size)[..., None]
    return cache.near.pool.k[page, slot], cache.near.pool.v[page, slot]


def read_history(
    cache: DeltaCache, index: int, rows: jax.Array, positions: jax.Array, *, spec: StoreSpec, params: Any
) -> tuple[jax.Array, jax.Array]:
    """K before RoPE and V [..., H, D] of history tokens, sinks included; anything at positions that are no history."""
    geometry = spec.geometry
    rows, positions = jnp.broadcast_arrays(rows, positions)
    center = geometry.is_center(positions)
    exact = read_near(cache, index, rows, jnp.where(center, geometry.center_ordinals(positions), 0))
    layout = cache.layout.latent
    ordinal = jnp.where(center, 0, geometry.latent_ordinals(positions))
    page = layout.address(index).page(cache.latent.table.pages[0, rows, 0, ordinal // layout.page_size], 0)
    pool = cache.latent.pool
    latent = pool.latent[page, ordinal % layout.page_size]  # [..., d]
    ids = pool.reference[page, ordinal % layout.page_size].astype(jnp.int32)  # [..., K]
    mean = reference_means(cache, index, rows, ids)
    read: Any = Compressor(spec.compressor, mean.dtype).apply({"params": params}, latent, mean, method="decode")
    k, v = jnp.split(read.reshape(*positions.shape, -1, exact[0].shape[-1]), 2, axis=-2)
    here = center[..., None, None]
    return jnp.where(here, exact[0], k), jnp.where(here, exact[1], v)


def reference_means(cache: DeltaCache, index: int, rows: jax.Array, ids: jax.Array) -> jax.Array:
    """[..., F]: mean signal of the centers ids [..., K] of rows [...]."""
    rows = jnp.broadcast_to(rows[..., None], ids.shape)
    signal = signals(*read_near(cache, index, rows, ids))  # [..., K, F]
    return jnp.mean(signal.astype(jnp.float32), axis=-2).astype(signal.dtype)


def signals(k: jax.Array, v: jax.Array) -> jax.Array:
    """[..., F] of K before RoPE and V [..., H, D]."""
    return jnp.concatenate([k.reshape(*k.shape[:-2], -1), v.reshape(*v.shape[:-2], -1)], axis=-1)


def find_references(
    cache: DeltaCache, index: int, rows: jax.Array, positions: jax.Array, x: jax.Array, *, spec: StoreSpec
) -> jax.Array:
    """i32[U, N, K]: nearest centers of tokens, of those stored at or before them.

    Args:
      rows: i32[U].
      positions: i32[U, N].
      x: [U, N, F].
    """
    geometry, config = spec.geometry, spec.compressor
    count = geometry.centers(cache.layout.full.max_slots + geometry.ring)
    slots = jnp.arange(count, dtype=jnp.int32)
    held = slots < cache.near.table.length[0, rows, 0][:, None]  # [U, M]
    k, v = read_near(cache, index, jnp.broadcast_to(rows[:, None], held.shape), jnp.where(held, slots, 0))
    centers = jnp.where(held[..., None], signals(k, v), 0)

    def search(x, centers, positions):
        if not config.cluster_on_kv:
            x, centers = (each[..., : each.shape[-1] // 2] for each in (x, centers))
        ids, _ = reference_search(
            x[None],
            centers[None],
            positions,
            neighbors=config.neighbors,
            sinks=geometry.sinks,
            step=geometry.step,
            metric=config.cluster_metric,
        )
        return ids[0]

    return jax.vmap(search)(x, centers, positions)


def reconstruct_rows(
    cache: DeltaCache, index: int, rows: jax.Array, length: jax.Array, *, spec: StoreSpec, params: Any, size: int
) -> tuple[jax.Array, jax.Array]:
    """K after RoPE and V [U, size, H, D] of the first tokens of rows that hold texts of `length` i32[U] tokens."""
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (rows.shape[0], size))
    end = spec.geometry.history(length)[:, None]
    rows = jnp.broadcast_to(rows[:, None], positions.shape)
    past = positions < jnp.minimum(end, length[:, None])
    k, v = read_history(cache, index, jnp.where(past, rows, 0), jnp.where(past, positions, 0), spec=spec, params=params)
    waits = (positions >= end) & (positions < length[:, None])
    ring_rows = jnp.where(waits, cache.layout.ring_row(rows), 0)
    recent = read_near(cache, index, ring_rows, jnp.where(waits, positions % spec.geometry.ring, 0))
    live = (past | waits)[..., None, None]
    k, v = (
        jnp.where(live, jnp.where(past[..., None, None], old, new), 0) for old, new in zip((k, v), recent, strict=True)
    )
    return rotate(spec, k, positions), v


def attend_selected(
    cache: DeltaCache,
    index: int,
    q: jax.Array,
    rows: jax.Array,
    length: jax.Array,
    selected: jax.Array,
    *,
    spec: StoreSpec,
    params: Any,
) -> jax.Array:
    """Attention [B, Hq, D] from one query a row to its sinks, selected history and recent tokens.

    Args:
      rows: i32[B], 0 for idle lanes, whose result is 0.
      length: i32[B], tokens of each text, the query's own (the last one) included; it has not been compressed behind.
      selected: i32[B, T], positions; -1 for none.
    """
    geometry = spec.geometry
    end = geometry.history_at_query(length)[:, None]
    sinks = jnp.broadcast_to(jnp.arange(geometry.sinks, dtype=jnp.int32), (rows.shape[0], geometry.sinks))
    past = jnp.concatenate([sinks, selected], axis=1)  # [B, S + T]
    waiting = end + jnp.arange(geometry.ring, dtype=jnp.int32)  # [B, ring]
    owner = rows[:, None]
    real = owner > 0
    past_live = real & (past >= 0) & (past < jnp.minimum(end, length[:, None]))
    waits = real & (waiting < length[:, None])
    safe = jnp.where(past_live, past, 0)
    old = read_history(cache, index, jnp.where(past_live, owner, 0), safe, spec=spec, params=params)
    ring_rows = jnp.where(waits, cache.layout.ring_row(owner), 0)
    recent = read_near(cache, index, ring_rows, jnp.where(waits, waiting % geometry.ring, 0))
    k, v = (jnp.concatenate(both, axis=1) for both in zip(old, recent, strict=True))  # [B, N, H, D]
    live = jnp.concatenate([past_live, waits], axis=1)
    k = rotate(spec, k, jnp.concatenate([safe, waiting], axis=1))
    k, v = (jnp.where(live[..., None, None], each, 0).astype(jnp.float32) for each in (k, v))
    heads, dim = k.shape[-2:]
    grouped = q.astype(jnp.float32).reshape(q.shape[0], heads, -1, dim)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bhgd,bnhd->bhgn", grouped, k) * dim**-0.5
        scores = jnp.where(live[:, None, None], scores, -1e30)
        weights = jnp.where(live[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
        out = jnp.einsum("bhgn,bnhd->bhgd", weights, v)
    return out.reshape(q.shape).astype(q.dtype)
