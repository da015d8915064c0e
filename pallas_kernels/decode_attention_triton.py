"""Decode attention as a Pallas-Triton kernel over the items of the work list.

Heads of one item are done with it; the items of longer heads are merged (`merge_items`). At small batches a call is
latency, a chain of loads that wait for each other, so the kernel finds what it needs in as few hops as possible.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.decode_scores import ScoreRefs, add_decode_scores, add_kept_scores
from pallas_kernels.decode_work import DecodeTile
from pallas_kernels.kept_logits import ALIGNMENT, KeptLogits, has_place, keep, kept_shapes, logit_places
from pallas_kernels.merge_items import ends_merge, is_last_end, merge_at_the_end, merge_items
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    index_grid,
    kernel_exp2,
    load_of_head,
    load_of_layer,
    load_queries,
    load_vectors,
    locate_slots,
    next_power_of_two,
    vector_mask,
)

# By (bytes per element, padded head_dim).
_TILES = {
    (2, 64): DecodeTile(128, 4, 3),
    (2, 128): DecodeTile(64, 2, 3),
    (2, 256): DecodeTile(32, 2, 3),
    (4, 64): DecodeTile(64, 4, 2),
    (4, 128): DecodeTile(32, 4, 2),
    (4, 256): DecodeTile(16, 4, 2),
}
_FALLBACK_TILE = DecodeTile(16, 4, 2)


def default_tile(k_pages: jax.Array) -> DecodeTile:
    """The tile for a pool [P, page, D]."""
    return _TILES.get((k_pages.dtype.itemsize, max(next_power_of_two(k_pages.shape[2]), 64)), _FALLBACK_TILE)


def _span_kernel(
    *refs, address, heads, group, scale, tile, indexed, positioned, recorded, scored, ending, interpreted, exp2
):  # fmt: skip
    """One item of the work list: its output and log-sum-exp.

    They go to merged [B, Hq, D] and merged_lse [B, Hq] if the item is its whole head, else to out [items, G, D] and
    lse [items, G]; when `ending`, the last program of a head merges them from there. When `recorded`, the logits are
    kept too, of the items that have a place; when `scored`, whoever writes the result of a head turns them into scores
    if all of them are kept.

    refs: q, K, V, table, lengths, rows of the items, layer; each of indices, positions, places of logits, powers and
    scores that there is; ends of items; the work list; then the outputs: merged, merged_lse, out, lse, kept logits,
    ends, scores.
    """
    q_ref, k_ref, v_ref, table_ref, length_ref, row_ref, layer_ref, *refs = refs
    index_ref, refs = (refs[0], refs[1:]) if indexed else (None, refs)
    position_ref, refs = (refs[0], refs[1:]) if positioned else (None, refs)
    place_ref, refs = (refs[0], refs[1:]) if recorded else (None, refs)
    power_ref, refs = (refs[0], refs[2:]) if scored else (None, refs)  # the scores are read where they are written
    score_ref, refs = (refs[-1], refs[:-1]) if scored else (None, refs)
    ends_ref, refs = (refs[-1], refs[1:-1]) if ending else (None, refs)  # and so are the ends
    head_row_ref, first_ref, last_ref, first_item_ref, parts_ref, *refs = refs
    merged_ref, merged_lse_ref, out_ref, lse_ref, *kept = refs
    kept = KeptLogits(*kept) if recorded else None
    item = pl.program_id(0)
    address = address.join_layer(layer_ref, table_ref.shape[0])
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
    first, last, head_row, row = (
        load_of_layer(ref, address.table_layer, item) for ref in (first_ref, last_ref, head_row_ref, row_ref)
    )

    def write(out_ref, lse_ref, lead, first_head, out, lse):
        """The members of a group, from tiles that may have more."""
        member = jnp.arange(lse.shape[0], dtype=jnp.int32)
        members, columns = index_grid(member, column)
        mask = vector_mask(member < group, columns, dim)
        plgpu.store(out_ref.at[lead, first_head + members, columns], out.astype(out_ref.dtype), mask=mask)
        plgpu.store(lse_ref.at[lead, first_head + member], lse, mask=member < group)

    @pl.when(first < last)
    def _():
        b, h = head_row // heads, head_row % heads
        parts = load_of_layer(parts_ref, address.table_layer, head_row)
        length = load_of_head(length_ref, row, h, address=address)
        q = load_queries(q_ref, b, h, group=group)
        in_block = jnp.arange(tile.block, dtype=jnp.int32)
        logits_place, stays = None, None
        if kept is not None and place_ref is not None:
            logits_place = place_ref[address.table_layer, head_row]
            stays = has_place(logits_place, last, kept)

        def attend(state, steps, masked):
            """Absorbs the blocks `steps` = (from, to)."""

            def visit(step, state):
                slot = first + step * tile.block + in_block
                live = slot < last if masked else None
                if index_ref is not None:
                    slot = plgpu.load(
                        index_ref.at[b, h if index_ref.shape[1] > 1 else 0, slot],
                        mask=live,
                        other=-1 if masked else None,
                    )
                    live = (slot >= 0) & (slot < length)
                page, place = locate_slots(table_ref, row, h, slot, live, address=address, page_size=page_size)
                k = load_vectors(k_ref, page, place, live, dim=dim)
                v = load_vectors(v_ref, page, place, live, dim=dim)
                logits = exact_dot(q, k.T)
                if position_ref is not None:
                    alive = plgpu.load(position_ref.at[page, place], mask=live, other=None if live is None else -1) >= 0
                    live = alive if live is None else live & alive
                state = online_softmax.absorb(
                    state,
                    logits,
                    None if live is None else live[None, :],
                    lambda weights: exact_dot(weights.astype(v.dtype), v),
                    scale=scale * LOG2_E,
                    exp2=exp2,
                )
                # Only here, where the tile is not needed any more: any earlier it costs registers.
                if kept is not None:
                    keep(
                        kept, logits, live, state.top, logits_place, first, step, stays=stays, group=group,
                        scale=scale, block=tile.block,
                    )  # fmt: skip
                return state

            return jax.lax.fori_loop(steps[0], steps[1], visit, state)

        # Only the end of a head is not a whole block.
        full, steps = (last - first) // tile.block, pl.cdiv(last - first, tile.block)
        state = online_softmax.start((q.shape[0],), column.shape[0])
        state = attend(state, (0, full), masked=False)
        state = attend(state, (full, steps), masked=True)
        out, lse = online_softmax.finish(state)

        pl.when(parts == 1)(lambda: write(merged_ref, merged_lse_ref, b, h * group, out, lse))
        pl.when(parts > 1)(lambda: write(out_ref, lse_ref, item, 0, out, lse))
        ends_head = parts == 1
        if ends_ref is not None:
            several = parts > 1
            ends_head |= jax.lax.cond(
                several,
                lambda: is_last_end(ends_ref, head_row, parts, interpreted=interpreted),
                lambda: several,  # False: Triton takes no constant here
            )

            @pl.when(ends_head & several)
            def _():
                first_item = load_of_layer(first_item_ref, address.table_layer, head_row)
                merged = merge_at_the_end(out_ref, lse_ref, first_item, parts, num_heads=parts_ref.shape[1])
                write(merged_ref, merged_lse_ref, b, h * group, *merged)

        if kept is None or power_ref is None:
            return
        power, own_logits = power_ref[b], kept

        @pl.when(ends_head & has_place(logits_place, length, own_logits) & (power > 0))
        def _():
            if not interpreted:
                plgpu.debug_barrier()  # other threads of this program wrote what this one reads
            add_kept_scores(
                ScoreRefs(score_ref, table_ref, row, h, address),
                own_logits,
                logits_place,
                lambda member: merged_lse_ref[b, h * group + member],
                0,
                length,
                power,
                group=group,
                block=tile.block,
                exp2=exp2,
            )

    if ends_ref is None:
        return
    # No item ends a head that reads nothing. There are no fewer programs than heads, so each can look after one.
    some_head = jnp.minimum(item, parts_ref.shape[1] - 1)

    @pl.when((some_head == item) & (load_of_layer(parts_ref, address.table_layer, some_head) == 0))
    def _():
        nothing = online_softmax.start((next_power_of_two(group),), column.shape[0])
        write(merged_ref, merged_lse_ref, item // heads, item % heads * group, *online_softmax.finish(nothing))


@functools.partial(jax.jit, static_argnames=("address", "heads", "scale", "tile", "interpret"))
def decode_attention_triton(
    q, k_pages, v_pages, page_table, lengths, rows, indices, position, score, power, work, layer, *, address, heads,
    scale, tile, interpret,
):  # fmt: skip
    """(out [B, Hq, D], lse f32[B, Hq], score or None)."""
    options = {"address": address, "heads": heads, "scale": scale, "tile": tile, "interpret": interpret}
    places = None if score is None else logit_places(lengths, rows, power, heads=heads)
    out, lse, kept, score = attend_spans(
        q, k_pages, v_pages, page_table, lengths, rows, indices, position, places, score, power, work, layer, **options
    )
    if score is not None:
        score = add_decode_scores(
            score, kept, places, lse, q, k_pages, page_table, lengths, rows, position, power, work, layer, **options
        )
    return out, lse, score


def attend_spans(
    q, k_pages, v_pages, page_table, lengths, rows, indices, position, places, score, power, work, layer, *, address,
    heads, scale, tile, interpret,
):  # fmt: skip
    """(out [B, Hq, D], lse f32[B, Hq], `KeptLogits` or None, score or None).

    Args:
      places: where the logits of each head go, as `logit_places` says; None: nowhere.
      score: written in place; has what this step adds for heads that a program ends and whose logits all have places.
        For the others see `decode_scores`.
      power: i32[B]; not used without `score`.
    """
    batch, q_heads, dim = q.shape
    group = q_heads // heads
    items = work.head_row.shape[1]
    if places is not None and ALIGNMENT % tile.block:
        raise ValueError(f"tile.block must divide {ALIGNMENT} when logits are kept, got {tile.block}")
    scored = [] if score is None else [power, score]
    optional = [*(x for x in (indices, position, places) if x is not None), *scored]
    item_row = rows[work.head_row // heads]
    inputs = [q, k_pages, v_pages, page_table, lengths, item_row, layer, *optional]
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, q_heads), jnp.float32),
        jax.ShapeDtypeStruct((items, group, dim), jnp.float32),
        jax.ShapeDtypeStruct((items, group), jnp.float32),
    ]
    if places is not None:
        max_slots = page_table.shape[3] * k_pages.shape[1]
        out_shape += kept_shapes(batch * heads, group, max_slots, pool_dtype=k_pages.dtype, block=tile.block)
    aliases = {}
    if ending := ends_merge(batch * heads):
        ends = jnp.zeros(batch * heads, jnp.int32)
        aliases[len(inputs)] = len(out_shape)
        inputs, out_shape = [*inputs, ends], [*out_shape, ends]
    if score is not None:
        aliases[6 + len(optional)] = len(out_shape)
        out_shape = [*out_shape, score]
    inputs += [work.head_row, work.first, work.last, work.first_item, work.parts]
    merged, merged_lse, out, lse, *others = pl.pallas_call(
        functools.partial(
            _span_kernel,
            address=address,
            heads=heads,
            group=group,
            scale=scale,
            tile=tile,
            indexed=indices is not None,
            positioned=position is not None,
            recorded=places is not None,
            scored=score is not None,
            ending=ending,
            interpreted=interpret,
            exp2=kernel_exp2(interpret),
        ),
        grid=(items,),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * len(out_shape),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_shape],
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="decode_attention_spans",
    )(*inputs)
    if score is not None:
        score = others.pop()
    kept = None if places is None else KeptLogits(*others[:2])
    if not ending:
        merged, merged_lse = merge_items(
            out, lse, layer, work, heads=heads, whole=(merged, merged_lse), interpret=interpret
        )
    return merged, merged_lse, kept, score
