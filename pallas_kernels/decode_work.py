"""The work list of decode attention: heads of unequal length, cut into items of about equal length.

A head no longer than an item stays whole: it is read by one program and needs no merging. Longer heads are cut into
equal parts, so no program is started for a few slots at a head's end. The GPU starts programs in the order of the list,
which begins with the longest: what is left for the end is short, and no multiprocessor waits long for another.

It depends on the lengths and rows only, and not on any query or layer index: one list serves all layers, and XLA
computes it once for a whole step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integer, check_shape

_FINEST = 64  # slots: an item of fewer is not done sooner


class DecodeTile(NamedTuple):
    """Slots read per step of a program's loop, and how Triton compiles the program."""

    block: int
    num_warps: int
    num_stages: int


class SpanLimits(NamedTuple):
    """How long the items may be, and so how many there are. A "span" is what an item should be long.

    Attributes:
      wave: programs that the GPU runs at once. The slots of all heads over this are the span, while that is no longer
        than `wave_span`: one wave, and what remains of some heads.
      min_span: no span is shorter, so that a program's start is worth while.
      wave_span: longest item of a single wave. Beyond it, programs that happen to run slower would hold up the end.
      max_span: span of many waves, which start and end at different times.
      most_spans: bounds the grid and the partial results; beyond `most_spans * max_span` slots the spans grow again.
      multiple: items begin at a multiple of this, which is one of every block.
    """

    wave: int = 396  # 3 programs on each of an H200's 132 multiprocessors
    min_span: int = 128
    wave_span: int = 3072
    max_span: int = 2048
    most_spans: int = 4096
    multiple: int = 128


DEFAULT_LIMITS = SpanLimits()
"""For blocks of any tile."""


def limits_for(block: int) -> SpanLimits:
    """Limits for programs that read `block` slots a step: the finer the cuts, the more even the items of a wave."""
    finest = max(block, _FINEST)
    return DEFAULT_LIMITS._replace(min_span=finest, multiple=finest)


class WorkList(NamedTuple):
    """The items of each table layer, longest first; those of a head follow each other. Behind the last one is nothing.

    Attributes:
      head_row: i32[Lt, items] `b * H + h` of each item.
      first, last: i32[Lt, items] the slots (or places in the index list) that it reads: first .. last-1.
      first_item: i32[Lt, B*H] where the items of each head start.
      parts: i32[Lt, B*H] how many they are; heads that read nothing have none.
    """

    head_row: jax.Array
    first: jax.Array
    last: jax.Array
    first_item: jax.Array
    parts: jax.Array


