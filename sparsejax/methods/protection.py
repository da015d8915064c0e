"""Slots that are kept whatever their score: the first tokens (sinks) and the last ones, by position."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LARGEST = float(jnp.finfo(jnp.float32).max)


def protected_slots(
    position: jax.Array, text_length: jax.Array, sink_tokens: jax.Array, recent_tokens: jax.Array
) -> jax.Array:
    """bool[...]: whether a token is one of the first `sink_tokens` or the last `recent_tokens` of its text.

    Args:
      position: i32[...], negative at slots that hold no token.
      text_length: i32, broadcastable, tokens of the text so far, evicted ones included.
      sink_tokens, recent_tokens: i32, broadcastable, >= 0.
    """
    return (position >= 0) & ((position < sink_tokens) | (position >= text_length - recent_tokens))


def priorities(scores: jax.Array, live: jax.Array, protected: jax.Array) -> jax.Array:
    """f32: scores made safe to rank: +inf where protected, -inf where not live, finite or NaN in between.

    Infinite scores become the largest finite ones, so that no score outranks the protection and no live slot is taken
    for an empty one.
    """
    bounded = jnp.clip(scores.astype(jnp.float32), -_LARGEST, _LARGEST)
    return jnp.where(live, jnp.where(protected, jnp.inf, bounded), -jnp.inf)
