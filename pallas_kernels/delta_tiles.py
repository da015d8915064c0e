"""Reading tiles of tokens of a DeltaStore back, inside Pallas-Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_store import DeltaStore, Places
from pallas_kernels.latents import GROUP
from pallas_kernels.tiles import MIN_DOT_ROWS, exact_dot, index_grid, next_power_of_two

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


def load_tile(refs: StoreRefs, segment, place: jax.Array, inside: jax.Array, head_rows) -> TokenTile:
    """The tile of the tokens at `place` i32[n] of a segment; `head_rows` are the rows that lie before its KV head.

    Places that are not `inside` are not looked at; unused tokens are dead, too.
    """
    at = jnp.broadcast_to(segment, place.shape)
    latent = plgpu.load(refs.latent.at[at, place], mask=inside, other=-1)
    near = [
        plgpu.load(refs.near.at[at, jnp.full(place.shape, k, jnp.int32), place], mask=inside, other=-1)
        for k in range(refs.near.shape[1])
    ]
    return TokenTile(near[0] >= 0, latent >= 0, tuple(row + head_rows for row in near), jnp.maximum(latent, 0))


def load_grid(
    ref, rows: jax.Array, columns: jax.Array, rows_live: jax.Array | None, columns_live: jax.Array | None, *, at=()
) -> jax.Array:
    """[rows, columns] of an array [n, m], or of the one at index `at` of an array [..., n, m]; 0 where dead.

    Masks of None, all are live, cost no instructions.
    """
    shape = (rows.shape[0], columns.shape[0])
    masks = [
        jnp.broadcast_to(jnp.expand_dims(live, axis), shape)
        for live, axis in ((rows_live, 1), (columns_live, 0))
        if live is not None
    ]
    mask = functools.reduce(jnp.logical_and, masks) if masks else None
    zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
    return plgpu.load(ref.at[(*at, *index_grid(rows, columns))], mask=mask, other=None if mask is None else zero)


def load_references(
    pool_ref, near: Sequence[jax.Array], live: jax.Array, column: jax.Array, column_live: jax.Array | None
) -> list[jax.Array]:
    """K of [n, columns]: columns of the rows `near`, K of i32[n], of a pool [rows, D]; 0 where dead.

    Loads wait for nobody until their values are used: load early, take the `mean` late.
    """
    return [load_grid(pool_ref, row, column, live, column_live) for row in near]


def mean(vectors: Sequence[jax.Array]) -> jax.Array:
    """Their mean, in float32."""
    total = vectors[0].astype(jnp.float32)
    for vector in vectors[1:]:
        total += vector.astype(jnp.float32)
    return total / len(vectors)


def latent_chunk(
    refs: StoreRefs, tile: TokenTile, step, width: int, dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One chunk of the latents: (z dtype[n, width], which numbers i32[width], which exist bool[width] or None)."""
    number = step * width + jnp.arange(width, dtype=jnp.int32)
    exists = None if refs.size % width == 0 else number < refs.size
    load = functools.partial(load_grid, rows=tile.latent, rows_live=tile.compressed, columns_live=exists)
    if refs.scale is None:
        return load(refs.values, columns=number).astype(dtype), number, exists
    # The word of a number is read for each of the four in it: that costs the caches, not the memory.
    words = refs.values.shape[1]
    bits = number // words
    word = load(refs.values, columns=number - bits * words)
    level = ((word.astype(jnp.int32) >> (4 * bits)[None, :]) & 15) - 8
    scale = load(refs.scale, columns=number // GROUP)
    return (level.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype), number, exists


def chunk_width(size: int, most: int) -> int:
    """Numbers of a chunk of latents of `size` numbers, at most `most`: a power of two that a product can take."""
    return min(most, max(MIN_DOT_ROWS, next_power_of_two(size)))


def chunk_count(size: int, most: int) -> int:
    """How many such chunks there are."""
    return -(-size // chunk_width(size, most))


def up_products(refs: StoreRefs, up_ref, tile: TokenTile, columns: Sequence[Columns], dtype) -> list[jax.Array]:
    """f32[n, c] for each part of the columns of `up` [d, F]: the latents times these columns."""
    steps, width = chunk_count(refs.size, CHUNK), chunk_width(refs.size, CHUNK)

    def visit(step, sums):
        z, number, exists = latent_chunk(refs, tile, step, width, dtype)
        return tuple(
            total + exact_dot(z, load_grid(up_ref, number, column, exists, column_live))
            for total, (column, column_live) in zip(sums, columns, strict=True)
        )

    # Tiles of sinks, centers and recent tokens have nothing to project.
    steps = tile.compressed.astype(jnp.int32).max() * steps
    zeros = tuple(jnp.zeros((tile.live.shape[0], column.shape[0]), jnp.float32) for column, _ in columns)
    return list(jax.lax.fori_loop(0, steps, visit, zeros))


class Columns(NamedTuple):
    """Columns of an array: `number` i32[c]; `exists` bool[c], or None if all do."""

    number: jax.Array
    exists: jax.Array | None


def padded_columns(count: int) -> Columns:
    """0 .. count - 1, padded to a power of two that a product can take."""
    padded = max(MIN_DOT_ROWS, next_power_of_two(count))
    number = jnp.arange(padded, dtype=jnp.int32)
    return Columns(number, None if padded == count else number < count)


class HeadColumns(NamedTuple):
    """The columns of one KV head in a signal concat(K, V) of H heads of D numbers.

    Keys come in two halves, as the rotation takes them.
    """

    first: Columns
    second: Columns
    value: Columns


def head_columns(head, heads: int, dim: int) -> HeadColumns:
    """Columns of `head`."""
    half, whole = padded_columns(dim // 2), padded_columns(dim)
    return HeadColumns(
        half._replace(number=head * dim + half.number),
        half._replace(number=head * dim + dim // 2 + half.number),
        whole._replace(number=(heads + head) * dim + whole.number),
    )


def add_bias(bias_ref, vectors: jax.Array, compressed: jax.Array, columns: Columns) -> jax.Array:
    """The vectors f32[n, c] with the bias of `up`, if there is one, in the rows that have a latent."""
    if bias_ref is None:
        return vectors
    masked = {} if columns.exists is None else {"mask": columns.exists, "other": 0.0}
    bias = plgpu.load(bias_ref.at[columns.number], **masked).astype(jnp.float32)
    return vectors + jnp.where(compressed[:, None], bias[None, :], 0.0)


def rotate_halves(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary embedding of the two halves of keys, f32[n, D/2] each."""
    return first * cos - second * sin, second * cos + first * sin
