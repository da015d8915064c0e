"""The K nearest centers of tokens that are about to be compressed, read through the slot table (arXiv:2602.08005).

The work is a product of all tokens with all centers before them, which is what makes the compression of a text
quadratic in its length. The kernel (`reference_search_triton`) streams the centers past a tile of tokens and keeps the
best K in registers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.centers import center_ordinals
from pallas_kernels.checks import check_integer, check_pool, check_shape, check_table_heads
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.nearest import METRICS, nearest_centers
from pallas_kernels.paging import PageAddress
from pallas_kernels.query_tiles import query_tiles
from pallas_kernels.reference_search_triton import SearchTile, default_tile, reference_search_triton
from pallas_kernels.tiles import next_power_of_two

_BLOCK = 128  # tokens of a tile of the XLA program


def reference_search(
    x: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    positions: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    neighbors: int,
    sinks: int,
    step: int,
    metric: str = "l2",
    tile: SearchTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """The nearest centers of each token, among those at or before it: what `store_latents` takes as `reference`.

    Segment s is the packed tokens starts[s] .. starts[s+1]-1 of the request whose centers are in table row rows[s],
    center c at logical slot c. Centers among the tokens themselves must be in the pool already.

    Scores are float32 sums of products of the numbers as they are stored. The search is exact; equal scores go to the
    earlier center.

    Args:
      x: [N, 2*H*D] signals, concat(K before RoPE, V) over all KV heads; or [N, H*D], keys only: then centers are
        compared by their keys. Used at the precision of the pools.
      k_pages, v_pages: [P, page, D], keys before RoPE.
      page_table: i32[1, R, 1, M], one entry for all layers and heads.
      rows: i32[S].
      starts: i32[S + 1], from 0 on, not decreasing. Tokens from starts[S] on are padding.
      positions: i32[N] place of each token in its text, ascending inside a segment.
      address: the layer's page arithmetic.
      num_kv_heads: H.
      neighbors: K.
      sinks, step: geometry of the centers, see `pallas_kernels.centers`.
      metric: "l2" (by 2 x.c - |c|^2, which orders as -|x - c|^2 does), "dot" or "cosine".
      tile: tile sizes of the kernel, for tuning.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      i32[N, K] center ordinals, best first. A token that sees fewer than K centers gets its best one again in the
      places that are left. Padding has 0.

    Raises:
      ValueError, TypeError: arguments that do not fit.
    """
    check_near(k_pages, v_pages, page_table, address, num_kv_heads)
    keys = num_kv_heads * k_pages.shape[2]
    check_shape("x", x, (None, None))
    if x.shape[1] not in (keys, 2 * keys):
        raise ValueError(f"x has {x.shape[1]} numbers a token, expected {2 * keys} (keys and values) or {keys} (keys)")
    check_segments(rows, starts)
    check_shape("positions", positions, (x.shape[0],))
    check_integer(positions=positions)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if neighbors < 1:
        raise ValueError(f"neighbors must be at least 1, got {neighbors}")
    if step < 1 or sinks < 0:
        raise ValueError(f"step must be at least 1 and sinks at least 0, got {step} and {sinks}")
    implementation, interpret = resolve(implementation, interpret)
    if 0 in (x.shape[0], rows.shape[0]):
        return jnp.zeros((x.shape[0], neighbors), jnp.int32)
    common, layer = address.split_layer()
    last = center_ordinals(positions, sinks=sinks, step=step)
    x = x.astype(k_pages.dtype)
    if implementation == "xla":
        return _search_xla(
            x, k_pages, v_pages, page_table, rows, starts, last, layer,
            address=common, heads=num_kv_heads, neighbors=neighbors, metric=metric,
        )  # fmt: skip
    return reference_search_triton(
        x, k_pages, v_pages, page_table, rows, starts, last, layer, address=common, heads=num_kv_heads,
        neighbors=neighbors, metric=metric, tile=tile or default_tile(k_pages), interpret=interpret,
    )  # fmt: skip


def check_near(k_pages, v_pages, page_table, address: PageAddress, num_kv_heads: int) -> None:
    """Raises unless the near pool and its shared table fit each other."""
    check_pool(k_pages, v_pages)
    check_shape("page_table", page_table, (1, None, 1, None))
    check_integer(page_table=page_table)
    check_table_heads("page_table", 1, address, num_kv_heads)
    if address.table_layer:
        raise ValueError(f"page_table is shared by the layers, but address.table_layer is {address.table_layer}")


def check_segments(rows: jax.Array, starts: jax.Array) -> None:
    """Raises unless rows i32[S] and starts i32[S + 1] are segments of packed tokens."""
    check_shape("rows", rows, (None,))
    check_shape("starts", starts, (rows.shape[0] + 1,))
    check_integer(rows=rows, starts=starts)


def token_rows(rows: jax.Array, starts: jax.Array, tokens: int) -> jax.Array:
    """i32[tokens]: the table row of each packed token; 0, the null row, for padding."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(starts[1:], token, side="right", method="compare_all").astype(jnp.int32)
    return jnp.where(segment < rows.shape[0], rows[jnp.minimum(segment, rows.shape[0] - 1)], 0)


