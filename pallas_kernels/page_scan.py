"""What the pages of slot tables hold, and which slot of each should be evicted first: one pass over their records."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_integer, check_shape
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.tiles import WHOLE, index_grid, next_power_of_two

LAST = int(jnp.iinfo(jnp.int32).max)
"""Behind every position."""

_SLOTS, _NUM_WARPS = 512, 4  # of a program
_LARGEST = float(jnp.finfo(jnp.float32).max)


class PageScan(NamedTuple):
    """Of each page, i32[..., C] but for `key`.

    Attributes:
      live: its live slots.
      dead: the lowest in-page slot that is used and dead; the page size if there is none.
      key: f32[..., C] the lowest score of its evictable slots, NaN taken for -inf; +inf if it has none.
      position: the lowest position among the slots of that score; LAST if there is none.
      slot: the logical slot of that one; anything if there is none.
    """

    live: jax.Array
    dead: jax.Array
    key: jax.Array
    position: jax.Array
    slot: jax.Array


def scan_pages(
    position_pages: jax.Array,
    score: jax.Array,
    pages: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> PageScan:
    """Scans the pages of tables.

    A slot is used below the length of its table, live if it is used and its position is not negative, and evictable if
    it is live and its position lies in first .. last-1. Infinite scores count as the largest finite ones.

    Args:
      position_pages: i32[P, page] position of every slot.
      score: f32[P, page] of the same slots; or, of another shape, f32[..., C * page] of the tables' slots in order.
      pages: i32[..., C] the tables.
      lengths: i32[...] slots held by each.
      first, last: i32[...] of each table.
      implementation, interpret: see `dispatch.resolve`.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_shape("position_pages", position_pages, (None, None))
    tables, page_size = pages.shape[:-1], position_pages.shape[1]
    by_table = score.shape != position_pages.shape
    if by_table:
        check_shape("score", score, (*tables, pages.shape[-1] * page_size))
    if score.dtype != jnp.float32:
        raise TypeError(f"score must be float32, got {score.dtype}")
    for name, array in (("lengths", lengths), ("first", first), ("last", last)):
        check_shape(name, array, tables)
    check_integer(position_pages=position_pages, pages=pages, lengths=lengths, first=first, last=last)
    implementation, interpret = resolve(implementation, interpret)
    arguments = (position_pages, score, pages, lengths, first, last)
    if implementation == "xla" or pages.size == 0:
        return scan_pages_reference(*arguments)
    return _scan_triton(*arguments, by_table=by_table, interpret=interpret)


def scan_pages_reference(position_pages, score, pages, lengths, first, last) -> PageScan:
    """The meaning of `scan_pages`."""
    page_size = position_pages.shape[1]
    paged = (*pages.shape, page_size)
    slot = jnp.arange(pages.shape[-1] * page_size, dtype=jnp.int32).reshape(-1, page_size)
    used = slot < lengths[..., None, None]
    position = position_pages[pages]
    live = used & (position >= 0)
    evictable = live & (position >= first[..., None, None]) & (position < last[..., None, None])
    score = score[pages] if score.shape == position_pages.shape else score.reshape(paged)
    key = jnp.where(evictable, ranked(score), jnp.inf)
    position = jnp.where(evictable, position, LAST)
    in_page = jnp.arange(page_size, dtype=jnp.int32)
    lowest = lowest_slot(key, position, jnp.broadcast_to(slot, paged), axis=-1)
    return PageScan(
        jnp.sum(live, axis=-1, dtype=jnp.int32),
        jnp.min(jnp.where(used & ~live, in_page, page_size), axis=-1),
        *lowest,
    )


def lowest_slot(key: jax.Array, position: jax.Array, slot: jax.Array, *, axis: int) -> tuple[jax.Array, ...]:
    """(key, position, slot) of the lowest key along an axis, the lower position of equal keys."""

    def lower(a, b):
        first = (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
        return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))

    return jax.lax.reduce(
        (key, position, slot),
        (jnp.float32(jnp.inf), jnp.int32(LAST), jnp.int32(0)),
        lower,
        dimensions=(axis % key.ndim,),
    )


def ranked(score: jax.Array) -> jax.Array:
    """Scores as they are compared: NaN as -inf, infinite ones as the largest finite ones."""
    return jnp.where(jnp.isnan(score), -jnp.inf, jnp.clip(score, -_LARGEST, _LARGEST))


def _scan_kernel(
    position_ref, score_ref, page_ref, length_ref, first_ref, last_ref, live_ref, dead_ref, key_ref, lowest_ref,
    slot_ref, *, block, columns, by_table,
):  # fmt: skip
    """`block` pages, whichever tables they are of."""
    page_size = position_ref.shape[1]
    at = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    exists = at < page_ref.shape[0]
    table, column = at // columns, at % columns
    page = plgpu.load(page_ref.at[at], mask=exists, other=0)
    length, first, last = (
        plgpu.load(ref.at[table], mask=exists, other=0)[:, None] for ref in (length_ref, first_ref, last_ref)
    )
    in_page = jnp.arange(next_power_of_two(page_size), dtype=jnp.int32)
    pages, slots = index_grid(page, in_page)
    slot = column[:, None] * page_size + slots
    used = (slot < length) & (slots < page_size)
    position = plgpu.load(position_ref.at[pages, slots], mask=used, other=-1)
    live = used & (position >= 0)
    evictable = live & (position >= first) & (position < last)
    score_at = (index_grid(at, in_page)[0] if by_table else pages), slots
    score = plgpu.load(score_ref.at[score_at], mask=used, other=jnp.inf)  # does not wait for the positions
    key = jnp.where(evictable, ranked(score), jnp.inf)
    lowest_key = key.min(axis=1)
    position = jnp.where(evictable & (key == lowest_key[:, None]), position, LAST)
    lowest = position.min(axis=1)
    for ref, values in (
        (live_ref, live.astype(jnp.int32).sum(axis=1)),
        (dead_ref, jnp.where(used & ~live, slots, page_size).min(axis=1)),
        (key_ref, lowest_key),
        (lowest_ref, lowest),
        (slot_ref, jnp.where(position == lowest[:, None], slot, LAST).min(axis=1)),
    ):
        plgpu.store(ref.at[at], values, mask=exists)


@functools.partial(jax.jit, static_argnames=("by_table", "interpret"))
def _scan_triton(position_pages, score, pages, lengths, first, last, *, by_table, interpret):
    page_size = position_pages.shape[1]
    block = max(16, _SLOTS // next_power_of_two(page_size))
    if by_table:
        score = score.reshape(-1, page_size)
    inputs = [position_pages, score, *(array.reshape(-1) for array in (pages, lengths, first, last))]
    shape = jax.ShapeDtypeStruct((pages.size,), jnp.int32)
    found = pl.pallas_call(
        functools.partial(_scan_kernel, block=block, columns=pages.shape[-1], by_table=by_table),
        grid=(pl.cdiv(pages.size, block),),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * 5,
        out_shape=[shape, shape, jax.ShapeDtypeStruct(shape.shape, jnp.float32), shape, shape],
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="scan_pages",
    )(*inputs)
    return PageScan(*(array.reshape(pages.shape) for array in found))