def max_items(num_heads: int, max_slots: int, limits: SpanLimits = DEFAULT_LIMITS) -> int:
    """The static bound on the items of `num_heads` (request, KV head) pairs of at most `max_slots` slots each.

    Raises:
      ValueError: limits that would make empty items, or more than the bound.
    """
    if not limits.multiple <= limits.min_span <= limits.max_span:
        raise ValueError(f"limits must have multiple <= min_span <= max_span, got {limits}")
    spans = limits.wave
    if max_slots > limits.wave_span:
        spans = max(spans, min(limits.most_spans, -(-num_heads * max_slots // limits.max_span)))
    return num_heads + min(spans, num_heads * (max_slots // limits.min_span))


def decode_work_list(
    lengths: jax.Array,
    rows: jax.Array,
    *,
    num_kv_heads: int,
    max_slots: int,
    num_indices: int | None = None,
    limits: SpanLimits = DEFAULT_LIMITS,
) -> WorkList:
    """Cuts the slots that decode attention reads in each layer into items.

    Args:
      lengths: i32[Lt, R, Ht] slots held by each row and head; Ht is 1 or `num_kv_heads`.
      rows: i32[B] the batch.
      num_kv_heads: H.
      max_slots: what no length exceeds (M * page size).
      num_indices: K, when the attention reads a list of K indices per head instead of all slots. Then every head that
        holds anything reads K places.
      limits: bounds on the spans, for tuning.
    """
    check_shape("lengths", lengths, (None, None, None))
    check_shape("rows", rows, (None,))
    check_integer(lengths=lengths, rows=rows)
    return _work_list(
        lengths, rows, num_kv_heads=num_kv_heads, max_slots=max_slots, num_indices=num_indices, limits=limits
    )


@functools.partial(jax.jit, static_argnames=("num_kv_heads", "max_slots", "num_indices", "limits"))
def _work_list(lengths, rows, *, num_kv_heads, max_slots, num_indices, limits):
    layers, batch = lengths.shape[0], rows.shape[0]
    length = jnp.broadcast_to(lengths[:, rows], (layers, batch, num_kv_heads)).reshape(layers, -1)  # [Lt, B*H]
    if num_indices is not None:
        max_slots = num_indices
        length = jnp.where(length > 0, num_indices, 0)
    return span_list(length, max_slots=max_slots, limits=limits)


def span_list(length: jax.Array, *, max_slots: int, limits: SpanLimits = DEFAULT_LIMITS) -> WorkList:
    """The items of heads of `length` i32[Lt, heads], none longer than `max_slots`."""
    heads = length.shape[1]
    total, longest = length.sum(axis=1, keepdims=True), length.max(axis=1, keepdims=True)
    span = jnp.maximum(-(-total // limits.wave), limits.min_span)
    fits = jnp.minimum(span, longest) <= limits.wave_span
    span = jnp.where(fits, span, jnp.maximum(limits.max_span, -(-total // limits.most_spans)))  # [Lt, 1]

    # A head's last quarter of a span is shared out among its other items, which makes fewer, where that costs nothing:
    # of many waves, and of heads about as long as each other, whose few items beyond one wave would take a second.
    heads_read = (length > 0).sum(axis=1, keepdims=True, dtype=jnp.int32)
    are_even = longest * heads_read <= total + total // 8
    ends_late = jnp.where(fits & ~are_even, 0, span // 4)
    parts = jnp.where(length > 0, jnp.maximum(-(-(length - ends_late) // span), 1), 0)  # [Lt, heads]
    rank, first_item = _ranked(parts, -(-length // jnp.maximum(parts, 1)))
    layer = jnp.arange(length.shape[0])[:, None]
    head = jnp.zeros_like(rank).at[layer, rank].set(jnp.arange(heads, dtype=jnp.int32), unique_indices=True)

    # As many heads precede an item as end at or before it. Comparing it with all is one small fused reduction, where a
    # search would be a loop of tiny kernels.
    item = jnp.arange(max_items(heads, max_slots, limits), dtype=jnp.int32)[None]
    precede = ((first_item + parts)[:, None] <= item[..., None]).sum(axis=2, dtype=jnp.int32)  # [Lt, items]
    head_row = jnp.take_along_axis(head, jnp.minimum(precede, heads - 1), axis=1)
    exists = precede < heads

    def of_head(values):
        return jnp.take_along_axis(values, head_row, axis=1)

    place, parts_of = item - of_head(first_item), jnp.maximum(of_head(parts), 1)
    length_of = of_head(length)
    units = -(-length_of // limits.multiple)
    first, last = (units * i // parts_of * limits.multiple for i in (place, place + 1))
    first, last = jnp.where(exists, first, 0), jnp.where(exists, jnp.minimum(last, length_of), 0)
    return WorkList(head_row, first, last, first_item, parts)


def _ranked(parts: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(place of each head, i32[Lt, heads], if those with longer items come first; the items of all heads before it).

    Of heads whose items are as long the first comes first. Every head is compared with all others, which is one fused
    reduction: a sort would be many small kernels.
    """
    head = jnp.arange(size.shape[1])
    is_before = (size[:, None] > size[..., None]) | ((size[:, None] == size[..., None]) & (head < head[:, None]))
    items_before = jnp.where(is_before, parts[:, None], 0).sum(axis=2, dtype=jnp.int32)
    return is_before.sum(axis=2, dtype=jnp.int32), items_before
