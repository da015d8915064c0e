"""Means of references, and projected differences from them, as Pallas-Triton kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_tiles import chunk_count, chunk_width, load_references, mean
from pallas_kernels.tiles import WHOLE, exact_dot, index_grid, next_power_of_two


class CompressTile(NamedTuple):
    """Tokens and numbers of the latents of a program, and how Triton compiles it."""

    tokens: int
    numbers: int
    num_warps: int
    num_stages: int


# By bytes per element of the pool.
_TILES = {2: CompressTile(64, 256, 8, 1), 4: CompressTile(16, 64, 4, 1)}
_CHUNK = 64  # numbers of a signal that one product takes
_MEAN_BLOCK = 32  # tokens of a program that only takes means


def default_tile(k_pages: jax.Array) -> CompressTile:
    """The tile for a pool of centers."""
    return _TILES[k_pages.dtype.itemsize]


def _find(table_ref, row, id_ref, token, real, *, address, page_size):
    """K of i32[n]: the rows of KV head 0 of the references of `token` i32[n], in a pool seen as [P * page, D]."""
    found = []
    for neighbor in range(id_ref.shape[1]):
        slot = plgpu.load(id_ref.at[token, jnp.full(token.shape, neighbor, jnp.int32)], mask=real, other=0)
        entry = plgpu.load(table_ref.at[0, row, 0, slot // page_size], mask=real, other=0)
        found.append(address.page(entry, 0) * page_size + slot % page_size)
    return found


def _mean_kernel(k_ref, v_ref, table_ref, row_ref, id_ref, layer_ref, out_ref, *, address, page_size, heads, block):
    """The mean of one KV head of `block` tokens, keys and values."""
    head = pl.program_id(1)
    address = address.join_layer(layer_ref)
    dim = k_ref.shape[1]
    token = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    real = token < out_ref.shape[0]
    row = plgpu.load(row_ref.at[token], mask=real, other=0)

    @pl.when(row.max() > 0)
    def _():
        near = _find(table_ref, row, id_ref, token, real, address=address, page_size=page_size)
        near = [at + head * address.head_stride * page_size for at in near]
        column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
        for half, pool in enumerate((k_ref, v_ref)):
            vectors = load_references(pool, near, real, column, column < dim)
            tokens, columns = index_grid(token, column)
            mask = real[:, None] & (columns < dim)
            at = out_ref.at[tokens, (half * heads + head) * dim + columns]
            plgpu.store(at, mean(vectors).astype(out_ref.dtype), mask=mask)


def _vectors(*pools: jax.Array) -> list[jax.Array]:
    """The pools as [P * page, D]."""
    return [pool.reshape(-1, pool.shape[2]) for pool in pools]


@functools.partial(jax.jit, static_argnames=("address", "heads", "interpret"))
def reference_mean_triton(k_pages, v_pages, page_table, row, ids, layer, *, address, heads, interpret):
    """[N, 2*H*D] for the tokens of rows `row` i32[N]; those of the null row are padding."""
    tokens = ids.shape[0]
    block = min(_MEAN_BLOCK, max(16, next_power_of_two(tokens)))
    return pl.pallas_call(
        functools.partial(_mean_kernel, address=address, page_size=k_pages.shape[1], heads=heads, block=block),
        grid=(pl.cdiv(tokens, block), heads),
        in_specs=[WHOLE] * 6,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((tokens, 2 * heads * k_pages.shape[2]), k_pages.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="reference_mean",
    )(*_vectors(k_pages, v_pages), page_table, row, ids, layer)


def _compress_kernel(
    x_ref, k_ref, v_ref, table_ref, row_ref, id_ref, down_ref, layer_ref, out_ref, *, address, page_size, heads, tile
):
    """Some numbers of the latents of a tile of tokens: products over a few keys and values at a time."""
    address = address.join_layer(layer_ref)
    dim = k_ref.shape[1]
    token = pl.program_id(0) * tile.tokens + jnp.arange(tile.tokens, dtype=jnp.int32)
    number = pl.program_id(1) * tile.numbers + jnp.arange(tile.numbers, dtype=jnp.int32)
    real, exists = token < x_ref.shape[0], number < down_ref.shape[1]
    row = plgpu.load(row_ref.at[token], mask=real, other=0)
    width, chunks = chunk_width(dim, _CHUNK), chunk_count(dim, _CHUNK)

    @pl.when(row.max() > 0)
    def _():
        near = _find(table_ref, row, id_ref, token, real, address=address, page_size=page_size)

        def visit(step, total):
            head = step // chunks
            column = (step - head * chunks) * width + jnp.arange(width, dtype=jnp.int32)
            inside = column < dim
            near_of_head = [at + head * address.head_stride * page_size for at in near]
            for half, pool in enumerate((k_ref, v_ref)):
                start = (half * heads + head) * dim
                tokens, columns = index_grid(token, column)
                x = plgpu.load(x_ref.at[tokens, start + columns], mask=real[:, None] & inside[None, :], other=0.0)
                references = load_references(pool, near_of_head, real, column, inside)
                rows, numbers = index_grid(start + column, number)
                down = plgpu.load(down_ref.at[rows, numbers], mask=inside[:, None] & exists[None, :], other=0.0)
                total += exact_dot((x.astype(jnp.float32) - mean(references)).astype(x.dtype), down)
            return total

        total = jax.lax.fori_loop(0, heads * chunks, visit, jnp.zeros((tile.tokens, tile.numbers), jnp.float32))
        tokens, numbers = index_grid(token, number)
        plgpu.store(out_ref.at[tokens, numbers], total, mask=real[:, None] & exists[None, :])


@functools.partial(jax.jit, static_argnames=("address", "heads", "tile", "interpret"))
def delta_compress_triton(x, k_pages, v_pages, page_table, row, ids, down, layer, *, address, heads, tile, interpret):
    """f32[N, d] for the tokens of rows `row` i32[N]; those of the null row are padding."""
    tokens, size = x.shape[0], down.shape[1]
    tile = tile._replace(
        tokens=min(tile.tokens, max(16, next_power_of_two(tokens))),
        numbers=min(tile.numbers, max(16, next_power_of_two(size))),
    )
    return pl.pallas_call(
        functools.partial(_compress_kernel, address=address, page_size=k_pages.shape[1], heads=heads, tile=tile),
        grid=(pl.cdiv(tokens, tile.tokens), pl.cdiv(size, tile.numbers)),
        in_specs=[WHOLE] * 8,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((tokens, size), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="delta_compress",
    )(x, *_vectors(k_pages, v_pages), page_table, row, ids, down, layer)
