"""Where the queries stand whose attention was recorded, for scores that are to be means over them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ObservedQueries:
    """Of K texts; i32[K] each. At every place where a prompt is compressed its last queries were observed.

    Attributes:
      stride: tokens between two of these places.
      width: queries observed before each of them, as far as they lie behind the place before.
      context: the last place; all of the prompt but for requests with `context_tokens`.
      prompt: tokens of the prompt. Behind the context its last queries are observed as well, and all decoded ones.
    """

    stride: jax.Array | np.ndarray
    width: jax.Array | np.ndarray
    context: jax.Array | np.ndarray
    prompt: jax.Array | np.ndarray

    def before(self, position: jax.Array) -> jax.Array:
        """i32[K, ...]: how many stand before each position i32[K, ...] of the text."""
        lane = (slice(None), *[None] * (position.ndim - 1))
        stride, width, context, prompt = (
            jnp.asarray(each)[lane] for each in (self.stride, self.width, self.context, self.prompt)
        )
        stride = jnp.maximum(stride, 1)

        def last_of(length: jax.Array, taken: jax.Array) -> jax.Array:
            """Of `length` tokens the last `width` are observed: how many of the first `taken`."""
            return jnp.maximum(taken - jnp.maximum(length - width, 0), 0)

        inside = jnp.minimum(position, context)
        whole = inside // stride
        rest = inside - whole * stride
        count = whole * jnp.minimum(width, stride) + last_of(jnp.minimum(stride, context - whole * stride), rest)
        behind = prompt - context
        count += last_of(behind, jnp.clip(position - context, 0, behind))
        return count + jnp.maximum(position - prompt, 0)

    def behind(self, position: jax.Array, text_length: jax.Array) -> jax.Array:
        """i32[K, ...]: how many could see each position i32[K, ...] of texts of i32[K] tokens: it, or one behind it."""
        end = text_length.reshape(-1, *[1] * (position.ndim - 1))
        return self.before(end) - self.before(jnp.minimum(position, end))
