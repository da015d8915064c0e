"""Adds up how much each slot was attended to by some of a chunk's queries, the score of attention-based eviction.

The log-sum-exps of the queries are known from their attention, so this takes K only: a probability is the exponential
of a score minus a log-sum-exp.
"""

from typing import Literal

import jax
import jax.numpy as jnp

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
from pallas_kernels.decode_work import SpanLimits
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress
from pallas_kernels.record_attention_triton import RecordTile, default_tile, record_attention_triton
from pallas_kernels.record_attention_xla import record_attention_xla

Reduction = Literal["sum", "max"]
_REDUCTIONS = ("sum", "max")


def record_attention(
    score: jax.Array,
    q: jax.Array,
    lse: jax.Array,
    k_pages: jax.Array,
    page_table: jax.Array,
    history: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    first: jax.Array,
    power: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    scale: float,
    own: bool = True,
    reduce: Reduction = "sum",
    tile: RecordTile | None = None,
    limits: SpanLimits | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Adds attention probabilities of packed queries to the scores of the slots they attended to.

    Segment s records its queries t in [max(first[s], starts[s]), starts[s+1]). Query t sees the logical slots below
    `history[tl, rows[s], h]` and, if `own`, the t - starts[s] + 1 slots behind them, which hold the chunk up to it.
    With p = exp(scale * q.k - lse) the score of a slot of KV head h becomes

      score + sum over t and the G query heads of the group of p**power[s]    (reduce = "sum"), or
      the maximum of score and p over t and the group                         (reduce = "max").

    Sums over chunks add up. Segments that record must not share pages with each other.

    Args:
      score: f32[P, page], updated in place when it is donated.
      q: [T, Hq, D], used at the precision of the pool.
      lse: f32[T, Hq], natural logarithm, as `prefill_attention` returns it.
      k_pages: [P, page, D]; if `own`, with the chunk's K stored already.
      page_table: i32[Lt, R, Ht, M].
      history: i32[Lt, R, Ht] slots held before the chunk. With the chunk at most M * page.
      rows: i32[S] table row of each segment.
      starts: i32[S + 1], from 0 on, not decreasing. Equal neighbours are an empty segment.
      first: i32[S] first packed token whose query is recorded; anything from starts[s+1] on records nothing.
      power: i32[S]; 0 records nothing (also with reduce = "max", which otherwise ignores it).
      address: the layer's page arithmetic.
      num_kv_heads: H; Hq must be a multiple of it.
      scale: factor of the scores of the attention, usually D**-0.5.
      own: whether the chunk's own tokens are slots behind the history.
      reduce: "sum" or "max".
      tile, limits: sizes of the kernel and of its spans, for tuning.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      The updated score. Work is in proportion to recorded queries times the slots they see.

    Raises:
      ValueError, TypeError: arguments that do not fit.
    """
    check_pool(k_pages, k_pages)
    check_score(score, k_pages)
    check_query(q, None, k_pages.shape[2])
    check_scale(scale)
    check_shape("lse", lse, tuple(q.shape[:2]))
    query_group(q.shape[1], num_kv_heads)
    check_table(page_table, history, "history", address, num_kv_heads)
    check_shape("rows", rows, (None,))
    segments = rows.shape[0]
    for name, array, size in (("starts", starts, segments + 1), ("first", first, segments), ("power", power, segments)):
        check_shape(name, array, (size,))
        check_integer(**{name: array})
    check_integer(rows=rows)
    if reduce not in _REDUCTIONS:
        raise ValueError(f"reduce must be one of {_REDUCTIONS}, got {reduce!r}")
    implementation, interpret = resolve(implementation, interpret)
    if q.shape[0] == 0 or segments == 0:
        return score
    common, layer = address.split_layer()
    arguments = (score, q, lse, k_pages, page_table, history, rows, starts, first, power, layer)
    if implementation == "xla":
        return record_attention_xla(
            *arguments, address=common, heads=num_kv_heads, scale=scale, own=own, largest=reduce == "max"
        )
    return record_attention_triton(
        *arguments, address=common, heads=num_kv_heads, scale=scale, own=own, largest=reduce == "max",
        tile=tile or default_tile(k_pages), limits=limits, interpret=interpret,
    )  # fmt: skip


def record_attention_reference(
    score, q, lse, k_pages, page_table, history, rows, starts, first, power, *, address, num_kv_heads, scale,
    own=True, reduce="sum",
) -> jax.Array:  # fmt: skip
    """The meaning of `record_attention`, densely and in float32."""
    tokens, _, dim = q.shape
    page_size = k_pages.shape[1]
    q = q.astype(jnp.float32).reshape(tokens, num_kv_heads, -1, dim)
    lse = lse.reshape(tokens, num_kv_heads, -1)
    token, head = jnp.arange(tokens), jnp.arange(num_kv_heads)[:, None]
    slot = jnp.arange(page_table.shape[3] * page_size)
    for s in range(rows.shape[0]):
        recorded = (token >= jnp.maximum(first[s], starts[s])) & (token < starts[s + 1]) & (power[s] > 0)  # [T]
        table = jnp.broadcast_to(page_table[address.table_layer, rows[s]], (num_kv_heads, page_table.shape[3]))
        held = jnp.broadcast_to(history[address.table_layer, rows[s]], (num_kv_heads,))
        page, place = address.page(table[:, slot // page_size], head), slot % page_size  # [H, N]
        seen = held + (token[:, None] - starts[s] + 1 if own else 0)  # [T or 1, H]
        live = recorded[:, None, None] & (slot < seen[..., None])  # [T, H, N]
        keys = jnp.where(live.any(0)[..., None], k_pages[page, place].astype(jnp.float32), 0.0)
        with jax.default_matmul_precision("highest"):
            logits = jnp.einsum("thgd,hnd->thgn", q, keys) * scale
        weights = jnp.where(live[:, :, None], jnp.exp(logits - lse[..., None]), 0.0)
        page = jnp.where(live.any(0), page, score.shape[0])
        if reduce == "max":
            score = score.at[page, place].max(weights.max(axis=(0, 2)), mode="drop")
        else:
            score = score.at[page, place].add((weights ** power[s]).sum(axis=(0, 2)), mode="drop")
    return score
