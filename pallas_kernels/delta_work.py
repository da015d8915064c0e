"""The work list of `delta_attention`: equal spans of the lists of positions of all (request, KV head) pairs."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integer, check_shape
from pallas_kernels.decode_work import SpanLimits, WorkList, span_list

# One program runs on a multiprocessor at a time, and most views are equally long: 128 of an H200's 132 divide better.
LIMITS = SpanLimits(wave=128, min_span=128, wave_span=4096, max_span=2048, multiple=32)


def delta_work_list(positions: jax.Array, *, num_kv_heads: int, limits: SpanLimits = LIMITS) -> WorkList:
    """Cuts the lists into items. They depend on the positions only: one work list serves all layers that share them.

    Args:
      positions: i32[B, V], below 0: unused. The work of a request ends at its last used place.
      num_kv_heads: H.
      limits: bounds on the spans, for tuning.
    """
    check_shape("positions", positions, (None, None))
    check_integer(positions=positions)
    return _work_list(positions, num_kv_heads=num_kv_heads, limits=limits)


@functools.partial(jax.jit, static_argnames=("num_kv_heads", "limits"))
def _work_list(positions, *, num_kv_heads, limits):
    place = jnp.arange(1, positions.shape[1] + 1, dtype=jnp.int32)
    count = jnp.where(positions >= 0, place, 0).max(axis=1)  # [B]
    return span_list(jnp.repeat(count, num_kv_heads)[None], max_slots=positions.shape[1], limits=limits)
