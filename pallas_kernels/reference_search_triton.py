"""The search for the nearest centers as Pallas-Triton kernels: one for the centers' lengths, one that searches.

A program of the second owns a tile of tokens and a part of the centers before them. It streams these past the tokens,
block by block, as one product of tensor cores each, and keeps the best K of every token in registers. The parts of the
centers, which are there so that few tokens keep the whole GPU busy, are merged in XLA.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.nearest import best
from pallas_kernels.paging import PageAddress
from pallas_kernels.query_tiles import query_tiles
from pallas_kernels.tiles import WHOLE, exact_dot, index_grid, load_vectors, locate_slots, next_power_of_two

_PROGRAMS = 264  # 2 for each of an H200's 132 multiprocessors
_MOST_PARTS = 128
_NONE = -3e38  # the score of a center that is not there
_LAST = 1 << 30  # above every ordinal
_ENTRIES = PageAddress(0, 1, 0, 0)  # names the entries themselves: their pages depend on the head


class SearchTile(NamedTuple):
    """Tokens of a program, centers per step of its loop, numbers per product, and how Triton compiles the program."""

    tokens: int
    centers: int
    chunk: int
    num_warps: int
    num_stages: int


# By bytes per element of the pool.
_TILES = {2: SearchTile(128, 256, 64, 8, 3), 4: SearchTile(32, 32, 32, 4, 2)}


def default_tile(k_pages: jax.Array) -> SearchTile:
    """The tile for a pool of centers."""
    return _TILES[k_pages.dtype.itemsize]


def _norm_kernel(*refs, address, heads, block, keys_only):
    """|c|^2 of `block` centers of one segment, for those that its last token sees."""
    k_ref, v_ref, table_ref, rows_ref, count_ref, layer_ref, norm_ref = refs
    s, index = pl.program_id(0), pl.program_id(1)
    address = address.join_layer(layer_ref)
    page_size, dim = k_ref.shape[1:]
    center = index * block + jnp.arange(block, dtype=jnp.int32)
    live = center < count_ref[s]

    @pl.when(index * block < count_ref[s])
    def _():
        entry, slot = locate_slots(table_ref, rows_ref[s], 0, center, live, address=_ENTRIES, page_size=page_size)

        def visit(head, total):
            for pool in (k_ref,) if keys_only else (k_ref, v_ref):
                vectors = load_vectors(pool, address.page(entry, head), slot, live, dim=dim).astype(jnp.float32)
                total += (vectors * vectors).sum(axis=1)
            return total

        norm = jax.lax.fori_loop(0, heads, visit, jnp.zeros(block, jnp.float32))
        plgpu.store(norm_ref.at[jnp.broadcast_to(s, center.shape), center], norm, mask=live)


def _search_kernel(*refs, address, heads, neighbors, metric, tile, parts):
    """The best K of a part of the centers for a tile of tokens: scores and ordinals [parts, N, K], best first."""
    x_ref, k_ref, v_ref, table_ref, seen_ref, layer_ref, norm_ref, *refs = refs
    row_ref, first_ref, last_ref, key_first_ref, segment_ref, score_ref, id_ref = refs
    index, part = pl.program_id(0), pl.program_id(1)
    address = address.join_layer(layer_ref)
    page_size, dim = k_ref.shape[1:]
    first, last = first_ref[index], last_ref[index]
    chunks = -(-dim // tile.chunk)

    @pl.when((first < last) & (key_first_ref[index] < last))
    def _():
        row, segment = row_ref[index], segment_ref[index]
        token = first + jnp.arange(tile.tokens, dtype=jnp.int32)
        real = token < last
        seen = plgpu.load(seen_ref.at[token], mask=real, other=-1)
        count = seen_ref[jnp.minimum(first + tile.tokens, last) - 1] + 1
        span = pl.cdiv(pl.cdiv(count, parts), tile.centers) * tile.centers
        start = part * span
        end = jnp.minimum(start + span, count)

        def visit(step, kept):
            center = start + step * tile.centers + jnp.arange(tile.centers, dtype=jnp.int32)
            live = center < end
            entry, slot = locate_slots(table_ref, row, 0, center, live, address=_ENTRIES, page_size=page_size)

            def add(pool, offset):
                """Adds the products with one pool, whose numbers begin at `offset` of a signal."""

                def visit_chunk(at, total):
                    head = at // chunks
                    chunk = at - head * chunks
                    number = chunk * tile.chunk + jnp.arange(tile.chunk, dtype=jnp.int32)
                    page, numbers = index_grid(address.page(entry, head), number)
                    place, _ = index_grid(slot, number)
                    mask = live[:, None] & (numbers < dim)
                    c = plgpu.load(pool.at[page, place, numbers], mask=mask, other=0.0)
                    tokens, numbers = index_grid(token, number)
                    mask = real[:, None] & (numbers < dim)
                    x = plgpu.load(x_ref.at[tokens, offset + head * dim + numbers], mask=mask, other=0.0)
                    return total + exact_dot(x, c.T)

                return visit_chunk

            scores = jnp.zeros((tile.tokens, tile.centers), jnp.float32)
            scores = jax.lax.fori_loop(0, heads * chunks, add(k_ref, 0), scores)
            if x_ref.shape[1] > heads * dim:
                scores = jax.lax.fori_loop(0, heads * chunks, add(v_ref, heads * dim), scores)
            if metric != "dot":
                norm = plgpu.load(norm_ref.at[jnp.broadcast_to(segment, center.shape), center], mask=live, other=1.0)
                if metric == "l2":
                    scores = 2.0 * scores - norm[None, :]
                else:
                    scores = scores * jax.lax.rsqrt(jnp.maximum(norm, 1e-30))[None, :]
            scores = jnp.where((center[None, :] <= seen[:, None]) & live[None, :], scores, _NONE)
            return _keep(kept, scores, center, neighbors)

        kept = tuple(jnp.full(tile.tokens, _NONE, jnp.float32) for _ in range(neighbors))
        kept = (kept, tuple(jnp.zeros(tile.tokens, jnp.int32) for _ in range(neighbors)))
        scores, ids = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(end - start, 0), tile.centers), visit, kept)
        at_part = jnp.broadcast_to(part, token.shape)
        for k in range(neighbors):
            place = jnp.full(token.shape, k, jnp.int32)
            plgpu.store(score_ref.at[at_part, token, place], scores[k], mask=real)
            plgpu.store(id_ref.at[at_part, token, place], ids[k], mask=real)


def _keep(kept, scores: jax.Array, center: jax.Array, rounds: int):
    """Inserts the best of a block of scores f32[tokens, centers] into the best so far, K vectors of scores and ids.

    The block's centers come after all that were kept, so that only a greater score takes a place: ties stay in order.
    """
    value = scores.max(axis=1)
    found = jnp.where(scores == value[:, None], center[None, :], _LAST).min(axis=1)
    values, ids = list(kept[0]), list(kept[1])
    new, new_id = value, found
    for k in range(len(values)):
        above = new > values[k]
        values[k], new = jnp.where(above, new, values[k]), jnp.where(above, values[k], new)
        ids[k], new_id = jnp.where(above, new_id, ids[k]), jnp.where(above, ids[k], new_id)
    kept = (tuple(values), tuple(ids))
    if rounds == 1:
        return kept
    scores = jnp.where(center[None, :] == found[:, None], _NONE, scores)
    # Few blocks have a second center for any of the tokens.
    more = (scores.max(axis=1) - values[-1]).max() > 0
    return jax.lax.cond(more, lambda: _keep(kept, scores, center, rounds - 1), lambda: kept)


@functools.partial(jax.jit, static_argnames=("address", "heads", "neighbors", "metric", "tile", "interpret"))
def reference_search_triton(
    x, k_pages, v_pages, page_table, rows, starts, seen, layer, *, address, heads, neighbors, metric, tile, interpret
):
    """i32[N, K]; `seen` i32[N] is the last center that each token sees."""
    tokens, features = x.shape
    page_size, dim = k_pages.shape[1:]
    segments, most = rows.shape[0], page_table.shape[3] * page_size
    keys_only = features == heads * dim
    tile = tile._replace(
        tokens=min(tile.tokens, max(16, next_power_of_two(tokens))),
        centers=min(tile.centers, max(16, next_power_of_two(most))),
        chunk=min(tile.chunk, max(16, next_power_of_two(dim))),
    )
    tiles = query_tiles(rows, starts, tokens, tile.tokens)
    num_tiles = tiles.row.shape[0]
    segment = jnp.searchsorted(starts[1:], tiles.first, side="right", method="compare_all").astype(jnp.int32)
    segment = jnp.minimum(segment, segments - 1)
    norm = jnp.zeros((1, 1), jnp.float32)
    if metric != "dot":
        count = jnp.where(starts[1:] > starts[:-1], seen[jnp.maximum(starts[1:] - 1, 0)] + 1, 0)
        block = min(64, max(16, next_power_of_two(most)))
        norm = pl.pallas_call(
            functools.partial(_norm_kernel, address=address, heads=heads, block=block, keys_only=keys_only),
            grid=(segments, pl.cdiv(most, block)),
            in_specs=[WHOLE] * 6,
            out_specs=WHOLE,
            out_shape=jax.ShapeDtypeStruct((segments, most), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="reference_search_norms",
        )(k_pages, v_pages, page_table, rows, count, layer)
    parts = min(_MOST_PARTS, next_power_of_two(-(-_PROGRAMS // num_tiles)), -(-most // tile.centers))
    inputs = [x, k_pages, v_pages, page_table, seen, layer, norm, *tiles, segment]
    scores, ids = pl.pallas_call(
        functools.partial(
            _search_kernel,
            address=address,
            heads=heads,
            neighbors=neighbors,
            metric=metric,
            tile=tile,
            parts=parts,
        ),
        grid=(num_tiles, parts),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((parts, tokens, neighbors), jnp.float32),
            jax.ShapeDtypeStruct((parts, tokens, neighbors), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="reference_search",
    )(*inputs)
    # Parts come in the order of their centers, so the first of equal scores is the earlier center.
    scores, ids = (array.swapaxes(0, 1).reshape(tokens, -1) for array in (scores, ids))
    place, _ = best(jnp.where(scores > _NONE / 2, scores, -jnp.inf), neighbors)
    chosen = jnp.take_along_axis(ids, place, axis=1)
    return jnp.where(jnp.arange(tokens)[:, None] < starts[-1], chosen, 0)
