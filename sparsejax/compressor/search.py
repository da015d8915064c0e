"""References of the "cluster" kind: the K nearest centers at or before a token (arXiv:2602.08005)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsejax.compressor.config import METRICS, CompressorConfigError
from sparsejax.compressor.geometry import center_ordinals

_TILE_SCORES = 1 << 24  # scores held at once: 64 MiB in float32


def reference_search(
    x: jax.Array, centers: jax.Array, positions: jax.Array, *, neighbors: int, sinks: int, step: int, metric: str = "l2"
) -> tuple[jax.Array, jax.Array]:
    """The nearest centers of every token, among those at or before its position.

    Scores are float32 whatever the type of x: products of bfloat16 are exact in float32 and summed there. The search is
    exact, equal scores go to the earlier center, and tokens are taken tile by tile, so that no [T, M] array is held.
    No gradient passes.

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
    batch, length, _ = x.shape
    count = centers.shape[1]
    if metric == "cosine":
        x, centers = _unit(x), _unit(centers)
    bias = -jnp.sum(jnp.square(centers.astype(jnp.float32)), axis=-1) if metric == "l2" else None  # [B, M]
    last = center_ordinals(positions, sinks=sinks, step=step)  # i32[T]
    parts = -(-length * batch * count // _TILE_SCORES)
    tile = -(-length // parts)

    def search(rows: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum(
            "btf,bmf->btm",
            rows,
            centers,
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        scores = scores if bias is None else 2 * scores + bias[:, None]
        visible = jnp.arange(count) <= last[:, None]  # [t, M]
        return _best(jnp.where(visible, scores, -jnp.inf), neighbors)

    if parts == 1:
        return search(x, last)
    missing = parts * tile - length
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    tiles = x.reshape(batch, parts, tile, -1).swapaxes(0, 1)  # [parts, B, tile, F]
    found = jax.lax.map(lambda part: search(*part), (tiles, jnp.pad(last, (0, missing)).reshape(parts, tile)))
    ids, scores = (array.swapaxes(0, 1).reshape(batch, parts * tile, neighbors)[:, :length] for array in found)
    return ids, scores


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


def _best(scores: jax.Array, neighbors: int) -> tuple[jax.Array, jax.Array]:
    """Places and values of the largest scores along the last axis, by as many maxima: no sort for a few places."""
    ids, values = [], []
    for _ in range(neighbors):
        place = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        value = jnp.max(scores, axis=-1)
        known = value > -jnp.inf
        ids.append(jnp.where(known, place, ids[0]) if ids else place)
        values.append(jnp.where(known, value, values[0]) if values else value)
        scores = jnp.where(jnp.arange(scores.shape[-1]) == place[..., None], -jnp.inf, scores)
    return jnp.stack(ids, axis=-1), jnp.stack(values, axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    """x over its length, in float32; zero stays zero."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(wide), axis=-1, keepdims=True), 1e-30))
