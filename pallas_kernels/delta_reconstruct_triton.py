"""Reading tokens of a DeltaStore back into pages, as a Pallas-Triton kernel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_places import find_places
from pallas_kernels.delta_tiles import (
    add_bias,
    head_columns,
    load_grid,
    load_references,
    load_tile,
    mean,
    padded_columns,
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
_TILES = {2: ReconstructTile(64, 8, 3), 4: ReconstructTile(16, 8, 1)}


def default_tile(k_pages: jax.Array) -> ReconstructTile:
    """The tile for a near pool."""
    return _TILES[k_pages.dtype.itemsize]


def _kernel(*refs, head_rows, page_size, heads, tokens, block, quantised, listed, projected, biased):
    """One KV head of `block` tokens of a segment."""
    store, refs = store_refs(refs, quantised=quantised)
    lengths_ref, cos_ref, sin_ref, delta_ref, *refs = refs
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    position_ref, refs = (refs[0], refs[1:]) if listed else (None, refs)
    k_out, v_out = refs
    index, head, s = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dim, dtype = store.k.shape[1], store.k.dtype
    half = dim // 2
    place = index * block + jnp.arange(block, dtype=jnp.int32)
    length = lengths_ref[s]
    if position_ref is None:
        live = place < jnp.minimum(length, tokens)
    else:
        at_segment = jnp.broadcast_to(s, place.shape)
        position = plgpu.load(position_ref.at[at_segment, place], mask=place < tokens, other=-1)
        live = (position >= 0) & (position < length)

    @pl.when(live.astype(jnp.int32).max() > 0)
    def _():
        at = load_tile(store, s, place, live, head * head_rows)
        columns = head_columns(head, heads, dim)
        half_columns, whole = padded_columns(half), padded_columns(dim)
        second_half = half_columns._replace(number=half_columns.number + half)
        own = (half_columns, second_half, whole)  # the columns of a head's own vectors
        references = [
            load_references(pool, at.near, live, *local)
            for pool, local in zip((store.k, store.k, store.v), own, strict=True)
        ]
        rotation = s if cos_ref.shape[0] > 1 else 0
        cos, sin = (
            load_grid(ref, place, half_columns.number, live, half_columns.exists, at=(rotation,))
            for ref in (cos_ref, sin_ref)
        )
        if projected:
            deltas = up_products(store, delta_ref, at, columns, dtype)
        else:
            deltas = [
                load_grid(delta_ref, place, number, at.compressed, exists, at=(s,)).astype(jnp.float32)
                for number, exists in columns
            ]
        parts = []
        for delta, at_columns, vectors in zip(deltas, columns, references, strict=True):
            parts.append(add_bias(bias_ref, delta, at.compressed, at_columns) + mean(vectors))
        first, second = rotate_halves(parts[0], parts[1], cos, sin)

        # Dead lanes point past the scratch: the interpreter drops what is stored there.
        page = (s * pl.cdiv(tokens, page_size) + place // page_size) * heads + head
        page = jnp.where(live, page, k_out.shape[0])
        for out, value, (local, exists) in zip((k_out, k_out, v_out), (first, second, parts[2]), own, strict=True):
            pages, locals_ = index_grid(page, local)
            slots, _ = index_grid(place % page_size, local)
            mask = jnp.broadcast_to(live[:, None], pages.shape)
            mask = mask if exists is None else mask & exists[None, :]
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
    (places,) = find_places(
        store, rows, recent_rows, history, lengths, positions, [near_layer], [latent_layer],
        tokens=tokens, layout=layout, interpret=interpret,
    )  # fmt: skip
    inputs = [*store_arrays(store, places), lengths, cos, sin, residual if up is None else up]
    inputs += [x for x in (up_bias, positions) if x is not None]
    scratch = jax.ShapeDtypeStruct((segments * -(-tokens // page_size) * heads, page_size, dim), store.k_pages.dtype)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            head_rows=layout.near.head_stride * page_size,
            page_size=page_size,
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
