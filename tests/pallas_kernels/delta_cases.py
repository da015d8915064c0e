"""Random DeltaKV stores for the kernels' tests: permuted entries, NaN wherever nothing may be read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import DeltaLayout, DeltaStore, LatentPages, PageAddress, quantise
from pallas_kernels.centers import center_count, latent_count

LAYERS, LAYER = 3, 1


class DeltaCase(NamedTuple):
    """Requests in a store. Request b has its history in row b + 1 and recent tokens in row b + 1 + requests."""

    store: DeltaStore
    layout: DeltaLayout
    rows: jax.Array
    recent_rows: jax.Array
    history: jax.Array
    lengths: jax.Array


def make_delta(
    *,
    histories,
    recents,
    heads: int,
    dim: int,
    size: int,
    page: int,
    dtype,
    latent_dtype="float32",
    sinks: int = 3,
    step: int = 4,
    ring: int = 12,
    neighbors: int = 4,
    seed: int = 0,
    reference_dtype=jnp.uint16,
) -> DeltaCase:
    """A store of len(histories) requests; request b has histories[b] + recents[b] tokens."""
    rng = np.random.default_rng(seed)
    batch = len(histories)
    centers = [center_count(n, sinks=sinks, step=step) for n in histories]
    latents = [latent_count(n, sinks=sinks, step=step) for n in histories]
    layout = DeltaLayout(
        near=PageAddress(0, LAYERS * heads, LAYER * heads, 1),
        latent=PageAddress(0, LAYERS, LAYER, 1),
        sinks=sinks,
        step=step,
        ring=ring,
    )
    held = [set(range(n)) for n in centers]
    held += [{p % ring for p in range(h, h + r)} for h, r in zip(histories, recents, strict=True)]
    near_table, (k, v) = _pages(rng, held, layout.near, heads, page, (2, dim))
    latent_table, (z, _) = _pages(rng, [set(range(n)) for n in latents], layout.latent, 1, page, (2, size))
    reference = np.zeros((*z.shape[:2], neighbors), np.int64)
    for b, count in enumerate(latents):
        slot = np.arange(count)
        at = layout.latent.page(latent_table[0, b + 1, 0, slot // page], 0), slot % page
        reference[at] = rng.integers(0, max(centers[b], 1), (count, neighbors))
    if latent_dtype == "int4":
        codes, scale = quantise(jnp.asarray(np.nan_to_num(z), jnp.float32))
        pages = LatentPages(codes, scale, jnp.asarray(reference, reference_dtype))
    else:
        pages = LatentPages(jnp.asarray(z, latent_dtype), None, jnp.asarray(reference, reference_dtype))
    store = DeltaStore(
        jnp.asarray(k, dtype), jnp.asarray(v, dtype), jnp.asarray(near_table), pages, jnp.asarray(latent_table)
    )
    rows = np.arange(1, batch + 1, dtype=np.int32)
    history = np.asarray(histories, np.int32)
    return DeltaCase(
        store,
        layout,
        jnp.asarray(rows),
        jnp.asarray(rows + batch),
        jnp.asarray(history),
        jnp.asarray(history + np.asarray(recents, np.int32)),
    )


def _pages(rng, held, address, heads, page, shape):
    """(table i32[1, rows + 1, 1, M], arrays [2, P, page, n]); row i + 1 holds the slots of held[i], NaN elsewhere."""
    used = [-(-(max(slots, default=-1) + 1) // page) for slots in held]
    entries = sum(used) + 3
    order = rng.permutation(np.arange(1, entries))
    table = np.zeros((1, len(held) + 1, 1, max(*used, 1) + 1), np.int32)
    pool = np.full((shape[0], entries * address.entry_stride, page, shape[1]), np.nan, np.float32)
    taken = 0
    for i, slots in enumerate(held):
        table[0, i + 1, 0, : used[i]] = order[taken : taken + used[i]]
        taken += used[i]
        slot = np.asarray(sorted(slots), np.int64)
        for head in range(heads):
            at = address.page(table[0, i + 1, 0, slot // page], head), slot % page
            pool[:, at[0], at[1]] = rng.standard_normal((shape[0], slot.size, shape[1]))
    return table, pool


def rotations(positions, dim: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) f32[..., D/2] of positions."""
    frequency = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    angle = np.asarray(positions)[..., None] * frequency
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def abstract_store(*, heads: int, dim: int, size: int, dtype, latent_dtype, requests: int, page: int = 32, layers=27):
    """(DeltaStore of ShapeDtypeStructs for `requests` of 128k tokens, its DeltaLayout), for lowering."""
    shape = jax.ShapeDtypeStruct
    near = shape((requests * 440 * layers * heads, page, dim), dtype)
    latent_pages = requests * 3700 * layers
    if latent_dtype == "int4":
        values = shape((latent_pages, page, size // 4), jnp.uint16)
        scale = shape((latent_pages, page, size // 32), jnp.bfloat16)
    else:
        values, scale = shape((latent_pages, page, size), jnp.dtype(latent_dtype)), None
    return (
        DeltaStore(
            near,
            near,
            shape((1, 2 * requests + 1, 1, 440), jnp.int32),
            LatentPages(values, scale, shape((latent_pages, page, 4), jnp.uint16)),
            shape((1, requests + 1, 1, 3700), jnp.int32),
        ),
        DeltaLayout(
            near=PageAddress(0, layers * heads, 5 * heads, 1),
            latent=PageAddress(0, layers, 5, 1),
            sinks=16,
            step=10,
            ring=256,
        ),
    )
