"""Exact selection of the best slots without sorting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_SIGN = np.uint32(0x80000000)


def top_slots(
    score: jax.Array, tie: jax.Array, count: jax.Array | int, *, axes: int | tuple[int, ...] = -1
) -> jax.Array:
    """bool, of score's shape: the `count` slots of largest score, pooled over `axes`.

    Exact and deterministic: a threshold is found by bisection over the 32 bits of the ordered scores, and the slots
    that equal it are taken by largest `tie`. The result does not depend on the order of the slots.

    Args:
      score: f32[...]. -inf is never chosen; NaN ranks below all numbers.
      tie: i32 or u32, broadcastable to score's shape, unique among the candidates of a pool and >= 0, e.g. positions:
        equal scores go to the newer token.
      count: i32, broadcastable to score's shape without `axes`; more than there are candidates chooses all of them, 0
        or less none.
      axes: which axes form a pool.
    """
    pool = tuple(axis % score.ndim for axis in ((axes,) if isinstance(axes, int) else axes))
    lanes = tuple(size for axis, size in enumerate(score.shape) if axis not in pool)
    wanted = jnp.expand_dims(jnp.broadcast_to(jnp.asarray(count, jnp.int32), lanes), tuple(sorted(pool)))
    tie = jnp.broadcast_to(tie, score.shape).astype(jnp.uint32)
    key = ordered_bits(score)
    threshold = _largest_threshold(key, key > 0, wanted, pool)
    above = key > threshold
    equal = (key == threshold) & (key > 0)
    missing = wanted - jnp.sum(above, axis=pool, keepdims=True, dtype=jnp.int32)
    newest = _largest_threshold(tie, equal, missing, pool)
    return (above | (equal & (tie >= newest))) & (wanted > 0)


def ordered_bits(score: jax.Array) -> jax.Array:
    """u32: ordered as the scores are; 0 for -inf, 1 for NaN, and zero has no sign."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score.astype(jnp.float32)), jnp.uint32)
    ordered = jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)
    return jnp.where(jnp.isnan(score), jnp.uint32(1), jnp.where(score == -jnp.inf, jnp.uint32(0), ordered))


def _largest_threshold(key: jax.Array, candidate: jax.Array, count: jax.Array, pool: tuple[int, ...]) -> jax.Array:
    """u32: the largest threshold that at least `count` candidates reach; 0 if there are fewer candidates."""

    def refine(step: jax.Array, threshold: jax.Array) -> jax.Array:
        trial = threshold | (_SIGN >> step.astype(jnp.uint32))
        reached = jnp.sum(candidate & (key >= trial), axis=pool, keepdims=True, dtype=jnp.int32)
        return jnp.where(reached >= count, trial, threshold)

    return jax.lax.fori_loop(0, 32, refine, jnp.zeros(count.shape, jnp.uint32))
