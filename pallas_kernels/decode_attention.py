"""Attention of one new token per request over slots that a table scatters through the page pool (decode).

Split-K flash decoding (Dao et al. 2023, "Flash-Decoding") over a flat work list: every program reads one span of one
(request, KV head), all spans being about equally long whatever the heads' lengths are, and a second kernel merges the
spans of a head by log-sum-exp. So heads that keep 10 % and heads that keep 90 % of their tokens load the GPU evenly.
"""

import functools
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.checks import check_integer, check_pool, check_shape, check_table, query_group
from pallas_kernels.decode_attention_xla import decode_attention_xla
from pallas_kernels.decode_work import WorkList, decode_work_list
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.paging import PageAddress
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    index_grid,
    kernel_exp2,
    load_vectors,
    locate_slots,
    next_power_of_two,
    vector_mask,
)


class DecodeTile(NamedTuple):
    """Slots read per step of a program's loop, and how Triton compiles the program."""

    block: int
    num_warps: int
    num_stages: int


# By (bytes per element, padded head_dim).
_TILES = {
    (2, 64): DecodeTile(128, 4, 3),
    (2, 128): DecodeTile(64, 2, 3),
    (2, 256): DecodeTile(32, 2, 3),
    (4, 64): DecodeTile(64, 4, 2),
    (4, 128): DecodeTile(32, 4, 2),
    (4, 256): DecodeTile(16, 4, 2),
}
_FALLBACK_TILE = DecodeTile(16, 4, 2)
_MIN_DOT_ROWS = 16  # the smallest tile of a tensor-core product
_MERGE_BLOCKS = (4, 64)  # items per step of the merge: as many as a head has at most, within these bounds


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
    work: WorkList | None = ...,
    tile: DecodeTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


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
    work: WorkList | None = None,
    tile: DecodeTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends from one query per request to the slots of its table row, each KV head to its own.

    KV head h of request b reads the logical slots 0 .. lengths[tl, rows[b], h] - 1, or those listed in `indices`.
    Logical slot t lives in page `address.page(page_table[tl, rows[b], h, t // page], h)` at place `t % page`; `tl` is
    `address.table_layer`, and h counts as 0 where the table has one head for all.

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
      work: result of `decode_work_list` for the same lengths and rows, if already made. Only the kernel uses it.
      tile: tile sizes of the kernel, for tuning; None takes those of the table above.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      out [B, Hq, D] in q's dtype, and with `return_lse` also f32[B, Hq] (natural logarithm). A head that reads nothing
      has out 0 and log-sum-exp EMPTY_LSE.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_pool(k_pages, v_pages)
    check_shape("q", q, (None, None, k_pages.shape[2]))
    check_table(page_table, lengths, "lengths", address, num_kv_heads)
    query_group(q.shape[1], num_kv_heads)
    check_shape("rows", rows, (q.shape[0],))
    check_integer(rows=rows)
    if indices is not None:
        check_shape("indices", indices, (q.shape[0], None, None))
        check_integer(indices=indices)
        if indices.shape[1] not in (1, num_kv_heads):
            raise ValueError(f"axis 1 of indices must be 1 or {num_kv_heads} (the KV heads), got {indices.shape[1]}")
    implementation, interpret = resolve(implementation, interpret)
    dtype = q.dtype
    common, layer = address.split_layer()
    if q.shape[0] == 0:
        out, lse = q, jnp.zeros(q.shape[:2], jnp.float32)
    elif implementation == "xla":
        out, lse = decode_attention_xla(
            q, k_pages, v_pages, page_table, lengths, rows, indices, layer,
            address=common, heads=num_kv_heads, scale=scale,
        )  # fmt: skip
    else:
        if work is None:
            work = decode_work_list(
                lengths,
                rows,
                num_kv_heads=num_kv_heads,
                max_slots=page_table.shape[3] * k_pages.shape[1],
                num_indices=None if indices is None else indices.shape[2],
            )
        if tile is None:
            tile = _TILES.get((k_pages.dtype.itemsize, max(next_power_of_two(q.shape[2]), 64)), _FALLBACK_TILE)
        out, lse = _decode_triton(
            q.astype(k_pages.dtype), k_pages, v_pages, page_table, lengths, rows, indices, work, layer,
            address=common, heads=num_kv_heads, scale=scale, tile=tile, interpret=interpret,
        )  # fmt: skip
    out = out.astype(dtype)
    return (out, lse) if return_lse else out


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
) -> tuple[jax.Array, jax.Array]:
    """The meaning of `decode_attention` in a few lines of float32: (out f32[B, Hq, D], lse f32[B, Hq])."""
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
    k = jnp.where(live[..., None], k_pages[page, slot % page_size].astype(jnp.float32), 0.0)  # [B, H, N, D]
    v = jnp.where(live[..., None], v_pages[page, slot % page_size].astype(jnp.float32), 0.0)
    q = q.astype(jnp.float32).reshape(batch, num_kv_heads, -1, dim)
    with jax.default_matmul_precision("highest"):
        scores = jnp.where(live[:, :, None], jnp.einsum("bhgd,bhnd->bhgn", q, k) * scale, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(live[:, :, None], jnp.exp(scores - lse[..., None]), 0.0)
        out = jnp.einsum("bhgn,bhnd->bhgd", weights, v)
    lse = jnp.where(live.any(-1)[..., None], lse, online_softmax.EMPTY_LSE)
    return out.reshape(batch, q_heads, dim), lse.reshape(batch, q_heads)


def _span_kernel(*refs, address, heads, group, scale, tile, indexed, exp2):
    """One item of the work list: its partial output [items, G, D] and log-sum-exp [items, G]."""
    q_ref, k_ref, v_ref, table_ref, length_ref, rows_ref, layer_ref, *refs = refs
    index_ref, refs = (refs[0], refs[1:]) if indexed else (None, refs)
    head_row_ref, first_ref, last_ref, out_ref, lse_ref = refs
    item = pl.program_id(0)
    address = address.join_layer(layer_ref)
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    first, last = first_ref[address.table_layer, item], last_ref[address.table_layer, item]

    @pl.when(first < last)
    def _():
        head_row = head_row_ref[address.table_layer, item]
        b, h = head_row // heads, head_row % heads
        row = rows_ref[b]
        length = length_ref[address.table_layer, row, h if length_ref.shape[2] > 1 else 0]
        member = jnp.arange(max(_MIN_DOT_ROWS, next_power_of_two(group)), dtype=jnp.int32)
        column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
        members, columns = index_grid(member, column)
        real = vector_mask(member < group, columns, dim)
        q = plgpu.load(q_ref.at[b, h * group + members, columns], mask=real, other=0.0)

        def attend(state, steps, masked):
            """Absorbs the blocks `steps` = (from, to)."""

            def visit(step, state):
                slot = first + step * tile.block + jnp.arange(tile.block, dtype=jnp.int32)
                live = slot < last if masked else None
                if index_ref is not None:
                    slot = plgpu.load(
                        index_ref.at[b, h if index_ref.shape[1] > 1 else 0, slot],
                        mask=live,
                        other=-1 if masked else None,
                    )
                    live = (slot >= 0) & (slot < length)
                page, place = locate_slots(table_ref, row, h, slot, live, address=address, page_size=page_size)
                k = load_vectors(k_ref, page, place, live, dim=dim)
                v = load_vectors(v_ref, page, place, live, dim=dim)
                return online_softmax.absorb(
                    state,
                    exact_dot(q, k.T),
                    None if live is None else live[None, :],
                    lambda weights: exact_dot(weights.astype(v.dtype), v),
                    scale=scale * LOG2_E,
                    exp2=exp2,
                )

            return jax.lax.fori_loop(steps[0], steps[1], visit, state)

        # Only the end of a head is not a whole block.
        full, steps = (last - first) // tile.block, pl.cdiv(last - first, tile.block)
        state = online_softmax.start(member.shape, column.shape[0])
        state = attend(state, (0, full), masked=False)
        state = attend(state, (full, steps), masked=True)
        out, lse = online_softmax.finish(state)
        plgpu.store(out_ref.at[item, members, columns], out, mask=real)
        plgpu.store(lse_ref.at[item, member], lse, mask=member < group)


def _merge_kernel(
    out_ref, lse_ref, layer_ref, first_ref, last_ref, first_span_ref, merged_ref, merged_lse_ref, *, heads, group, block
):
    """One query head: the mean of its items' outputs weighted by the exponentials of their log-sum-exps."""
    head_row, member = pl.program_id(0), pl.program_id(1)
    layer = layer_ref[0]
    first_span = first_span_ref[layer, head_row]
    spans = first_span_ref[layer, head_row + 1] - first_span
    rest = first_span_ref[layer, first_span_ref.shape[1] - 1] + head_row
    parts = spans + (first_ref[layer, rest] < last_ref[layer, rest]).astype(jnp.int32)
    dim = merged_ref.shape[2]
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)

    def visit(step, state):
        part = step * block + jnp.arange(block, dtype=jnp.int32)
        live = part < parts
        item = jnp.where(part < spans, first_span + part, rest)
        lse = plgpu.load(
            lse_ref.at[item, jnp.broadcast_to(member, item.shape)], mask=live, other=online_softmax.EMPTY_LSE
        )
        items, columns = index_grid(item, column)
        mask = vector_mask(live, columns, dim)
        out = plgpu.load(out_ref.at[items, jnp.broadcast_to(member, items.shape), columns], mask=mask, other=0.0)
        # An item whose indices were all dead has nothing to add.
        live &= lse > online_softmax.EMPTY_LSE / 2
        return online_softmax.absorb(
            state,
            lse[None],
            live[None],
            lambda weights: (weights.reshape(-1, 1) * out).sum(axis=0)[None],
            scale=LOG2_E,
        )

    state = online_softmax.start((1,), column.shape[0])
    state = jax.lax.fori_loop(0, pl.cdiv(parts, block), visit, state)
    out, lse = online_softmax.finish(state)
    b, head = head_row // heads, head_row % heads * group + member
    at = (jnp.broadcast_to(b, column.shape), jnp.broadcast_to(head, column.shape), column)
    plgpu.store(merged_ref.at[at], out.reshape(-1).astype(merged_ref.dtype), mask=column < dim)
    merged_lse_ref[b, head] = lse.max()  # its only element


