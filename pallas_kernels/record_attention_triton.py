"""Recorded attention as a Pallas-Triton kernel.

A program owns a span of one (segment, KV head), so that nothing else adds to its slots. Tiles are transposed, slots by
queries: sums over queries then stay inside a few threads. A row of queries is a (token, query head) pair of the group.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_work import SpanLimits, span_list
from pallas_kernels.online_softmax import EMPTY_LSE, LOG2_E
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    kernel_exp2,
    load_of_head,
    load_vectors,
    locate_slots,
    next_power_of_two,
)


class RecordTile(NamedTuple):
    """Tiles of (token, query head) pairs by slots, and how Triton compiles the program.

    Attributes:
      few: pairs and slots of a tile when that many pairs are all there are.
      many: pairs and slots of a tile when there are more.
    """

    few: tuple[int, int]
    many: tuple[int, int]
    num_warps: int
    num_stages: int


# By (bytes per element, padded head_dim).
_TILES = {
    (2, 64): RecordTile((128, 128), (128, 128), 4, 2),
    (2, 128): RecordTile((128, 128), (128, 128), 4, 2),
    (2, 256): RecordTile((128, 32), (32, 128), 8, 2),
    (4, 64): RecordTile((32, 32), (32, 32), 4, 2),
    (4, 128): RecordTile((32, 32), (32, 32), 4, 2),
    (4, 256): RecordTile((16, 16), (16, 16), 4, 2),
}
_FALLBACK_TILE = RecordTile((16, 16), (16, 16), 4, 2)
_DEAD = -3e38
_LIMITS = SpanLimits(wave=264, min_span=256)  # 2 programs on each of an H200's multiprocessors


def default_tile(k_pages: jax.Array) -> RecordTile:
    """The tile for a pool [P, page, D]."""
    return _TILES.get((k_pages.dtype.itemsize, max(next_power_of_two(k_pages.shape[2]), 64)), _FALLBACK_TILE)


def _record_kernel(
    _, q_ref, lse_ref, k_ref, table_ref, history_ref, rows_ref, starts_ref, begin_ref, power_ref, layer_ref,
    head_row_ref, first_ref, last_ref, score_ref, *, address, heads, group, scale, own, largest, tile, exp2,
):  # fmt: skip
    """One item of the span list: what the recorded queries of its segment gave to its slots."""
    item = pl.program_id(0)
    address = address.join_layer(layer_ref)
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    first, last = first_ref[address.table_layer, item], last_ref[address.table_layer, item]

    @pl.when(first < last)
    def _():
        head_row = head_row_ref[address.table_layer, item]
        segment, h = head_row // heads, head_row % heads
        row, start, end = rows_ref[segment], starts_ref[segment], starts_ref[segment + 1]
        begin = jnp.maximum(begin_ref[segment], start)
        # Query t sees the slots below t + seen_from if `own`, and all slots of the item otherwise.
        seen_from = load_of_head(history_ref, row, h, address=address) + 1 - start
        factor = LOG2_E if largest else power_ref[segment].astype(jnp.float32) * LOG2_E
        members = next_power_of_two(group)

        def pairs_of(index, tokens):
            """(token, head, which exist) of the pairs of a tile of `tokens` tokens."""
            pair = jnp.arange(tokens * members, dtype=jnp.int32)
            token, member = begin + index * tokens + pair // members, pair % members
            return token, h * group + member, (token < end) & (member < group)

        def load_queries(index, tokens):
            return load_vectors(q_ref, *pairs_of(index, tokens), dim=dim)

        def load_lse(index, tokens):
            """f32[pairs], so large for pairs that do not exist that they weigh 0."""
            token, head, real = pairs_of(index, tokens)
            return plgpu.load(lse_ref.at[token, head], mask=real, other=-EMPTY_LSE)

        def weigh(k, q, lse, causal=None):
            """f32[slots] of one tile. Without `causal` = (slots, tokens) every query sees every slot."""
            scores = exact_dot(k, q.T) * (scale * factor) - (lse * factor)[None, :]
            if causal is not None:
                slot, token = causal
                scores = jnp.where(slot[:, None] < token[None, :] + seen_from, scores, _DEAD)
            weights = exp2(scores)
            return weights.max(axis=1) if largest else weights.sum(axis=1)

        def locate(step, block, masked):
            """(slots of a step, which of them exist, their page and place)."""
            slot = first + step * block + jnp.arange(block, dtype=jnp.int32)
            live = slot < last if masked else None
            page, place = locate_slots(table_ref, row, h, slot, live, address=address, page_size=page_size)
            return slot, live, page, place

        def load_score(page, place, live):
            return plgpu.load(score_ref.at[page, place], mask=live, other=None if live is None else 0.0)

        def combine(a, b):
            return jnp.maximum(a, b) if largest else a + b

        def few_queries():
            """All queries are one tile, which is held while the slots go by."""
            pairs, block = tile.few
            tokens = pairs // members
            q, lse = load_queries(0, tokens), load_lse(0, tokens)

            def record(steps, masked):
                def visit(step, carry):
                    slot, live, page, place = locate(step, block, masked)
                    before = load_score(page, place, live)
                    k = load_vectors(k_ref, page, place, live, dim=dim)
                    causal = (slot, pairs_of(0, tokens)[0]) if masked and own else None
                    plgpu.store(score_ref.at[page, place], combine(before, weigh(k, q, lse, causal)), mask=live)
                    return carry

                jax.lax.fori_loop(steps[0], steps[1], visit, 0)

            whole = jnp.minimum(last, begin + seen_from) if own else last
            full, steps = jnp.maximum(whole - first, 0) // block, pl.cdiv(last - first, block)
            record((0, full), masked=False)
            record((full, steps), masked=True)

        def many_queries():
            """A block of slots is held while the queries go by: those that see part of it, then those that see all."""
            pairs, block = tile.many
            tokens = pairs // members
            tiles = pl.cdiv(end - begin, tokens)

            def visit(step, carry):
                slot, live, page, place = locate(step, block, masked=True)
                k = load_vectors(k_ref, page, place, live, dim=dim)
                before = load_score(page, place, live)
                at = first + step * block
                some = whole = 0
                if own:
                    some = jnp.minimum(jnp.maximum(at + 1 - seen_from - begin, 0) // tokens, tiles)
                    whole = jnp.maximum(at + block - seen_from - begin, 0)
                    whole = jnp.minimum(pl.cdiv(whole, tokens), tiles)

                def absorb(mass, low, high, masked):
                    def visit_queries(index, carry):
                        mass, lse = carry
                        # Of the next tile: what a product does not read, Triton does not fetch ahead.
                        next_lse = load_lse(index + 1, tokens)
                        causal = (slot, pairs_of(index, tokens)[0]) if masked else None
                        return combine(mass, weigh(k, load_queries(index, tokens), lse, causal)), next_lse

                    return jax.lax.fori_loop(low, high, visit_queries, (mass, load_lse(low, tokens)))[0]

                mass = jnp.zeros(block, jnp.float32)
                if own:
                    mass = absorb(mass, some, whole, masked=True)
                mass = absorb(mass, whole, tiles, masked=False)
                plgpu.store(score_ref.at[page, place], combine(before, mass), mask=live)
                return carry

            jax.lax.fori_loop(0, pl.cdiv(last - first, block), visit, 0)

        few = (end - begin) * members <= tile.few[0]
        pl.when(few)(few_queries)
        pl.when(~few)(many_queries)


@functools.partial(jax.jit, static_argnames=("heads", "own", "max_slots", "limits"))
def _record_list(history, rows, starts, first, power, *, heads, own, max_slots, limits: SpanLimits):
    """The spans of all slots that recorded queries see, for all layers: XLA computes it once for a whole step."""
    layers, segments = history.shape[0], rows.shape[0]
    length = jnp.broadcast_to(history[:, rows], (layers, segments, heads))
    if own:
        length += (starts[1:] - starts[:-1])[:, None]
    records = (power > 0) & (jnp.maximum(first, starts[:-1]) < starts[1:])
    length = jnp.where(records[:, None], length, 0).reshape(layers, -1)
    return span_list(length, max_slots=max_slots, limits=limits)


@functools.partial(
    jax.jit, static_argnames=("address", "heads", "scale", "own", "largest", "tile", "limits", "interpret")
)
def record_attention_triton(
    score, q, lse, k_pages, page_table, history, rows, starts, first, power, layer, *, address, heads, scale, own,
    largest, tile, limits, interpret,
):  # fmt: skip
    """The updated score."""
    group = q.shape[1] // heads
    work = _record_list(
        history, rows, starts, first, power, heads=heads, own=own,
        max_slots=page_table.shape[3] * k_pages.shape[1], limits=limits or _LIMITS,
    )  # fmt: skip
    # No tile is larger than the chunk or smaller than a group.
    least = max(16, next_power_of_two(group))
    most = max(least, next_power_of_two(q.shape[0]) * next_power_of_two(group))
    few, many = ((max(least, min(pairs, most)), block) for pairs, block in (tile.few, tile.many))
    tile = tile._replace(few=few, many=many)
    return pl.pallas_call(
        functools.partial(
            _record_kernel,
            address=address,
            heads=heads,
            group=group,
            scale=scale,
            own=own,
            largest=largest,
            tile=tile,
            exp2=kernel_exp2(interpret),
        ),
        grid=(work.head_row.shape[1],),
        in_specs=[WHOLE] * 14,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(score.shape, score.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="record_attention",
    )(
        score, q.astype(k_pages.dtype), lse, k_pages, page_table, history, rows, starts, first, power, layer,
        work.head_row, work.first, work.last,
    )  # fmt: skip
