"""Reading tokens of a DeltaStore back into pages, as a Pallas-Triton kernel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_tiles import (
    find_tokens,
    head_columns,
    mean_vectors,
    rotate_halves,
    store_arrays,
    store_refs,
    up_products,
)
from pallas_kernels.tiles import WHOLE, index_grid, next_power_of_two


class ReconstructTile(NamedTuple):
    """Tokens of a program, and how Triton compiles it."""

    block: int
    num_warps: int
    num_stages: int


# By bytes per element of the near pool.
_TILES = {2: ReconstructTile(64, 4, 3), 4: ReconstructTile(16, 4, 1)}


def default_tile(k_pages: jax.Array) -> ReconstructTile:
    """The tile for a near pool."""
    return _TILES[k_pages.dtype.itemsize]


def _kernel(*refs, layout, heads, tokens, block, quantised, listed, projected, biased):
    """One KV head of `block` tokens of a segment."""
    store, refs = store_refs(refs, quantised=quantised)
    rows_ref, recent_rows_ref, history_ref, lengths_ref, cos_ref, sin_ref, delta_ref, *refs = refs
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    position_ref, refs = (refs[0], refs[1:]) if listed else (None, refs)
    near_layer_ref, latent_layer_ref, k_out, v_out = refs
    index, head, s = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    layout = layout.join_layer(near_layer_ref, latent_layer_ref)
    page_size, dim = store.k.shape[1:]
    half, dtype = dim // 2, store.k.dtype
    place = index * block + jnp.arange(block, dtype=jnp.int32)
    length = lengths_ref[s]
    if position_ref is None:
        position = place
        live = place < jnp.minimum(length, tokens)
    else:
        position = plgpu.load(position_ref.at[s, place], mask=place < tokens, other=-1)
        live = (position >= 0) & (position < length)

    @pl.when(live.astype(jnp.int32).max() > 0)
    def _():
        at = find_tokens(store, rows_ref[s], recent_rows_ref[s], history_ref[s], position, live, layout)
        columns = head_columns(head, heads, dim)
        if projected:
            delta = up_products(store, delta_ref, at, columns, dtype)
        else:
            delta = []
            for column, exists in columns:
                places, numbers = index_grid(place, column)
                mask = at.compressed[:, None] & exists[None, :]
                delta.append(plgpu.load(delta_ref.at[s, places, numbers], mask=mask, other=0.0).astype(jnp.float32))
        half_column = jnp.arange(columns.first[0].shape[0], dtype=jnp.int32)
        column = jnp.arange(columns.value[0].shape[0], dtype=jnp.int32)
        parts = []
        for part, numbers, (pool, local, width) in zip(
            delta,
            columns,
            ((store.k, half_column, half), (store.k, half_column + half, dim), (store.v, column, dim)),
            strict=True,
        ):
            if bias_ref is not None:
                bias = plgpu.load(bias_ref.at[numbers[0]], mask=numbers[1], other=0.0).astype(jnp.float32)
                part = part + jnp.where(at.compressed[:, None], bias[None, :], 0.0)
            mean = mean_vectors(pool, at.entries, at.slots, head, live, local, local < width, address=layout.near)
            parts.append(part + mean)
        rotation = s if cos_ref.shape[0] > 1 else 0
        places, halves = index_grid(place, half_column)
        in_half = live[:, None] & (halves < half)
        cos, sin = (plgpu.load(ref.at[rotation, places, halves], mask=in_half, other=0.0) for ref in (cos_ref, sin_ref))
        first, second = rotate_halves(parts[0], parts[1], cos, sin)

        columns_of_table = pl.cdiv(tokens, page_size)
        # Dead lanes point past the scratch: the interpreter drops what is stored there.
        page = ((s * columns_of_table + place // page_size) * heads) + head
        page = jnp.where(live, page, k_out.shape[0])
        for out, value, local, width in (
            (k_out, first, half_column, half),
            (k_out, second, half_column + half, dim),
            (v_out, parts[2], column, dim),
        ):
            pages, locals_ = index_grid(page, local)
            slots, _ = index_grid(place % page_size, local)
            mask = live[:, None] & (locals_ < width)
            plgpu.store(out.at[pages, slots, locals_], value.astype(dtype), mask=mask)


@functools.partial(jax.jit, static_argnames=("layout", "heads", "tile", "interpret"))
def delta_reconstruct_triton(
    store, rows, recent_rows, history, lengths, cos, sin, positions, up, up_bias, residual, near_layer, latent_layer, *,
    layout, heads, tile, interpret,
):  # fmt: skip
    """(k, v), each [S * C * H, page, D]."""
    segments, tokens = rows.shape[0], cos.shape[1]
    page_size, dim = store.k_pages.shape[1:]
    block = min(tile.block, max(16, next_power_of_two(tokens)))
    inputs = [*store_arrays(store), rows, recent_rows, history, lengths, cos, sin, residual if up is None else up]
    inputs += [x for x in (up_bias, positions) if x is not None] + [near_layer, latent_layer]
    scratch = jax.ShapeDtypeStruct((segments * -(-tokens // page_size) * heads, page_size, dim), store.k_pages.dtype)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            layout=layout,
            heads=heads,
            tokens=tokens,
            block=block,
            quantised=store.latents.scale is not None,
            listed=positions is not None,
            projected=up is not None,
            biased=up_bias is not None,
        ),
        grid=(pl.cdiv(tokens, block), heads, segments),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * 2,
        out_shape=[scratch, scratch],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="delta_reconstruct",
    )(*inputs)
