"""Plain causal attention without a cache, for training and for tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.models.decoder import Attend


def dense_causal_attend(batch: int, scale: float | None = None) -> Attend:
    """An `Attend` for `batch` whole sequences of equal length, laid end to end along the token axis.

    Args:
      batch: number of sequences; T tokens are read as [batch, T / batch].
      scale: multiplier of the scores; None: head_dim ** -0.5.

    The cache is passed through untouched (None will do). Memory of the scores is O(T^2 / batch).
    """

    def attend(
        layer: int, q: jax.Array, k: jax.Array, v: jax.Array, k_pre_rope: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        del layer, k_pre_rope
        if q.shape[0] % batch:
            raise ValueError(f"The number of tokens must be a multiple of batch ({batch}), got {q.shape[0]}.")
        split = [x.reshape(batch, -1, *x.shape[1:]) for x in (q, k, v)]  # [B, T/B, H, D]
        if q.dtype == jnp.float16:  # XLA has no float16 product with a float32 sum on CPUs
            split = [x.astype(jnp.float32) for x in split]
        # float32 must not be rounded to TF32, or a float32 model would not give float32 logits on a GPU.
        precision = "highest" if q.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            out = jax.nn.dot_product_attention(*split, scale=scale, is_causal=True)
        return out.reshape(q.shape).astype(q.dtype), cache

    return attend
