"""Dense causal attention over whole sequences, within documents if asked, by the backend's best program."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None = None) -> jax.Array:
    """Causal attention.

    cuDNN's fused kernel in 16 bits on a GPU, whose memory is linear in T without documents; else XLA's, which holds the
    scores.

    Args:
      q: [B, T, Hq, D]; k, v: [B, T, H, D], of one type.
      documents: i32[B, T], number of each token's document in its row; None: one text a row.

    Returns:
      [B, T, Hq, D].
    """
    mask = None if documents is None else (documents[:, :, None] == documents[:, None, :])[:, None]  # [B, 1, T, T]
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, implementation="cudnn" if fused else "xla"
        )
