"""Reading tokens of a DeltaKV request back, as an XLA program, for backends without Triton."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.delta_store import DeltaLayout, DeltaStore, Places, check_rows, check_store, tokens_at
from pallas_kernels.latents import dequantise


def read_latents(
    store: DeltaStore, rows: jax.Array, history: jax.Array, positions: jax.Array, *, layout: DeltaLayout
) -> jax.Array:
    """The latents of listed tokens: what an `up` that is no matrix is applied to, for `delta_reconstruct(residual=)`.

    Args:
      rows, history: i32[B]; see `delta_store`.
      positions: i32[B, T], below 0: unused.

    Returns:
      [B, T, d] in the type of the near pool; 0 for tokens that have no latent.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_store(store, layout, None)
    check_rows(positions.shape[0], rows=rows, history=history)
    layout, *layers = layout.split_layer()
    return _read_latents(store, rows, history, positions, *layers, layout=layout)


@functools.partial(jax.jit, static_argnames=("layout",))
def _read_latents(store, rows, history, positions, near_layer, latent_layer, *, layout):
    layout = layout.join_layer(near_layer, latent_layer)
    return latents_at(store, places_of(store, rows, rows, history, positions, layout=layout).latent)


def places_of(store: DeltaStore, rows, recent_rows, history, positions, *, layout: DeltaLayout) -> Places:
    """Where the tokens at positions i32[B, T] are."""
    rows, recent_rows, history = (x[:, None] for x in (rows, recent_rows, history))
    live = positions >= 0
    compressed, row, own = tokens_at(rows, recent_rows, history, positions, layout=layout)
    compressed &= live
    reference = store.latents.reference
    page_size = reference.shape[1]
    slot = jnp.where(compressed, own, 0)
    page = layout.latent.page(store.latent_table[0, rows, 0, slot // page_size], 0)
    slot %= page_size
    centers = jnp.where(compressed[..., None], reference[page, slot].astype(jnp.int32), own[..., None])
    near_size = store.k_pages.shape[1]
    near_page = layout.near.page(store.near_table[0, row[..., None], 0, centers // near_size], 0)
    near = jnp.where(live[..., None], near_page * near_size + centers % near_size, -1)
    return Places(jnp.moveaxis(near, 2, 1), jnp.where(compressed, page * page_size + slot, -1))


@jax.jit
def latents_at(store: DeltaStore, latent: jax.Array) -> jax.Array:
    """[B, T, d] in the type of the near pool: the latents at `Places.latent`; 0 of tokens that have none."""
    return _latents(store, latent).astype(store.k_pages.dtype)


def _latents(store: DeltaStore, latent: jax.Array) -> jax.Array:
    """The same in float32."""
    row, pages = jnp.maximum(latent, 0), store.latents
    values = pages.values.reshape(-1, pages.values.shape[2])[row]
    if pages.scale is None:
        z = values.astype(jnp.float32)
    else:
        z = dequantise(values, pages.scale.reshape(-1, pages.scale.shape[2])[row])
    return jnp.where((latent >= 0)[..., None], z, 0.0)


def mean_of(pool, page_table, row, ids, *, address, heads: int) -> jax.Array:
    """f32[..., H, D]: mean over K of the vectors at logical slots ids i32[..., K] of table rows i32[...]."""
    page_size = pool.shape[1]
    entry = page_table[0, row[..., None], 0, ids // page_size]  # [..., K]
    page = address.page(entry[..., None], jnp.arange(heads, dtype=jnp.int32))  # [..., K, H]
    return pool[page, (ids % page_size)[..., None]].astype(jnp.float32).mean(axis=-3)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x f32[B, T, H, D] by cos, sin f32[B, T, D/2] in the half-split layout."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def read_back(store: DeltaStore, places: Places, cos, sin, up, up_bias, residual, *, layout: DeltaLayout, heads: int):
    """(K after RoPE f32[B, T, H, D], V f32[B, T, H, D]) of listed tokens; unused ones come out as anything finite."""
    page_size, dim = store.k_pages.shape[1:]
    head_rows = layout.near.head_stride * page_size * jnp.arange(heads, dtype=jnp.int32)
    near = jnp.maximum(places.near, 0)[..., None] + head_rows  # [B, K, T, H]
    used = (places.near[:, 0] >= 0)[..., None, None]
    k, v = (
        jnp.where(used, pool.reshape(-1, dim)[near].astype(jnp.float32).mean(axis=1), 0.0)
        for pool in (store.k_pages, store.v_pages)
    )
    if residual is None:
        residual = jnp.einsum(
            "btd,df->btf", _latents(store, places.latent), up.astype(jnp.float32), precision="highest"
        )
        residual = residual if up_bias is None else residual + up_bias.astype(jnp.float32)
    residual = jnp.where((places.latent >= 0)[..., None], residual.astype(jnp.float32), 0.0)
    residual = residual.reshape(*places.latent.shape, 2, heads, dim)
    return rotate(k + residual[:, :, 0], cos, sin), v + residual[:, :, 1]
