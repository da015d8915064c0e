"""Tiles of packed queries on a fixed grid: each visits the segments that have tokens in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SegmentVisits(NamedTuple):
    """Which segments each tile visits: tile t makes visits `bounds[t] .. bounds[t + 1] - 1`, the others are not real.

    Attributes:
      bounds: i32[tiles + 1].
      row: i32[visits] table row of the segment.
      first, last: i32[visits] its tokens in the tile, `first .. last-1`.
      key_first: i32[visits] its first token.
    """

    bounds: jax.Array
    row: jax.Array
    first: jax.Array
    last: jax.Array
    key_first: jax.Array


def segment_visits(rows: jax.Array, starts: jax.Array, tokens: int, block: int) -> SegmentVisits:
    """Cuts the packed tokens at multiples of `block`, of which `tokens` is one.

    Args:
      rows: i32[S] table row of each segment, S > 0.
      starts: i32[S + 1] as in `prefill_attention`.
    """
    segments, tiles = rows.shape[0], tokens // block
    begin, end = starts[:-1], starts[1:]
    counts = jnp.where(begin < end, (end - 1) // block - begin // block + 1, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    # Of S segments in a row, all but the first may begin in a tile that another one has begun.
    visit = jnp.arange(tiles + segments - 1, dtype=jnp.int32)
    segment = jnp.searchsorted(ends, visit, side="right", method="compare_all").astype(jnp.int32)
    real = segment < segments
    segment = jnp.minimum(segment, segments - 1)
    begin, end = begin[segment], end[segment]
    tile = jnp.where(real, begin // block + visit - (ends - counts)[segment], tiles)
    bounds = jnp.searchsorted(tile, jnp.arange(tiles + 1, dtype=jnp.int32), side="left", method="compare_all")
    return SegmentVisits(
        bounds=bounds.astype(jnp.int32),
        row=rows[segment],
        first=jnp.maximum(begin, tile * block),
        last=jnp.minimum(end, (tile + 1) * block),
        key_first=begin,
    )
