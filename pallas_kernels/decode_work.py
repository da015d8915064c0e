"""The work list of decode attention: spans of equal length over heads of unequal length, and what is left of each head.

It depends on the lengths and rows only, and not on any query or layer index: one list serves all layers, and XLA
computes it once for a whole step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integer, check_shape


class DecodeTile(NamedTuple):
    """Slots read per step of a program's loop, and how Triton compiles the program."""

    block: int
    num_warps: int
    num_stages: int


class SpanLimits(NamedTuple):
    """How long the spans may be, and so how many there are.

    Attributes:
      wave: programs that the GPU runs at once. While spans of the total number of slots over `wave` stay within
        [min_span, wave_span], there is one wave of them and little to merge.
      min_span: no span is shorter, so that a program's start is worth while.
      wave_span: longest span of a single wave. Beyond it, programs that happen to run slower would hold up the end.
      max_span: span of many waves, which start and end at different times.
      most_spans: bounds the grid and the partial results; beyond `most_spans * max_span` slots the spans grow again.
      multiple: spans are a multiple of this, which is one of every block.
    """

    wave: int = 396  # 3 programs on each of an H200's 132 multiprocessors
    min_span: int = 256
    wave_span: int = 3072
    max_span: int = 2048
    most_spans: int = 4096
    multiple: int = 128


DEFAULT_LIMITS = SpanLimits()


class WorkList(NamedTuple):
    """The items of each table layer: all full spans, in the order of the heads, then the rest of every head.

    The GPU starts programs about in this order, so the short rests fill the gaps that the spans leave at the end. What
    follows the last rest reads nothing, as the rest of a head that its spans cover.

    Attributes:
      head_row: i32[Lt, items] `b * H + h` of each item.
      first, last: i32[Lt, items] the slots (or places in the index list) that it reads: first .. last-1.
      first_span: i32[Lt, B*H + 1] where the full spans of each head start. The rest of head_row r is item
        `first_span[:, -1] + r`.
    """

    head_row: jax.Array
    first: jax.Array
    last: jax.Array
    first_span: jax.Array


def max_items(num_heads: int, max_slots: int, limits: SpanLimits = DEFAULT_LIMITS) -> int:
    """The static bound on the items of `num_heads` (request, KV head) pairs of at most `max_slots` slots each."""
    spans = min(limits.most_spans, max(limits.wave, -(-num_heads * max_slots // limits.max_span)))
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
    total = length.sum(axis=1, keepdims=True)
    span = jnp.maximum(-(-total // limits.wave), limits.min_span)
    span = jnp.where(span > limits.wave_span, jnp.maximum(limits.max_span, -(-total // limits.most_spans)), span)
    span = (-(-span // limits.multiple) * limits.multiple).astype(jnp.int32)  # [Lt, 1]

    spans = length // span
    first_span = jnp.pad(jnp.cumsum(spans, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))  # [Lt, B*H + 1]
    item = jnp.arange(max_items(heads, max_slots, limits), dtype=jnp.int32)[None]
    # The head of a span is the number of heads whose spans end at or before it. Comparing with all is one small fused
    # reduction; a binary search would be a loop of tiny kernels.
    head_of_span = (first_span[:, None, 1:] <= item[..., None]).sum(axis=2, dtype=jnp.int32)
    is_span = item < first_span[:, -1:]
    head_row = jnp.where(is_span, head_of_span, item - first_span[:, -1:])
    exists = head_row < heads
    head_row = jnp.minimum(head_row, heads - 1)
    whole = jnp.take_along_axis(spans, head_row, axis=1)
    place = jnp.where(is_span, item - jnp.take_along_axis(first_span, head_row, axis=1), whole)
    first = jnp.where(exists, place * span, 0)
    last = jnp.where(is_span, first + span, jnp.take_along_axis(length, head_row, axis=1))
    return WorkList(head_row, first, jnp.where(exists, last, 0), first_span)
