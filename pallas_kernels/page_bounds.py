"""Bounds of the keys of each page, and how large a query's logits in a page can be (Tang et al. 2024, Quest,
arXiv:2406.10774, section 3.2).

With the smallest and the largest value of every key dimension in a page, sum_d max(q_d * smallest_d, q_d * largest_d)
is at least the logit of any of its keys. The pages with the largest bounds are worth reading.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import (
    check_float,
    check_integer,
    check_page_size,
    check_query,
    check_shape,
    check_table,
    check_table_heads,
    query_group,
)
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    group_members,
    index_grid,
    load_queries,
    next_power_of_two,
    vector_mask,
)

_PAGES = 64  # whose bounds a program takes


def update_page_bounds(
    bounds: jax.Array,
    k_pages: jax.Array,
    entry: jax.Array,
    count: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Takes the bounds of pages anew from the keys that they hold by now.

    Args:
      bounds: [P, 2, D], the smallest and the largest value of each dimension of a page's keys; in k_pages' dtype.
      k_pages: [P, page, D].
      entry: i32[N, Ht], table entries, in each head's table; no entry twice, but for those of count 0.
      count: i32[N, Ht], the first so many slots of an entry's pages hold keys; 0: the entry is left alone.
      address: the layer's page arithmetic.
      num_kv_heads: H.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      The updated bounds, in place when they are donated.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check_bounds(bounds, k_pages)
    check_shape("entry", entry, (None, None))
    check_shape("count", count, tuple(entry.shape))
    check_integer(entry=entry, count=count)
    check_table_heads("entry", entry.shape[1], address, num_kv_heads)
    implementation, interpret = resolve(implementation, interpret)
    common, layer = address.split_layer()
    if entry.shape[0] == 0:
        return bounds
    if implementation == "xla":
        return _update_xla(bounds, k_pages, entry, count, layer, address=common, heads=num_kv_heads)
    return _update_triton(bounds, k_pages, entry, count, layer, address=common, heads=num_kv_heads, interpret=interpret)


def page_upper_bounds(
    q: jax.Array,
    bounds: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    page_size: int,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """How large a logit, before its scale, can be in each page of a row, for any query head of the KV head.

    Args:
      q: [B, Hq, D]; query heads h*G .. h*G+G-1 use KV head h.
      bounds: [P, 2, D], of `update_page_bounds`.
      page_table, lengths, rows, address, num_kv_heads: as `decode_attention` takes them.
      page_size: slots of a page.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      f32[B, H, M], one a column of the table. Columns that the row does not hold may have any value.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_shape("bounds", bounds, (None, 2, None))
    check_float(bounds=bounds)
    check_query(q, None, bounds.shape[2])
    check_page_size("page_size", page_size)
    check_table(page_table, lengths, "lengths", address, num_kv_heads)
    query_group(q.shape[1], num_kv_heads)
    check_shape("rows", rows, (q.shape[0],))
    check_integer(rows=rows)
    implementation, interpret = resolve(implementation, interpret)
    common, layer = address.split_layer()
    options = {"address": common, "heads": num_kv_heads}
    if q.shape[0] == 0:
        return jnp.zeros((0, num_kv_heads, page_table.shape[3]), jnp.float32)
    if implementation == "xla":
        return _upper_bounds_xla(q, bounds, page_table, rows, layer, **options)
    return _upper_bounds_triton(
        q.astype(bounds.dtype), bounds, page_table, lengths, rows, layer, page_size=page_size, interpret=interpret,
        **options,
    )  # fmt: skip


def _check_bounds(bounds, k_pages) -> None:
    check_shape("k_pages", k_pages, (None, None, None))
    check_shape("bounds", bounds, (k_pages.shape[0], 2, k_pages.shape[2]))
    check_page_size("the page size (axis 1 of k_pages)", k_pages.shape[1])
    check_float(k_pages=k_pages)
    if bounds.dtype != k_pages.dtype:
        raise TypeError(f"bounds must be {k_pages.dtype} like k_pages, got {bounds.dtype}")


def _update_kernel(_, k_ref, entry_ref, count_ref, layer_ref, bounds_ref, *, address, page_size):
    """One page: its bounds over its first `count` slots."""
    n, head = pl.program_id(0), pl.program_id(1)
    address = address.join_layer(layer_ref)
    table_head = head if entry_ref.shape[1] > 1 else 0
    count = count_ref[n, table_head]

    @pl.when(count > 0)
    def _():
        page, dim = address.page(entry_ref[n, table_head], head), k_ref.shape[2]
        slot = jnp.arange(page_size, dtype=jnp.int32)
        column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
        slots, columns = index_grid(slot, column)
        mask = vector_mask(slot < count, columns, dim)
        k = plgpu.load(k_ref.at[jnp.broadcast_to(page, slots.shape), slots, columns], mask=mask, other=0.0)
        k, live = k.astype(jnp.float32), slots < count
        inside = None if column.shape[0] == dim else column < dim
        low, high = jnp.where(live, k, jnp.inf).min(axis=0), jnp.where(live, k, -jnp.inf).max(axis=0)
        for side, bound in enumerate((low, high)):
            at = jnp.broadcast_to(page, column.shape), jnp.full_like(column, side), column
            plgpu.store(bounds_ref.at[at], bound.astype(bounds_ref.dtype), mask=inside)


