"""References of the "cluster" kind: the K nearest centers at or before a token (arXiv:2602.08005)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.nearest import nearest_centers
from sparsejax.compressor.config import METRICS, CompressorConfigError
from sparsejax.compressor.geometry import center_ordinals


def reference_search(
    x: jax.Array, centers: jax.Array, positions: jax.Array, *, neighbors: int, sinks: int, step: int, metric: str = "l2"
) -> tuple[jax.Array, jax.Array]:
    """The nearest centers of every token, among those at or before its position.

    Exact and in float32, as `pallas_kernels.nearest` says. No gradient passes.

    Args:
      x: [B, T, F], the part of the signal to search with.
      centers: [B, M, F], of centers 0 .. M - 1 in the numbering of `sparsejax.compressor.geometry`.
      positions: i32[T], place of each token in its text.
      neighbors: K.
      sinks, step: geometry of the centers.
      metric: "l2", "dot" or "cosine".

    Returns:
      (ids i32[B, T, K] of centers, best first; scores f32[B, T, K]: 2 x.c - |c|^2 for "l2" (which orders centers as
      -|x - c|^2 does), else the product). A token with fewer than K centers before it gets its best one again in the
      places that are left, scores included.
    """
    if metric not in METRICS:
        raise CompressorConfigError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}.")
    x, centers = jax.lax.stop_gradient((x, centers))
    last = center_ordinals(positions, sinks=sinks, step=step)  # i32[T]
    return nearest_centers(x, centers, last, neighbors=neighbors, metric=metric)


def soft_weights(scores: jax.Array, temperature: float) -> jax.Array:
    """f32[B, T, K], summing to 1: softmax of the scores of `reference_search` over `temperature`. No gradient."""
    return jax.nn.softmax(jax.lax.stop_gradient(scores) / temperature, axis=-1)


def reference_mean(centers: jax.Array, ids: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """[B, T, F]: mean of the centers [B, M, F] that ids i32[B, T, K] name, or their weighted sum (weights [B, T, K]).

    Summed in float32 and rounded once if K is a power of two. It is a product with the matrix of weights [T, M]: on a
    GPU that takes less time than the gather, its gradient far less than the scattered sum into few rows, and the order
    of additions does not change from run to run. Ids that occur twice count twice.
    """
    count, neighbors = centers.shape[1], ids.shape[-1]
    share = jnp.ones(ids.shape, jnp.float32) if weights is None else jax.lax.stop_gradient(weights)
    # One place of K at a time, so that no [T, K, M] array is made. Counts are exact in any type.
    matrix = sum(
        jnp.where(ids[..., place, None] == jnp.arange(count), share[..., place, None], 0) for place in range(neighbors)
    )
    mean = jnp.einsum(
        "btm,bmf->btf",
        jnp.asarray(matrix, centers.dtype),
        centers,
        precision=jax.lax.Precision.HIGHEST if centers.dtype == jnp.float32 else None,
    )
    return mean / neighbors if weights is None else mean
