"""Attention of one new token per request over slots that a table scatters through the page pool (decode).

Split-K flash decoding (Dao et al. 2023, "Flash-Decoding") over a flat work list: every program reads one span of one
(request, KV head), all spans being about equally long whatever the heads' lengths are, and those of a head are merged
by log-sum-exp. So heads that keep 10 % and heads that keep 90 % of their tokens load the GPU evenly.
"""

from typing import Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import online_softmax
from pallas_kernels.checks import (
    check_integer,
    check_pool,
    check_query,
    check_scale,
    check_score,
    check_shape,
    check_table,
    query_group,
)
from pallas_kernels.decode_attention_triton import decode_attention_triton, default_tile
from pallas_kernels.decode_attention_xla import decode_attention_xla
from pallas_kernels.decode_work import DecodeTile, WorkList, decode_work_list, limits_for
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress


@overload
def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    indices: jax.Array | None = ...,
    scale: float,
    return_lse: Literal[False] = ...,
    position: jax.Array | None = ...,
    score: None = ...,
    power: None = ...,
    work: WorkList | None = ...,
    tile: DecodeTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> jax.Array: ...


@overload
def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    indices: jax.Array | None = ...,
    scale: float,
    return_lse: Literal[True],
    position: jax.Array | None = ...,
    score: None = ...,
    power: None = ...,
    work: WorkList | None = ...,
    tile: DecodeTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    indices: jax.Array | None = ...,
    scale: float,
    return_lse: bool = ...,
    position: jax.Array | None = ...,
    score: jax.Array,
    power: jax.Array,
    work: WorkList | None = ...,
    tile: DecodeTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> tuple[jax.Array, ...]: ...


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    indices: jax.Array | None = None,
    scale: float,
    return_lse: bool = False,
    position: jax.Array | None = None,
    score: jax.Array | None = None,
    power: jax.Array | None = None,
    work: WorkList | None = None,
    tile: DecodeTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Attends from one query per request to the slots of its table row, each KV head to its own.

    KV head h of request b reads the logical slots 0 .. lengths[tl, rows[b], h] - 1, or those listed in `indices`.
    Logical slot t lives in page `address.page(page_table[tl, rows[b], h, t // page], h)` at place `t % page`; `tl` is
    `address.table_layer`, and h counts as 0 where the table has one head for all.

    With `score`, what each slot was attended to is added to it: to the score of slot t of (request b, KV head h) the
    sum over the heads of the group of `p**power[b]`, p being the attention probability. Requests that record must not
    share pages with each other.

    Args:
      q: [B, Hq, D]; query heads h*G .. h*G+G-1 use KV head h.
      k_pages, v_pages: [P, page, D].
      page_table: i32[Lt, R, Ht, M].
      lengths: i32[Lt, R, Ht], at most M * page.
      rows: i32[B] table row of each request.
      address: the layer's page arithmetic.
      num_kv_heads: H; Hq must be a multiple of it.
      indices: i32[B, 1 or H, K] logical slots to read instead of all. Those below 0 or not below the length are
        skipped; one that is listed twice counts twice.
      scale: factor of the scores, usually D**-0.5.
      return_lse: also return the log-sum-exp of the scaled scores.
      position: i32[P, page] of the slots. Those below 0 are skipped, as dead; their K and V must be finite. Not with
        `indices`.
      score: f32[P, page] of the slots, updated in place when it is donated. Not with `indices`.
      power: i32[B], with `score`; a request of power 0 records nothing.
      work: result of `decode_work_list` for the same lengths and rows, if already made, with limits whose `multiple` is
        one of the tile's block. Only the kernel uses it.
      tile: tile sizes of the kernel, for tuning; None: `default_tile`'s.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      out [B, Hq, D] in q's dtype, then with `return_lse` f32[B, Hq] (natural logarithm), then with `score` the updated
      score. A head that reads nothing has out 0 and log-sum-exp EMPTY_LSE.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_pool(k_pages, v_pages)
    check_query(q, None, k_pages.shape[2])
    check_scale(scale)
    check_table(page_table, lengths, "lengths", address, num_kv_heads)
    query_group(q.shape[1], num_kv_heads)
    check_shape("rows", rows, (q.shape[0],))
    check_integer(rows=rows)
    if indices is not None:
        check_shape("indices", indices, (q.shape[0], None, None))
        check_integer(indices=indices)
        if indices.shape[1] not in (1, num_kv_heads):
            raise ValueError(f"axis 1 of indices must be 1 or {num_kv_heads} (the KV heads), got {indices.shape[1]}")
        if indices.shape[2] < 1:
            raise ValueError("axis 2 of indices must be at least 1; -1 is a slot that is skipped")
    _check_slot_state(k_pages, q.shape[0], position, score, power, indices)
    implementation, interpret = resolve(implementation, interpret)
    dtype = q.dtype
    common, layer = address.split_layer()
    if q.shape[0] == 0:
        out, lse = q, jnp.zeros(q.shape[:2], jnp.float32)
    elif implementation == "xla":
        out, lse, score = decode_attention_xla(
            q, k_pages, v_pages, page_table, lengths, rows, indices, position, score, power, layer,
            address=common, heads=num_kv_heads, scale=scale,
        )  # fmt: skip
    else:
        tile = tile or default_tile(k_pages)
        if work is None:
            work = decode_work_list(
                lengths,
                rows,
                num_kv_heads=num_kv_heads,
                max_slots=page_table.shape[3] * k_pages.shape[1],
                num_indices=None if indices is None else indices.shape[2],
                limits=limits_for(tile.block),
            )
        out, lse, score = decode_attention_triton(
            q.astype(k_pages.dtype), k_pages, v_pages, page_table, lengths, rows, indices, position, score, power, work,
            layer, address=common, heads=num_kv_heads, scale=scale, tile=tile, interpret=interpret,
        )  # fmt: skip
    out = out.astype(dtype)
    results = (out, *((lse,) if return_lse else ()), *(() if score is None else (score,)))
    return results if len(results) > 1 else out


