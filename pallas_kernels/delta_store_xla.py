"""Reading tokens of a DeltaKV request back, as an XLA program, for backends without Triton."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.delta_store import DeltaLayout, DeltaStore, check_rows, check_store, tokens_at
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
    z, *_ = parts_of(store, rows, rows, history, positions, layout=layout)
    return z.astype(store.k_pages.dtype)


def parts_of(store: DeltaStore, rows, recent_rows, history, positions, *, layout: DeltaLayout):
    """(z f32[B, T, d], 0 without a latent; compressed bool[B, T]; row i32[B, T]; ids i32[B, T, K] near slots).

    The mean of the slots is the token's reference. One that is kept exactly is its own reference, K times.
    """
    rows, recent_rows, history = (x[:, None] for x in (rows, recent_rows, history))
    compressed, row, slot = tokens_at(rows, recent_rows, history, positions, layout=layout)
    latents = store.latents
    page_size = latents.values.shape[1]
    at = jnp.where(compressed, slot, 0)
    entry = store.latent_table[0, rows, 0, at // page_size]
    page, place = layout.latent.page(entry, 0), at % page_size
    if latents.scale is None:
        z = latents.values[page, place].astype(jnp.float32)
    else:
        z = dequantise(latents.values[page, place], latents.scale[page, place])
    reference = latents.reference[page, place].astype(jnp.int32)
    ids = jnp.where(compressed[..., None], reference, slot[..., None])
    return jnp.where(compressed[..., None], z, 0.0), compressed, row, ids


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


def read_back(
    store: DeltaStore, rows, recent_rows, history, positions, cos, sin, up, up_bias, residual, *, layout, heads
):
    """(K after RoPE f32[B, T, H, D], V f32[B, T, H, D]) of listed tokens; unused ones come out as anything finite."""
    dim = store.k_pages.shape[2]
    z, compressed, row, ids = parts_of(store, rows, recent_rows, history, positions, layout=layout)
    used = (positions >= 0)[..., None, None]
    k, v = (
        jnp.where(used, mean_of(pool, store.near_table, row, ids, address=layout.near, heads=heads), 0.0)
        for pool in (store.k_pages, store.v_pages)
    )
    if residual is None:
        residual = jnp.einsum("btd,df->btf", z, up.astype(jnp.float32), precision="highest")
        residual = residual if up_bias is None else residual + up_bias.astype(jnp.float32)
    residual = jnp.where(compressed[..., None], residual.astype(jnp.float32), 0.0)
    residual = residual.reshape(*positions.shape, 2, heads, dim)
    return rotate(k + residual[:, :, 0], cos, sin), v + residual[:, :, 1]