def dense_centers(k_pages, v_pages, page_table, row, *, address: PageAddress, heads: int, keys_only: bool) -> jax.Array:
    """[M * page, F]: what is at the logical slots of a row, those that it does not hold included."""
    page = address.page(page_table[0, row, 0][:, None], jnp.arange(heads, dtype=jnp.int32))  # [M, H]
    pools = (k_pages,) if keys_only else (k_pages, v_pages)
    rows = [pool[page].swapaxes(1, 2).reshape(-1, heads * pool.shape[2]) for pool in pools]
    return jnp.concatenate(rows, axis=1)


@functools.partial(jax.jit, static_argnames=("address", "heads", "neighbors", "metric"))
def _search_xla(
    x, k_pages, v_pages, page_table, rows, starts, last, layer, *, address, heads, neighbors, metric
):  # fmt: skip
    """One tile of tokens after the other against all slots of its row."""
    address = address.join_layer(layer)
    tokens = x.shape[0]
    block = min(_BLOCK, next_power_of_two(tokens))
    keys_only = x.shape[1] == heads * k_pages.shape[2]

    def one_tile(tile):
        token = tile.first + jnp.arange(block, dtype=jnp.int32)
        real = (token < tile.last) & (tile.key_first < tile.last)
        at = jnp.minimum(token, tokens - 1)
        centers = dense_centers(
            k_pages, v_pages, page_table, tile.row, address=address, heads=heads, keys_only=keys_only
        )
        seen = jnp.where(real, last[at], -1)
        # What no token sees may be anything, NaN included, and the largest of NaN is NaN.
        centers = jnp.where(jnp.arange(centers.shape[0])[:, None] <= seen.max(), centers, 0)
        ids, _ = nearest_centers(x[at][None], centers[None], seen, neighbors=neighbors, metric=metric)
        return jnp.where(real, token, tokens), ids[0]

    token, ids = jax.lax.map(one_tile, query_tiles(rows, starts, tokens, block))
    return jnp.zeros((tokens, neighbors), jnp.int32).at[token].set(ids, mode="drop")


def reference_search_reference(
    x, k_pages, v_pages, page_table, rows, starts, positions, *, address: PageAddress, num_kv_heads: int,
    neighbors: int, sinks: int, step: int, metric: str = "l2",
) -> jax.Array:  # fmt: skip
    """The meaning of `reference_search`, one token after the other in float64 (arguments concrete)."""
    keys_only = x.shape[1] == num_kv_heads * k_pages.shape[2]
    x = np.asarray(x.astype(k_pages.dtype), np.float64)
    of_token = np.asarray(token_rows(rows, starts, x.shape[0])).tolist()
    centers_of = {
        row: np.asarray(
            dense_centers(k_pages, v_pages, page_table, row, address=address, heads=num_kv_heads, keys_only=keys_only),
            np.float64,
        )
        for row in set(of_token)
    }
    found = np.zeros((x.shape[0], neighbors), np.int32)
    for t in range(int(starts[-1])):
        centers = centers_of[of_token[t]][: center_ordinals(int(positions[t]), sinks=sinks, step=step) + 1]
        score = centers @ x[t]
        if metric == "l2":
            score = 2 * score - np.square(centers).sum(axis=1)
        elif metric == "cosine":
            score = score / np.linalg.norm(centers, axis=1)
        order = np.argsort(-score, kind="stable")[:neighbors]
        found[t] = np.concatenate([order, np.repeat(order[:1], neighbors - order.size)])
    return jnp.asarray(found)
