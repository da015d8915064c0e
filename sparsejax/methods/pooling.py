"""Smoothing of scores along the text: neighbours are by position, whatever the order of the slots."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Pooling = Literal["max", "avg", "none"]
POOLINGS: tuple[Pooling, ...] = ("max", "avg", "none")


def pool_along_text(
    scores: jax.Array,
    position: jax.Array,
    member: jax.Array,
    *,
    size: int,
    pooling: Pooling,
    in_text_order: bool = False,
) -> jax.Array:
    """f32[..., S]: each member's score replaced by the maximum or mean over it and its neighbours in the text.

    Neighbours are the (size - 1) / 2 members before and after in the order of positions; where there are fewer, at the
    ends, the mean is over those that exist.

    Args:
      scores: f32[..., S].
      position: i32[..., S], unique among the members of a lane.
      member: bool[..., S], which slots take part; others neither count nor get a score (theirs is 0).
      size: odd, of the window.
      pooling: "max", "avg", or "none" (the scores as they are).
      in_text_order: the members are known to lie at the front, in the order of their positions: nothing is sorted.
    """
    if pooling == "none" or size == 1:
        return jnp.where(member, scores, 0.0)

    scores = scores.astype(jnp.float32)
    if in_text_order:
        return _pool(scores, member, size, pooling)
    order = jnp.argsort(jnp.where(member, position, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)
    pooled = _pool(
        jnp.take_along_axis(scores, order, axis=-1), jnp.take_along_axis(member, order, axis=-1), size, pooling
    )
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)


def _pool(scores: jax.Array, member: jax.Array, size: int, pooling: Pooling) -> jax.Array:
    """Pools over neighbouring slots; the members lie at the front."""
    size = min(size, 2 * scores.shape[-1] + 1)  # every slot's neighbours are all others already
    window = (1,) * (scores.ndim - 1) + (size,)
    strides = (1,) * scores.ndim
    if pooling == "max":
        pooled = jax.lax.reduce_window(
            jnp.where(member, scores, -jnp.inf), -jnp.inf, jax.lax.max, window, strides, "SAME"
        )
    else:
        total = jax.lax.reduce_window(jnp.where(member, scores, 0.0), 0.0, jax.lax.add, window, strides, "SAME")
        count = jax.lax.reduce_window(member.astype(jnp.float32), 0.0, jax.lax.add, window, strides, "SAME")
        pooled = total / jnp.maximum(count, 1.0)
    return jnp.where(member, pooled, 0.0)
