"""Latents of tokens that leave the recent window: the difference from their references, projected (arXiv:2602.08005).

`z = down(x) - down(r)`, r being the mean of the token's K references. For a matrix `down` that is `down(x - r)`, which
`delta_compress` computes in one kernel; its bias cancels. For other projections `reference_mean` gives r.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import check_integer, check_shape
from pallas_kernels.delta_compress_triton import (
    CompressTile,
    default_tile,
    delta_compress_triton,
    reference_mean_triton,
)
from pallas_kernels.delta_store_xla import mean_of
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress
from pallas_kernels.reference_search import check_near, check_segments, token_rows


def reference_mean(
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    ids: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """The mean of the K references of each token.

    Args:
      k_pages, v_pages, page_table, rows, starts, address, num_kv_heads: as in `reference_search`.
      ids: i32[N, K] center ordinals, of the segments' rows. One that occurs twice counts twice.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      [N, 2*H*D] in the type of the pools, summed in float32 and rounded once. Padding holds anything.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check(k_pages, v_pages, page_table, rows, starts, ids, address, num_kv_heads)
    implementation, interpret = resolve(implementation, interpret)
    features = 2 * num_kv_heads * k_pages.shape[2]
    if 0 in (ids.shape[0], rows.shape[0]):
        return jnp.zeros((ids.shape[0], features), k_pages.dtype)
    common, layer = address.split_layer()
    where = (page_table, *_padded_rows(rows, starts, ids), layer)
    if implementation == "xla":
        return _mean_xla(k_pages, v_pages, *where, address=common, heads=num_kv_heads).astype(k_pages.dtype)
    return reference_mean_triton(k_pages, v_pages, *where, address=common, heads=num_kv_heads, interpret=interpret)


def reference_mean_reference(
    k_pages, v_pages, page_table, rows, starts, ids, *, address: PageAddress, num_kv_heads: int
) -> jax.Array:
    """The meaning of `reference_mean`, one token after the other, in float32 (arguments concrete); 0 for padding."""
    page_size = k_pages.shape[1]
    pools = [np.asarray(pool) for pool in (k_pages, v_pages)]
    of_token = np.asarray(token_rows(rows, starts, ids.shape[0]))
    ids, table = np.asarray(ids), np.asarray(page_table)
    out = np.zeros((ids.shape[0], 2, num_kv_heads, k_pages.shape[2]), np.float32)
    for t in range(int(starts[-1])):
        for slot in ids[t]:
            entry = int(table[0, of_token[t], 0, slot // page_size])
            pages = [int(address.page(entry, head)) for head in range(num_kv_heads)]
            out[t] += np.stack([pool[pages, slot % page_size].astype(np.float32) for pool in pools]) / ids.shape[1]
    return jnp.asarray(out.reshape(ids.shape[0], -1))


def delta_compress(
    x: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    ids: jax.Array,
    down: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    tile: CompressTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Latents of tokens for a linear `down`: `(x - mean of the references) @ down`.

    The difference is rounded to the type of the pools before the product, whose sum is float32.

    Args:
      x: [N, 2*H*D] signals, concat(K before RoPE, V) over all KV heads; used at the precision of the pools.
      k_pages, v_pages, page_table, rows, starts, ids, address, num_kv_heads: as in `reference_mean`.
      down: [2*H*D, d], used at the precision of the pools.
      tile: tile sizes of the kernel, for tuning.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      f32[N, d], for `store_latents`. Padding holds anything.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check(k_pages, v_pages, page_table, rows, starts, ids, address, num_kv_heads)
    features = 2 * num_kv_heads * k_pages.shape[2]
    check_shape("x", x, (ids.shape[0], features))
    check_shape("down", down, (features, None))
    implementation, interpret = resolve(implementation, interpret)
    if 0 in (ids.shape[0], rows.shape[0]):
        return jnp.zeros((ids.shape[0], down.shape[1]), jnp.float32)
    common, layer = address.split_layer()
    x, down = x.astype(k_pages.dtype), down.astype(k_pages.dtype)
    row, ids = _padded_rows(rows, starts, ids)
    if implementation == "xla":
        mean = _mean_xla(k_pages, v_pages, page_table, row, ids, layer, address=common, heads=num_kv_heads)
        delta = (x.astype(jnp.float32) - mean).astype(x.dtype)
        return jnp.dot(delta, down, precision="highest", preferred_element_type=jnp.float32)
    return delta_compress_triton(
        x, k_pages, v_pages, page_table, row, ids, down, layer, address=common, heads=num_kv_heads,
        tile=tile or default_tile(k_pages), interpret=interpret,
    )  # fmt: skip


def delta_compress_reference(
    x, k_pages, v_pages, page_table, rows, starts, ids, down, *, address: PageAddress, num_kv_heads: int
) -> jax.Array:
    """The meaning of `delta_compress` in float32."""
    mean = reference_mean_reference(
        k_pages, v_pages, page_table, rows, starts, ids, address=address, num_kv_heads=num_kv_heads
    )
    with jax.default_matmul_precision("highest"):
        return (x.astype(jnp.float32) - mean) @ down.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("address", "heads"))
def _mean_xla(k_pages, v_pages, page_table, row, ids, layer, *, address, heads):
    """f32[N, 2*H*D]."""
    address = address.join_layer(layer)
    means = [mean_of(pool, page_table, row, ids, address=address, heads=heads) for pool in (k_pages, v_pages)]
    return jnp.concatenate([mean.reshape(ids.shape[0], -1) for mean in means], axis=1)


def _padded_rows(rows, starts, ids):
    """(row i32[N] of every token, ids with those of padding 0: it reads what is there, whatever its ids say)."""
    row = token_rows(rows, starts, ids.shape[0])
    return row, jnp.where((jnp.arange(ids.shape[0], dtype=jnp.int32) < starts[-1])[:, None], ids, 0)


def _check(k_pages, v_pages, page_table, rows, starts, ids, address, num_kv_heads) -> None:
    check_near(k_pages, v_pages, page_table, address, num_kv_heads)
    check_segments(rows, starts)
    check_shape("ids", ids, (None, None))
    check_integer(ids=ids)
    if ids.shape[1] < 1:
        raise ValueError("axis 1 of ids must be at least 1: a token is the mean of its references and what is left")