def _check_slot_state(k_pages, batch, position, score, power, indices) -> None:
    """Raises unless the optional numbers of the slots fit the pool and each other."""
    if (score is None) != (power is None):
        raise ValueError("score and power go together: pass both or neither")
    if indices is not None and not (position is None and score is None):
        raise ValueError("indices cannot be combined with position or score")
    if position is not None:
        check_shape("position", position, tuple(k_pages.shape[:2]))
        check_integer(position=position)
    if score is not None and power is not None:
        check_score(score, k_pages)
        check_shape("power", power, (batch,))
        check_integer(power=power)


def decode_attention_reference(
    q,
    k_pages,
    v_pages,
    page_table,
    lengths,
    rows,
    *,
    address: PageAddress,
    num_kv_heads: int,
    indices=None,
    scale: float,
    position=None,
    score=None,
    power=None,
) -> tuple[jax.Array, ...]:
    """The meaning of `decode_attention` in a few lines of float32: (out f32[B, Hq, D], lse f32[B, Hq][, score])."""
    batch, q_heads, dim = q.shape
    page_size = k_pages.shape[1]
    head = jnp.arange(num_kv_heads)
    table = jnp.broadcast_to(
        page_table[address.table_layer][rows], (batch, num_kv_heads, page_table.shape[3])
    )  # [B, H, M]
    length = jnp.broadcast_to(lengths[address.table_layer][rows], (batch, num_kv_heads))
    if indices is None:
        indices = jnp.arange(table.shape[2] * page_size)[None, None]
    slot = jnp.broadcast_to(indices, (batch, num_kv_heads, indices.shape[2]))
    live = (slot >= 0) & (slot < length[..., None])  # [B, H, N]
    slot = jnp.where(live, slot, 0)
    page = address.page(jnp.take_along_axis(table, slot // page_size, axis=2), head[:, None])
    if position is not None:
        live &= position[page, slot % page_size] >= 0
    k = jnp.where(live[..., None], k_pages[page, slot % page_size].astype(jnp.float32), 0.0)  # [B, H, N, D]
    v = jnp.where(live[..., None], v_pages[page, slot % page_size].astype(jnp.float32), 0.0)
    q = q.astype(jnp.float32).reshape(batch, num_kv_heads, -1, dim)
    with jax.default_matmul_precision("highest"):
        scores = jnp.where(live[:, :, None], jnp.einsum("bhgd,bhnd->bhgn", q, k) * scale, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(live[:, :, None], jnp.exp(scores - lse[..., None]), 0.0)
        out = jnp.einsum("bhgn,bhnd->bhgd", weights, v)
    lse = jnp.where(live.any(-1)[..., None], lse, online_softmax.EMPTY_LSE)
    out, lse = out.reshape(batch, q_heads, dim), lse.reshape(batch, q_heads)
    if score is None or power is None:
        return out, lse
    recorded = live & (power > 0)[:, None, None]
    mass = (weights ** power[:, None, None, None]).sum(axis=2)  # [B, H, N]
    page = jnp.where(recorded, page, k_pages.shape[0])
    return out, lse, score.at[page, slot % page_size].add(mass, mode="drop")
