"""References of the "e2e" kind: by position, without a search."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def positional_references(x: jax.Array, *, chunk_size: int, mode: str) -> jax.Array | None:
    """A reference for every token, made of the tokens at and before it.

    Args:
      x: [B, T, F], the tokens after the sinks.
      chunk_size: c.
      mode: "avg": sum of the token and the c - 1 before it, over c; there are zeros before the first token, so that the
        first c - 1 references are shorter. "first": the first token of its group of c.

    Returns:
      [B, T, F], or None if chunk_size is 1: then a token has no reference.
    """
    if chunk_size == 1:
        return None
    length = x.shape[1]
    if mode == "first":
        return x[:, jnp.arange(length) // chunk_size * chunk_size]
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (chunk_size - 1, 0), (0, 0)))
    window = sum(wide[:, shift : shift + length] for shift in range(chunk_size))
    return (jnp.asarray(window) / chunk_size).astype(x.dtype)
