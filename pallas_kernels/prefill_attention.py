"""Attention of a packed chunk of prompt tokens to each request's history and, causally, to the chunk itself (prefill).

FlashAttention-2 (Dao 2023) over tiles of queries. A tile never crosses a segment; it first reads the request's history
through the slot table, then the chunk's own K and V, which need not be in the pool.
"""

import functools
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.checks import (
    check_integer,
    check_pool,
    check_query,
    check_scale,
    check_shape,
    check_table,
    query_group,
)
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.paging import PageAddress
from pallas_kernels.prefill_attention_mosaic import prefill_attention_mosaic, refusal
from pallas_kernels.prefill_attention_xla import prefill_attention_xla
from pallas_kernels.query_tiles import query_tiles
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    index_grid,
    kernel_exp2,
    load_of_head,
    load_vectors,
    locate_slots,
    next_power_of_two,
    vector_mask,
)


class PrefillTile(NamedTuple):
    """Queries of a program, keys per step of its loop, and how Triton compiles it."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# By (bytes per element, padded head_dim).
_TILES = {
    (2, 64): PrefillTile(128, 64, 4, 3),
    (2, 128): PrefillTile(128, 64, 4, 2),
    (2, 256): PrefillTile(64, 32, 8, 2),
    (4, 64): PrefillTile(64, 32, 4, 2),
    (4, 128): PrefillTile(32, 32, 4, 2),
    (4, 256): PrefillTile(16, 16, 4, 2),
}
_FALLBACK_TILE = PrefillTile(16, 16, 4, 2)


@overload
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    history: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    *,
    address: PageAddress,
    scale: float,
    return_lse: Literal[False] = ...,
    tile: PrefillTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> jax.Array: ...


@overload
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    history: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    *,
    address: PageAddress,
    scale: float,
    return_lse: Literal[True],
    tile: PrefillTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    history: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    *,
    address: PageAddress,
    scale: float,
    return_lse: bool = False,
    tile: PrefillTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends from each token of a chunk to its request's history and to the tokens of its segment up to itself.

    Segment s is the packed tokens starts[s] .. starts[s+1]-1 of the request in table row rows[s]. Each of them attends
    to all slots 0 .. history[tl, rows[s], h] - 1 of that row (addressed as in `decode_attention`) and to k, v of its
    segment up to its own place.

    Args:
      q: [T, Hq, D]; query heads h*G .. h*G+G-1 use KV head h.
      k, v: [T, H, D] of the chunk, used at the precision of the pools.
      k_pages, v_pages: [P, page, D].
      page_table: i32[Lt, R, Ht, M].
      history: i32[Lt, R, Ht] slots held before this chunk, at most M * page. Row 0, the null row, must hold none.
      rows: i32[S] table row of each segment.
      starts: i32[S + 1], from 0 on, not decreasing. Equal neighbours are an empty segment; tokens from starts[S] on are
        padding.
      address: the layer's page arithmetic.
      scale: factor of the scores, usually D**-0.5.
      return_lse: also return the log-sum-exp of the scaled scores.
      tile: tile sizes of the Triton kernel, for tuning; None takes those of the table above.
      implementation, interpret: see `dispatch.resolve`. The Mosaic kernel serves 16-bit pools with head_dim 64 or 128
        and pages of 16 slots or more, and takes no `tile`.

    Returns:
      out [T, Hq, D] in q's dtype, and with `return_lse` also f32[T, Hq] (natural logarithm). Padding tokens have out 0
      and log-sum-exp EMPTY_LSE.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_pool(k_pages, v_pages)
    dim = k_pages.shape[2]
    check_query(q, None, dim)
    check_scale(scale)
    check_shape("k", k, (q.shape[0], None, dim))
    check_shape("v", v, tuple(k.shape))
    heads = k.shape[1]
    query_group(q.shape[1], heads)
    check_table(page_table, history, "history", address, heads)
    check_shape("rows", rows, (None,))
    check_shape("starts", starts, (rows.shape[0] + 1,))
    check_integer(rows=rows, starts=starts)
    mosaic_refusal = refusal(k_pages.dtype, dim, k_pages.shape[1])
    if tile is not None:
        mosaic_refusal = mosaic_refusal or "`tile` is for the Triton kernel"
    implementation, interpret = resolve(implementation, interpret, mosaic_refusal=mosaic_refusal)
    dtype = q.dtype
    common, layer = address.split_layer()
    k, v = k.astype(k_pages.dtype), v.astype(v_pages.dtype)
    if 0 in (q.shape[0], rows.shape[0]):
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:2], online_softmax.EMPTY_LSE, jnp.float32)
    elif implementation == "mosaic":
        out, lse = prefill_attention_mosaic(
            q.astype(k_pages.dtype), k, v, k_pages, v_pages, page_table, history, rows, starts, layer,
            address=common, scale=scale, with_lse=return_lse,
        )  # fmt: skip
    elif implementation == "xla":
        out, lse = prefill_attention_xla(
            q, k, v, k_pages, v_pages, page_table, history, rows, starts, layer, address=common, scale=scale
        )
    else:
        if tile is None:
            tile = _TILES.get((k_pages.dtype.itemsize, max(next_power_of_two(dim), 64)), _FALLBACK_TILE)
        out, lse = _prefill_triton(
            q.astype(k_pages.dtype), k, v, k_pages, v_pages, page_table, history, rows, starts, layer,
            address=common, scale=scale, tile=tile, interpret=interpret,
        )  # fmt: skip
    out = out.astype(dtype)
    return (out, lse) if return_lse else out


def prefill_attention_reference(
    q, k, v, k_pages, v_pages, page_table, history, rows, starts, *, address: PageAddress, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The meaning of `prefill_attention`, densely and in float32: (out f32[T, Hq, D], lse f32[T, Hq])."""
    tokens, q_heads, dim = q.shape
    heads, page_size = k.shape[1], k_pages.shape[1]
    q = q.astype(jnp.float32).reshape(tokens, heads, -1, dim)
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full(q.shape[:3], online_softmax.EMPTY_LSE, jnp.float32)
    token, head, slot = jnp.arange(tokens), jnp.arange(heads)[:, None], jnp.arange(page_table.shape[3] * page_size)
    for segment in range(rows.shape[0]):
        row, first, last = rows[segment], starts[segment], starts[segment + 1]
        table = jnp.broadcast_to(page_table[address.table_layer, row], (heads, page_table.shape[3]))  # [H, M]
        held = slot < jnp.broadcast_to(history[address.table_layer, row], (heads,))[:, None]  # [H, N]
        at = (address.page(table[:, slot // page_size], head), slot % page_size)
        own = (first <= token) & (token < last)  # [T]

        def keys_of(pages, new, at=at, held=held, own=own):
            old = jnp.where(held[..., None], pages[at].astype(jnp.float32), 0.0)
            new = jnp.where(own[:, None, None], new.astype(jnp.float32), 0.0)
            return jnp.concatenate([old, new.transpose(1, 0, 2)], axis=1)  # [H, N + T, D]

        causal = own & (token <= token[:, None])  # [T, T]
        live = jnp.concatenate(
            [
                jnp.broadcast_to(held, (tokens, *held.shape)),
                jnp.broadcast_to(causal[:, None], (tokens, heads, tokens)),
            ],
            axis=2,
        )[:, :, None]  # [T, H, 1, N + T]
        with jax.default_matmul_precision("highest"):
            scores = jnp.where(live, jnp.einsum("thgd,hnd->thgn", q, keys_of(k_pages, k)) * scale, -jnp.inf)
            here = jnp.einsum("thgn,hnd->thgd", jax.nn.softmax(scores, axis=-1), keys_of(v_pages, v))
        out = jnp.where(own[:, None, None, None], here, out)
        lse = jnp.where(own[:, None, None], jax.nn.logsumexp(scores, axis=-1), lse)
    return out.reshape(tokens, q_heads, dim), lse.reshape(tokens, q_heads)


def _prefill_kernel(
    q_ref, k_ref, v_ref, k_pages_ref, v_pages_ref, table_ref, history_ref, layer_ref, row_ref, first_ref, last_ref,
    key_first_ref, out_ref, lse_ref, *, address, group, scale, tile, num_tiles, exp2,
):  # fmt: skip
    """One tile of queries of one query head."""
    q_head = pl.program_id(0)
    address = address.join_layer(layer_ref)
    # The last tiles of a segment see the most keys: starting with them leaves the short ones to even out the end.
    index = num_tiles - 1 - pl.program_id(1)
    first, last = first_ref[index], last_ref[index]
    dim, page_size = q_ref.shape[2], k_pages_ref.shape[1]

    @pl.when(first < last)
    def _():
        head = q_head // group
        row, key_first = row_ref[index], key_first_ref[index]
        held = load_of_head(history_ref, row, head, address=address)
        held = jnp.where(key_first < last, held, 0)  # padding reads nothing
        query = first + jnp.arange(tile.block_q, dtype=jnp.int32)
        real = query < last
        at_query, at_column = index_grid(query, jnp.arange(next_power_of_two(dim), dtype=jnp.int32))
        mask = vector_mask(real, at_column, dim)
        q = plgpu.load(q_ref.at[at_query, q_head, at_column], mask=mask, other=0.0)

        def read_history(token, live):
            page, slot = locate_slots(table_ref, row, head, token, live, address=address, page_size=page_size)
            return (load_vectors(pool, page, slot, live, dim=dim) for pool in (k_pages_ref, v_pages_ref))

        def read_own(token, live):
            at_head = jnp.broadcast_to(head, token.shape)
            return (load_vectors(new, key_first + token, at_head, live, dim=dim) for new in (k_ref, v_ref))

        def attend(state, steps, read, live_keys=None, live_pairs=None):
            """Absorbs the blocks `steps` = (from, to) of what `read` gives; `live_*(token)` says what of it counts."""

            def visit(step, state):
                token = step * tile.block_k + jnp.arange(tile.block_k, dtype=jnp.int32)
                k, v = read(token, None if live_keys is None else live_keys(token))
                live = None if live_pairs is None else live_pairs(token[None, :])
                return absorb(state, k, v, live)

            return jax.lax.fori_loop(steps[0], steps[1], visit, state)

        def absorb(state, k, v, live=None):
            return online_softmax.absorb(
                state,
                exact_dot(q, k.T),
                live,
                lambda weights: exact_dot(weights.astype(v.dtype), v),
                scale=scale * LOG2_E,
                exp2=exp2,
            )

        def attend_own_runs(state, steps):
            """As `attend` with `read_own`, but a block is a slice: only its start moves, no offsets are computed."""

            def visit(step, state):
                run = pl.ds(key_first + step * tile.block_k, tile.block_k)
                k, v = (plgpu.load(new.at[run, head, pl.ds(0, dim)]) for new in (k_ref, v_ref))
                return absorb(state, k, v)

            return jax.lax.fori_loop(steps[0], steps[1], visit, state)

        def held_slots(token):
            return token < held

        def own_tokens(token):
            return token < last - key_first

        def causal(token):
            return own_tokens(token) & (token <= query[:, None] - key_first)

        # Blocks that every query sees whole need no masks; only the ends of the history and of the segment do.
        full, steps = held // tile.block_k, pl.cdiv(held, tile.block_k)
        state = online_softmax.start(query.shape, at_column.shape[1])
        state = attend(state, (0, full), read_history)
        state = attend(state, (full, steps), read_history, held_slots, held_slots)
        seen = jnp.maximum(first - key_first, 0)  # 0 for padding, whose key_first is its end
        full, steps = seen // tile.block_k, pl.cdiv(jnp.minimum(seen + tile.block_q, last - key_first), tile.block_k)
        if dim == next_power_of_two(dim):
            state = attend_own_runs(state, (0, full))
        else:
            state = attend(state, (0, full), read_own)
        state = attend(state, (full, steps), read_own, own_tokens, causal)
        out, lse = online_softmax.finish(state)
        plgpu.store(out_ref.at[at_query, q_head, at_column], out.astype(out_ref.dtype), mask=mask)
        plgpu.store(lse_ref.at[query, jnp.broadcast_to(q_head, query.shape)], lse, mask=real)


@functools.partial(jax.jit, static_argnames=("address", "scale", "tile", "interpret"))
def _prefill_triton(
    q, k, v, k_pages, v_pages, page_table, history, rows, starts, layer, *, address, scale, tile, interpret
):
    tokens, q_heads, _ = q.shape
    tile = tile._replace(block_q=min(tile.block_q, max(16, next_power_of_two(tokens))))
    tiles = query_tiles(rows, starts, tokens, tile.block_q)
    num_tiles = tiles.row.shape[0]
    out, lse = pl.pallas_call(
        functools.partial(
            _prefill_kernel,
            address=address,
            group=q_heads // k.shape[1],
            scale=scale,
            tile=tile,
            num_tiles=num_tiles,
            exp2=kernel_exp2(interpret),
        ),
        grid=(q_heads, num_tiles),
        in_specs=[WHOLE] * 12,
        out_specs=[WHOLE, WHOLE],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((tokens, q_heads), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="prefill_attention",
    )(q, k, v, k_pages, v_pages, page_table, history, layer, *tiles)
    return out, lse
