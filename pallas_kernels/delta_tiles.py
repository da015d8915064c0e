"""Reading tiles of tokens of a DeltaStore back, inside Pallas-Triton kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_places import Places
from pallas_kernels.delta_store import DeltaStore
from pallas_kernels.latents import GROUP
from pallas_kernels.tiles import exact_dot, index_grid, next_power_of_two

_MIN_DOT = 16  # the smallest side of a tensor-core product
CHUNK = 64
"""Numbers of a latent that one step of a product takes."""


class StoreRefs(NamedTuple):
    """References to the pools seen as [P * page, n], and to the places of the tokens; `scale` is None without codes."""

    k: Any
    v: Any
    values: Any
    near: Any
    latent: Any
    scale: Any

    @property
    def size(self) -> int:
        """d, numbers of a latent."""
        return self.values.shape[1] * (1 if self.scale is None else 4)


def store_arrays(store: DeltaStore, places: Places) -> list[jax.Array]:
    """The arrays in the order of StoreRefs."""
    latents = store.latents
    pools = [pool.reshape(-1, pool.shape[2]) for pool in (store.k_pages, store.v_pages, latents.values)]
    scale = [] if latents.scale is None else [latents.scale.reshape(-1, latents.scale.shape[2])]
    return [*pools, *places, *scale]


def store_refs(refs: Sequence[Any], *, quantised: bool) -> tuple[StoreRefs, Sequence[Any]]:
    """(StoreRefs, the references after them)."""
    k, v, values, near, latent, *rest = refs
    scale, rest = (rest[0], rest[1:]) if quantised else (None, rest)
    return StoreRefs(k, v, values, near, latent, scale), rest


class TokenTile(NamedTuple):
    """Where a tile of n tokens is, for one KV head.

    Attributes:
      live: bool[n], which tokens exist.
      compressed: bool[n], which have a latent.
      near: K of i32[n], rows of the near pool whose mean is the reference.
      latent: i32[n], row of the latents; 0 without one.
    """

    live: jax.Array
    compressed: jax.Array
    near: tuple[jax.Array, ...]
    latent: jax.Array


def load_tile(refs: StoreRefs, segment, place: jax.Array, live: jax.Array, head_rows) -> TokenTile:
    """The tile of the tokens at `place` i32[n] of a segment; `head_rows` are the rows that lie before its KV head."""
    at = jnp.broadcast_to(segment, place.shape)
    latent = plgpu.load(refs.latent.at[at, place], mask=live, other=-1)
    near = tuple(
        plgpu.load(refs.near.at[at, jnp.full(place.shape, k, jnp.int32), place], mask=live, other=0) + head_rows
        for k in range(refs.near.shape[1])
    )
    return TokenTile(live, latent >= 0, near, jnp.maximum(latent, 0))


def load_references(
    pool_ref, near: Sequence[jax.Array], live: jax.Array, column: jax.Array, column_live: jax.Array
) -> list[jax.Array]:
    """K of [n, columns]: columns of the rows `near`, K of i32[n], of a pool [rows, D]; 0 where dead.

    Loads wait for nobody until their values are used: load early, take the `mean` late.
    """
    mask = live[:, None] & column_live[None, :]
    return [plgpu.load(pool_ref.at[index_grid(row, column)], mask=mask, other=0.0) for row in near]


def mean(vectors: Sequence[jax.Array]) -> jax.Array:
    """Their mean, in float32."""
    total = vectors[0].astype(jnp.float32)
    for vector in vectors[1:]:
        total += vector.astype(jnp.float32)
    return total / len(vectors)


def latent_chunk(refs: StoreRefs, tile: TokenTile, step, width: int, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk of the latents: (z dtype[n, width], which numbers i32[width], which exist bool[width])."""
    number = step * width + jnp.arange(width, dtype=jnp.int32)
    exists = number < refs.size
    mask = tile.compressed[:, None] & exists[None, :]
    if refs.scale is None:
        held = plgpu.load(refs.values.at[index_grid(tile.latent, number)], mask=mask, other=0.0)
        return held.astype(dtype), number, exists
    # The word of a number is read for each of the four in it: that costs the caches, not the memory.
    words = refs.values.shape[1]
    bits = number // words
    word = plgpu.load(refs.values.at[index_grid(tile.latent, number - bits * words)], mask=mask, other=0)
    level = ((word.astype(jnp.int32) >> (4 * bits)[None, :]) & 15) - 8
    scale = plgpu.load(refs.scale.at[index_grid(tile.latent, number // GROUP)], mask=mask, other=0.0)
    return (level.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype), number, exists


def chunks_of(refs: StoreRefs, width: int) -> tuple[int, int]:
    """(steps, width): how latents are cut into chunks of at most `width` numbers."""
    width = min(width, max(_MIN_DOT, next_power_of_two(refs.size)))
    return -(-refs.size // width), width


def load_up(up_ref, number: jax.Array, exists: jax.Array, column: jax.Array, column_live: jax.Array) -> jax.Array:
    """A tile of `up` [d, F]; 0 where a row or column does not exist."""
    return plgpu.load(up_ref.at[index_grid(number, column)], mask=exists[:, None] & column_live[None, :], other=0.0)


def up_products(
    refs: StoreRefs, up_ref, tile: TokenTile, columns: Sequence[tuple[jax.Array, jax.Array]], dtype
) -> list[jax.Array]:
    """f32[n, c] for each (columns of `up` i32[c], which exist bool[c]): the latents times those columns."""
    steps, width = chunks_of(refs, CHUNK)

    def visit(step, sums):
        z, number, exists = latent_chunk(refs, tile, step, width, dtype)
        return tuple(
            total + exact_dot(z, load_up(up_ref, number, exists, *column))
            for total, column in zip(sums, columns, strict=True)
        )

    # Tiles of sinks, centers and recent tokens have nothing to project.
    steps = tile.compressed.astype(jnp.int32).max() * steps
    zeros = tuple(jnp.zeros((tile.live.shape[0], column.shape[0]), jnp.float32) for column, _ in columns)
    return list(jax.lax.fori_loop(0, steps, visit, zeros))


class HeadColumns(NamedTuple):
    """The columns of one KV head in a signal concat(K, V) of H heads of D numbers: (i32[c], which exist bool[c]) each.

    Keys come in two halves, as the rotation takes them.
    """

    first: tuple[jax.Array, jax.Array]
    second: tuple[jax.Array, jax.Array]
    value: tuple[jax.Array, jax.Array]


def head_columns(head, heads: int, dim: int) -> HeadColumns:
    """Columns of `head`; padded to powers of two that a product can take."""
    half = jnp.arange(max(_MIN_DOT, next_power_of_two(dim // 2)), dtype=jnp.int32)
    whole = jnp.arange(max(_MIN_DOT, next_power_of_two(dim)), dtype=jnp.int32)
    return HeadColumns(
        (head * dim + half, half < dim // 2),
        (head * dim + dim // 2 + half, half < dim // 2),
        ((heads + head) * dim + whole, whole < dim),
    )


def rotate_halves(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary embedding of the two halves of keys, f32[n, D/2] each."""
    return first * cos - second * sin, second * cos + first * sin
