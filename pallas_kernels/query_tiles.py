"""Tiles of packed queries: none crosses from one request's segment into the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QueryTiles(NamedTuple):
    """Which packed tokens each tile covers: `first .. last-1`, at most block_q of them; none where first >= last.

    Attributes:
      row: i32[tiles] table row whose history the tile reads; the null row for padding tokens.
      first: i32[tiles] the tile's first token.
      last: i32[tiles] end of the tile's segment.
      key_first: i32[tiles] first token of the segment; for padding its end, so that the tile reads no keys.
    """

    row: jax.Array
    first: jax.Array
    last: jax.Array
    key_first: jax.Array


def query_tiles(rows: jax.Array, starts: jax.Array, tokens: int, block_q: int) -> QueryTiles:
    """Cuts the segments, and the padding behind them as one more segment, into tiles."""
    segments = rows.shape[0] + 1
    rows = jnp.concatenate([rows, jnp.zeros(1, jnp.int32)])
    starts = jnp.concatenate([starts, jnp.full(1, tokens, jnp.int32)])
    first_tile = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.cumsum(-(-jnp.diff(starts) // block_q), dtype=jnp.int32)]
    )
    # Every segment has at most one tile that is not full.
    tile = jnp.arange(min(tokens // block_q + segments, tokens), dtype=jnp.int32)
    segment = jnp.searchsorted(first_tile[1:], tile, side="right", method="compare_all").astype(jnp.int32)
    last = starts[jnp.minimum(segment, segments - 1) + 1]
    first = starts[jnp.minimum(segment, segments - 1)]
    return QueryTiles(
        row=rows[jnp.minimum(segment, segments - 1)],
        first=jnp.where(segment < segments, first + (tile - first_tile[segment]) * block_q, tokens),
        last=last,
        key_first=jnp.where(segment < segments - 1, first, last),
    )
