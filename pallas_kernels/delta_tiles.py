"""Reading tiles of tokens of a DeltaStore back, inside Pallas-Triton kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_store import DeltaLayout, DeltaStore, tokens_at
from pallas_kernels.latents import GROUP, PER_CODE
from pallas_kernels.paging import PageAddress
from pallas_kernels.tiles import exact_dot, index_grid, next_power_of_two

_MIN_DOT = 16  # the smallest side of a tensor-core product
_CHUNK = 64  # numbers of a latent that one step of a product takes


class StoreRefs(NamedTuple):
    """References to the arrays of a DeltaStore, as `store_arrays` lists them; `scale` is None without codes."""

    k: Any
    v: Any
    near_table: Any
    values: Any
    reference: Any
    latent_table: Any
    scale: Any

    @property
    def quantised(self) -> bool:
        return self.scale is not None


def store_arrays(store: DeltaStore) -> list[jax.Array]:
    """The arrays in the order of StoreRefs."""
    latents = store.latents
    arrays = [store.k_pages, store.v_pages, store.near_table, latents.values, latents.reference, store.latent_table]
    return arrays if latents.scale is None else [*arrays, latents.scale]


def store_refs(refs: Sequence[Any], *, quantised: bool) -> tuple[StoreRefs, Sequence[Any]]:
    """(StoreRefs, the references after them)."""
    return (StoreRefs(*refs[:7]), refs[7:]) if quantised else (StoreRefs(*refs[:6], None), refs[6:])


class TokenTile(NamedTuple):
    """Where a tile of n tokens is.

    Attributes:
      live: bool[n], which tokens exist.
      compressed: bool[n], which have a latent.
      entries, slots: K of i32[n] each: near entries and in-page slots whose mean is the reference, or the token itself.
      latent_page, latent_slot: i32[n]; 0 without a latent.
    """

    live: jax.Array
    compressed: jax.Array
    entries: tuple[jax.Array, ...]
    slots: tuple[jax.Array, ...]
    latent_page: jax.Array
    latent_slot: jax.Array


def find_tokens(
    refs: StoreRefs, row, recent_row, history, position: jax.Array, live: jax.Array, layout: DeltaLayout
) -> TokenTile:
    """Looks the tokens at `position` i32[n] of one request up in the tables."""
    compressed, near_row, own = tokens_at(row, recent_row, history, position, layout=layout)
    compressed &= live
    page_size = refs.values.shape[1]
    latent_slot = jnp.where(compressed, own, 0)
    entry = plgpu.load(
        refs.latent_table.at[0, jnp.broadcast_to(row, own.shape), 0, latent_slot // page_size],
        mask=compressed,
        other=0,
    )
    latent_page, latent_slot = layout.latent.page(entry, 0), latent_slot % page_size
    page_size = refs.k.shape[1]
    entries, slots = [], []
    for neighbor in range(refs.reference.shape[2]):
        ordinal = plgpu.load(
            refs.reference.at[latent_page, latent_slot, jnp.full(own.shape, neighbor, jnp.int32)],
            mask=compressed,
            other=0,
        ).astype(jnp.int32)
        slot = jnp.where(compressed, ordinal, own)
        entries.append(plgpu.load(refs.near_table.at[0, near_row, 0, slot // page_size], mask=live, other=0))
        slots.append(slot % page_size)
    return TokenTile(live, compressed, tuple(entries), tuple(slots), latent_page, latent_slot)


def mean_vectors(
    pool_ref, entries: Sequence[jax.Array], slots: Sequence[jax.Array], head, live: jax.Array, column: jax.Array,
    column_live: jax.Array, *, address: PageAddress,
) -> jax.Array:  # fmt: skip
    """f32[n, columns]: mean over the neighbours of the columns of their vectors in the near pool; 0 where dead."""
    total = jnp.zeros((live.shape[0], column.shape[0]), jnp.float32)
    mask = live[:, None] & column_live[None, :]
    for entry, slot in zip(entries, slots, strict=True):
        page, columns = index_grid(address.page(entry, head), column)
        place, _ = index_grid(slot, column)
        total += plgpu.load(pool_ref.at[page, place, columns], mask=mask, other=0.0).astype(jnp.float32)
    return total / len(entries)


def chunks_of(refs: StoreRefs, width: int = _CHUNK) -> tuple[int, int]:
    """(steps, width): how the words of a latent are cut, a word being a number or PER_CODE of them."""
    words = refs.values.shape[2]
    width = min(width, max(_MIN_DOT, next_power_of_two(words)))
    return -(-words // width), width


def latent_parts(refs: StoreRefs, tile: TokenTile, step, width: int, dtype):
    """The numbers of one chunk of words: tuples (z dtype[n, width], their places i32[width], which exist)."""
    words = refs.values.shape[2]
    word = step * width + jnp.arange(width, dtype=jnp.int32)
    exists = word < words
    page, words_at = index_grid(tile.latent_page, word)
    slot, _ = index_grid(tile.latent_slot, word)
    mask = tile.compressed[:, None] & exists[None, :]
    held = plgpu.load(refs.values.at[page, slot, words_at], mask=mask, other=0)
    if not refs.quantised:
        return [(held.astype(dtype), word, exists)]
    codes = held.astype(jnp.int32)
    parts = []
    for i in range(PER_CODE):
        number = i * words + word
        _, group = index_grid(tile.latent_slot, number // GROUP)
        scale = plgpu.load(refs.scale.at[page, slot, group], mask=mask, other=0.0).astype(jnp.float32)
        level = ((codes >> (4 * i)) & 15) - 8
        parts.append(((level.astype(jnp.float32) * scale).astype(dtype), number, exists))
    return parts


def load_up(up_ref, number: jax.Array, exists: jax.Array, column: jax.Array, column_live: jax.Array) -> jax.Array:
    """A tile of `up` [d, F]; 0 where a row or column does not exist."""
    rows, columns = index_grid(number, column)
    return plgpu.load(up_ref.at[rows, columns], mask=exists[:, None] & column_live[None, :], other=0.0)


def up_products(
    refs: StoreRefs, up_ref, tile: TokenTile, columns: Sequence[tuple[jax.Array, jax.Array]], dtype
) -> list[jax.Array]:
    """f32[n, c] for each (columns of `up` i32[c], which exist bool[c]): the latents times those columns."""
    steps, width = chunks_of(refs)
    count = tile.live.shape[0]

    def visit(step, sums):
        for z, number, exists in latent_parts(refs, tile, step, width, dtype):
            sums = tuple(
                total + exact_dot(z, load_up(up_ref, number, exists, *column))
                for total, column in zip(sums, columns, strict=True)
            )
        return sums

    # Tiles of sinks, centers and recent tokens have nothing to project.
    steps = jnp.where(tile.compressed.astype(jnp.int32).max() > 0, steps, 0)
    zeros = tuple(jnp.zeros((count, column.shape[0]), jnp.float32) for column, _ in columns)
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
