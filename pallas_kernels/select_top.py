"""The k slots with the largest scores of each row, in ascending order: what a selection of tokens or pages reads.

The result is exact and depends on the row alone: equal scores go to the lower slot. The kernels search the k-th largest
score bit by bit, in the order-preserving integers of the floats (radix select), so nothing is ever sorted.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integer, check_shape
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.select_top_triton import ordered_keys, select_top_triton


def select_top(
    scores: jax.Array,
    first: jax.Array,
    last: jax.Array,
    count: jax.Array,
    *,
    k: int,
    probabilities: bool = False,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """The `count` slots of each row with the largest scores among its candidates, ascending.

    Args:
      scores: f32[N, S], no NaN among the candidates; the others may be anything.
      first, last: i32[N], the candidates of row n are the slots first[n] .. last[n]-1, with 0 <= first and last <= S.
      count: i32[N], how many to take: as many as there are candidates if there are fewer, and never more than k.
      k: static bound on them, at most S.
      probabilities: the scores of all candidates are from 0 to 1, which the kernel's passes tell apart sooner. Others
        may be told apart wrongly, but as many slots are chosen, all of them candidates.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      i32[N, k]: the slots in ascending order, then -1. Of equal scores the lower slot is taken first.

    Raises:
      ValueError, TypeError: shapes, dtypes or a k that do not fit.
    """
    check_shape("scores", scores, (None, None))
    if scores.dtype != jnp.float32:
        raise TypeError(f"scores must be float32, got {scores.dtype}")
    rows, size = scores.shape
    for name, array in (("first", first), ("last", last), ("count", count)):
        check_shape(name, array, (rows,))
    check_integer(first=first, last=last, count=count)
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to {size} (the slots of a row), got {k}")
    implementation, interpret = resolve(implementation, interpret)
    if rows == 0:
        return jnp.zeros((0, k), jnp.int32)
    wanted = jnp.clip(jnp.minimum(count, last - first), 0, k)
    if implementation == "xla":
        return _select_top_xla(scores, first, last, wanted, k=k)
    return select_top_triton(scores, first, last, wanted, k=k, probabilities=probabilities, interpret=interpret)


def _select_top_xla(scores, first, last, wanted, *, k):
    slot = jnp.arange(scores.shape[1], dtype=jnp.int32)
    live = (slot >= first[:, None]) & (slot < last[:, None])
    keys = jnp.where(live, ordered_keys(scores), jnp.iinfo(jnp.int32).min)
    _, best = jax.lax.top_k(keys, k)  # of equal keys the lower index comes first
    taken = jnp.arange(k, dtype=jnp.int32) < wanted[:, None]
    ascending = jnp.sort(jnp.where(taken, best, scores.shape[1]), axis=1)
    return jnp.where(taken, ascending, -1).astype(jnp.int32)


def select_top_reference(scores, first, last, count, *, k: int) -> jax.Array:
    """The meaning of `select_top`: a stable sort of the candidates by falling score."""
    slot = jnp.arange(scores.shape[1])
    live = (slot >= first[:, None]) & (slot < last[:, None])
    falling = jnp.where(live, ~ordered_keys(scores), jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(falling, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    chosen = live & (rank < jnp.minimum(count, k)[:, None])
    slots = jnp.sort(jnp.where(chosen, slot, scores.shape[1]), axis=1)[:, :k]
    return jnp.where(slots < scores.shape[1], slots, -1).astype(jnp.int32)
