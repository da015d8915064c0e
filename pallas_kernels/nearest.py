"""Nearest centers over dense arrays, as an XLA program: for training, and for `reference_search` off the GPU."""

import jax
import jax.numpy as jnp

METRICS = ("l2", "dot", "cosine")
_TILE_SCORES = 1 << 24  # scores held at once: 64 MiB in float32


def nearest_centers(
    x: jax.Array, centers: jax.Array, last: jax.Array, *, neighbors: int, metric: str = "l2"
) -> tuple[jax.Array, jax.Array]:
    """The nearest of the centers that each token sees.

    Scores are float32 whatever the type of x: products of bfloat16 are exact in float32 and summed there. The search is
    exact, equal scores go to the earlier center, and tokens are taken tile by tile, so that no [T, M] array is held.

    Args:
      x: [B, T, F].
      centers: [B, M, F].
      last: i32[T], the last center that each token sees; below 0: none, and its ids are 0.
      neighbors: K.
      metric: "l2", "dot" or "cosine".

    Returns:
      (ids i32[B, T, K], best first; scores f32[B, T, K]: 2 x.c - |c|^2 for "l2" (which orders centers as -|x - c|^2
      does), else the product). A token that sees fewer than K centers gets its best one again in the places that are
      left, scores included.
    """
    batch, length, _ = x.shape
    count = centers.shape[1]
    if metric == "cosine":
        x, centers = _unit(x), _unit(centers)
    bias = -jnp.sum(jnp.square(centers.astype(jnp.float32)), axis=-1) if metric == "l2" else None  # [B, M]
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
        return best(jnp.where(visible, scores, -jnp.inf), neighbors)

    if parts == 1:
        return search(x, last)
    missing = parts * tile - length
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    tiles = x.reshape(batch, parts, tile, -1).swapaxes(0, 1)  # [parts, B, tile, F]
    found = jax.lax.map(lambda part: search(*part), (tiles, jnp.pad(last, (0, missing)).reshape(parts, tile)))
    ids, scores = (array.swapaxes(0, 1).reshape(batch, parts * tile, neighbors)[:, :length] for array in found)
    return ids, scores


def best(scores: jax.Array, neighbors: int) -> tuple[jax.Array, jax.Array]:
    """Places and values of the largest scores along the last axis, by as many maxima: no sort for a few places.

    Equal scores go to the earlier place. Where fewer than `neighbors` are above -inf, the best one stands again.
    """
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
