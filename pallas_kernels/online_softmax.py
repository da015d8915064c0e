"""Attention over keys that arrive block by block: the running softmax of FlashAttention (Dao et al. 2022, section 3.1).

The same few lines serve the Triton kernels (2-D tiles) and the XLA programs (any leading batch axes). The state is in
base 2, that is of scores multiplied by LOG2_E, because exp2 is one instruction on a GPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

EMPTY_LSE = -1e30
"""Log-sum-exp reported for a query that attends to nothing. Finite, so that merging parts never makes a NaN."""

# Below EMPTY_LSE, which is where the largest score starts, after any scaling: it weighs 0 even when no key is live.
DEAD_SCORE = -3e38

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class SoftmaxState(NamedTuple):
    """What is known after some blocks of keys. Queries are the last axis but for `values`, which ends in [queries, D].

    Attributes:
      values: f32[..., queries, D], sum of `2**(score - top) * value`.
      top: f32[..., queries], largest score so far (EMPTY_LSE when none).
      total: f32[..., queries], sum of `2**(score - top)`.
    """

    values: jax.Array
    top: jax.Array
    total: jax.Array


def start(queries: tuple[int, ...], dim: int) -> SoftmaxState:
    """The state before any key, for `queries` = the shape of the queries."""
    return SoftmaxState(
        jnp.zeros((*queries, dim), jnp.float32),
        jnp.full(queries, EMPTY_LSE, jnp.float32),
        jnp.zeros(queries, jnp.float32),
    )


def absorb(
    state: SoftmaxState,
    scores: jax.Array,
    live: jax.Array | None,
    weighted_sum: Callable[[jax.Array], jax.Array],
    *,
    scale: float = 1.0,
    exp2: Callable[[jax.Array], jax.Array] = jnp.exp2,
) -> SoftmaxState:
    """Adds one block of keys.

    Args:
      state: the state so far.
      scores: f32[..., queries, keys], base 2 once multiplied by `scale`. What dead entries hold does not matter.
      live: bool, broadcastable to `scores`: which keys each query attends to. None means all.
      weighted_sum: maps weights f32[..., queries, keys] to `weights @ values`.
      scale: positive factor of the scores. Applied here it joins the subtraction of the largest in one instruction.
      exp2: the exponential to use.
    """
    if live is not None:
        scores = jnp.where(live, scores, DEAD_SCORE)
    top = jnp.maximum(state.top, scores.max(axis=-1) * scale)
    weights = exp2(scores * scale - top[..., None])
    shrink = exp2(state.top - top)
    values = state.values * shrink[..., None] + weighted_sum(weights)
    return SoftmaxState(values, top, state.total * shrink + weights.sum(axis=-1))


def finish(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """(out f32[..., queries, D], natural log-sum-exp f32[..., queries]); 0 and EMPTY_LSE for queries without keys."""
    total = jnp.maximum(state.total, 1e-30)
    lse = jnp.where(state.total > 0.0, (state.top + jnp.log2(total)) * LN_2, EMPTY_LSE)
    return state.values / total[..., None], lse


def merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `finish` gives for all keys, from out f32[parts, ..., D] and lse f32[parts, ...] for a part of them each."""
    state = absorb(
        start(lse.shape[1:], out.shape[-1]),
        jnp.moveaxis(lse, 0, -1),
        None,
        lambda weights: (jnp.moveaxis(weights, -1, 0)[..., None] * out).sum(axis=0),
        scale=LOG2_E,
    )
    return finish(state)