@functools.partial(jax.jit, static_argnames=("address", "heads", "interpret"))
def _update_triton(bounds, k_pages, entry, count, layer, *, address, heads, interpret):
    return pl.pallas_call(
        functools.partial(_update_kernel, address=address, page_size=k_pages.shape[1]),
        grid=(entry.shape[0], heads),
        in_specs=[WHOLE] * 5,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(bounds.shape, bounds.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="update_page_bounds",
    )(bounds, k_pages, entry, count, layer)


@functools.partial(jax.jit, static_argnames=("address", "heads"))
def _update_xla(bounds, k_pages, entry, count, layer, *, address, heads):
    page = address.join_layer(layer).page(entry, jnp.arange(heads, dtype=jnp.int32))  # [N, H]
    live = jnp.arange(k_pages.shape[1]) < count[..., None]  # [N, Ht, page]
    k = k_pages[page]  # [N, H, page, D]
    low = jnp.where(live[..., None], k, jnp.inf).min(axis=2)
    high = jnp.where(live[..., None], k, -jnp.inf).max(axis=2)
    page = jnp.where(count > 0, page, bounds.shape[0])
    return bounds.at[page].set(jnp.stack([low, high], axis=2), mode="drop")


def _upper_bounds_kernel(
    q_ref, bounds_ref, table_ref, length_ref, rows_ref, layer_ref, out_ref, *, address, heads, group, page_size
):
    """Some pages of one KV head."""
    head_row, block = pl.program_id(0), pl.program_id(1)
    address = address.join_layer(layer_ref)
    b, head = head_row // heads, head_row % heads
    row, dim = rows_ref[b], q_ref.shape[2]
    table_head = head if table_ref.shape[2] > 1 else 0
    held = pl.cdiv(length_ref[address.table_layer, row, table_head], page_size)

    @pl.when(block * _PAGES < held)
    def _():
        member, q = group_members(group), load_queries(q_ref, b, head, group=group)
        place = block * _PAGES + jnp.arange(_PAGES, dtype=jnp.int32)
        live = place < held
        entry = plgpu.load(table_ref.at[address.table_layer, row, table_head, place], mask=live, other=0)
        page, columns = index_grid(address.page(entry, head), jnp.arange(next_power_of_two(dim), dtype=jnp.int32))
        mask = vector_mask(live, columns, dim)
        low, high = (
            plgpu.load(bounds_ref.at[page, jnp.full_like(page, side), columns], mask=mask, other=0.0) for side in (0, 1)
        )
        zero = jnp.zeros_like(q)
        most = exact_dot(jnp.maximum(q, zero), high.T) + exact_dot(jnp.minimum(q, zero), low.T)
        most = jnp.where((member < group)[:, None], most, -jnp.inf).max(axis=0)
        at = jnp.where(live, place, out_ref.shape[2] + place)
        plgpu.store(
            out_ref.at[jnp.broadcast_to(b, place.shape), jnp.broadcast_to(head, place.shape), at], most, mask=live
        )


@functools.partial(jax.jit, static_argnames=("address", "heads", "page_size", "interpret"))
def _upper_bounds_triton(q, bounds, page_table, lengths, rows, layer, *, address, heads, page_size, interpret):
    batch, columns = q.shape[0], page_table.shape[3]
    return pl.pallas_call(
        functools.partial(
            _upper_bounds_kernel, address=address, heads=heads, group=q.shape[1] // heads, page_size=page_size
        ),
        grid=(batch * heads, -(-columns // _PAGES)),
        in_specs=[WHOLE] * 6,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((batch, heads, columns), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="page_upper_bounds",
    )(q, bounds, page_table, lengths, rows, layer)


@functools.partial(jax.jit, static_argnames=("address", "heads"))
def _upper_bounds_xla(q, bounds, page_table, rows, layer, *, address, heads):
    address = address.join_layer(layer)
    entry = page_table[address.table_layer, rows]  # [B, Ht, M]
    head = jnp.arange(heads, dtype=jnp.int32)
    low, high = jnp.moveaxis(bounds[address.page(entry, head[:, None])].astype(jnp.float32), 3, 0)  # [B, H, M, D]
    q = q.astype(jnp.float32).reshape(q.shape[0], heads, -1, q.shape[2])
    dot = functools.partial(jnp.einsum, "bhgd,bhmd->bhgm", precision="highest")
    return (dot(jnp.maximum(q, 0), high) + dot(jnp.minimum(q, 0), low)).max(axis=2)


def update_page_bounds_reference(bounds, k_pages, entry, count, *, address: PageAddress, num_kv_heads: int):
    """The meaning of `update_page_bounds`, slot by slot."""
    shape = (entry.shape[0], num_kv_heads)
    page = address.page(entry, jnp.arange(num_kv_heads))
    count = jnp.broadcast_to(count, shape)
    for slot in range(k_pages.shape[1]):
        k = k_pages[page, slot]
        old = bounds[page]
        new = jnp.stack([k, k], axis=2)
        if slot:
            new = jnp.stack([jnp.minimum(old[:, :, 0], k), jnp.maximum(old[:, :, 1], k)], axis=2)
        bounds = bounds.at[jnp.where(slot < count, page, bounds.shape[0])].set(new, mode="drop")
    return bounds


def page_upper_bounds_reference(q, bounds, page_table, rows, *, address: PageAddress, num_kv_heads: int):
    """The meaning of `page_upper_bounds`: f32[B, H, M]."""
    batch, _, dim = q.shape
    table = page_table[address.table_layer][rows]
    table = jnp.broadcast_to(table, (batch, num_kv_heads, table.shape[2]))
    both = bounds[address.page(table, jnp.arange(num_kv_heads)[:, None])].astype(jnp.float32)  # [B, H, M, 2, D]
    q = q.astype(jnp.float32).reshape(batch, num_kv_heads, -1, 1, 1, dim)
    return (q * both[:, :, None]).max(axis=-2).sum(axis=-1).max(axis=2)