@functools.partial(jax.jit, static_argnames=("address", "heads", "scale", "tile", "interpret"))
def _decode_triton(
    q, k_pages, v_pages, page_table, lengths, rows, indices, work, layer, *, address, heads, scale, tile, interpret
):
    batch, q_heads, dim = q.shape
    group = q_heads // heads
    items = work.head_row.shape[1]
    inputs = [q, k_pages, v_pages, page_table, lengths, rows, layer, *([] if indices is None else [indices])]
    inputs += [work.head_row, work.first, work.last]
    out, lse = pl.pallas_call(
        functools.partial(
            _span_kernel,
            address=address,
            heads=heads,
            group=group,
            scale=scale,
            tile=tile,
            indexed=indices is not None,
            exp2=kernel_exp2(interpret),
        ),
        grid=(items,),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE, WHOLE],
        out_shape=[
            jax.ShapeDtypeStruct((items, group, dim), jnp.float32),
            jax.ShapeDtypeStruct((items, group), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="decode_attention_spans",
    )(*inputs)
    parts = next_power_of_two(-(-items // (batch * heads)))
    block = min(max(parts, _MERGE_BLOCKS[0]), _MERGE_BLOCKS[1])
    merged, merged_lse = pl.pallas_call(
        functools.partial(_merge_kernel, heads=heads, group=group, block=block),
        grid=(batch * heads, group),
        in_specs=[WHOLE] * 6,
        out_specs=[WHOLE, WHOLE],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // 16), num_stages=1),
        interpret=interpret,
        name="decode_attention_merge",
    )(out, lse, layer, work.first, work.last, work.first_span)
    return merged, merged_lse
