"""`slot_probabilities` as Pallas-Triton kernels: decode attention that keeps its logits, and those that read them.

Logits that have no place (`kept_logits`) are computed a second time.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_attention_triton import attend_spans
from pallas_kernels.kept_logits import KeptLogits, has_place, load_kept, logit_places, run_grid
from pallas_kernels.online_softmax import DEAD_SCORE, EMPTY_LSE, LOG2_E
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    group_members,
    index_grid,
    kernel_exp2,
    load_of_head,
    load_queries,
    load_vectors,
    locate_slots,
    next_power_of_two,
)

_LSE_BLOCK, _LSE_WARPS = 4096, 4  # logits of one query head that are read at once
_LSE_PROGRAMS, _LSE_MOST_PARTS = 1056, 8  # programs to start: eight on each of an H200's 132 multiprocessors
_MAX_BLOCK, _MAX_WARPS = 1024, 8  # slots of a program that takes the largest
_MAX_LOADS = 16  # query heads whose logits it fetches at once


def _computed_logits(q_ref, k_ref, table_ref, row, b, head, slot, live, *, address, group):
    """f32[members, n] logits, before the scale, of the query heads of one KV head."""
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    q = load_queries(q_ref, b, head, group=group)
    page, place = locate_slots(table_ref, row, head, slot, live, address=address, page_size=page_size)
    return exact_dot(q, load_vectors(k_ref, page, place, live, dim=dim).T)


def _lse_kernel(
    distances_ref, tops_ref, place_ref, length_ref, first_ref, last_ref, q_ref, k_ref, table_ref, rows_ref, layer_ref,
    lse_ref, *, address, heads, group, scale, tile, exp2,
):  # fmt: skip
    """One query head and part of the candidates: the log-sum-exp, base 2, of the scaled logits."""
    head_row, own, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    parts = lse_ref.shape[2]
    address = address.join_layer(layer_ref)
    b, head = head_row // heads, head_row % heads
    row, first, last = rows_ref[b], first_ref[b], last_ref[b]
    kept, place = KeptLogits(distances_ref, tops_ref), place_ref[address.table_layer, head_row]
    stays = has_place(place, load_of_head(length_ref, row, head, address=address), kept)

    def accumulate(begin, lanes, width, logits_of):
        """(top, total) f32[lanes] of the part's sums of 2**logit.

        `logits_of(step)` gives (f32[lanes, any], which are live) of the step's `width` slots.
        """

        def visit(step, state):
            top, total = state
            logits, live = logits_of(step)
            logits = jnp.where(live, logits, DEAD_SCORE)
            new_top = jnp.maximum(top, logits.max(axis=1))
            return new_top, total * exp2(top - new_top) + exp2(logits - new_top[:, None]).sum(axis=1)

        start = jnp.full((lanes,), EMPTY_LSE, jnp.float32), jnp.zeros((lanes,), jnp.float32)
        steps = jnp.where(first < last, pl.cdiv(last - begin, width), 0)
        return jax.lax.fori_loop(steps * part // parts, steps * (part + 1) // parts, visit, start)

    def logarithm(top, total):
        return jnp.where(total > 0.0, top + jnp.log2(jnp.maximum(total, 1e-30)), EMPTY_LSE)

    def read():
        """Each lane a block of slots."""
        block = tile.block
        blocks = max(_LSE_BLOCK // block, 1)
        aligned = first // block * block

        def logits_of(step):
            begin = aligned + step * (blocks * block)
            slot = run_grid(begin, blocks, block)
            exists = begin + jnp.arange(blocks, dtype=jnp.int32) * block < last
            loaded = load_kept(kept, own, place, begin, exists, run=block, block=block)
            return loaded.logits, (slot >= first) & (slot < last)

        top, total = accumulate(aligned, blocks, blocks * block, logits_of)
        most = top.max()
        lse_ref[b, head * group + own, part] = logarithm(most, (total * exp2(top - most)).sum())

    def compute():
        """Each lane a query head, all of the group in one program."""
        member = group_members(group)

        def logits_of(step):
            slot = first + step * tile.block + jnp.arange(tile.block, dtype=jnp.int32)
            live = slot < last
            logits = _computed_logits(q_ref, k_ref, table_ref, row, b, head, slot, live, address=address, group=group)
            return logits * (scale * LOG2_E), live[None, :]

        top, total = accumulate(first, member.shape[0], tile.block, logits_of)
        # Masked lanes point behind the row: interpreted, they would otherwise undo what a live lane writes.
        at = jnp.where(member < group, head * group + member, lse_ref.shape[1] + member)
        at = jnp.broadcast_to(b, member.shape), at, jnp.broadcast_to(part, member.shape)
        plgpu.store(lse_ref.at[at], logarithm(top, total), mask=member < group)

    pl.when(stays | (first >= last))(read)
    pl.when(~stays & (first < last) & (own == 0))(compute)


def _merge_lse_kernel(part_ref, lse_ref, *, exp2):
    """All heads of one request: log-sum-exps over parts of the slots become one over all, base 2."""
    b, (q_heads, parts) = pl.program_id(0), part_ref.shape[1:]
    head = jnp.arange(next_power_of_two(q_heads), dtype=jnp.int32)
    heads_at, parts_at = index_grid(head, jnp.arange(next_power_of_two(parts), dtype=jnp.int32))
    mask = (heads_at < q_heads) & (parts_at < parts)
    lse = plgpu.load(part_ref.at[jnp.broadcast_to(b, mask.shape), heads_at, parts_at], mask=mask, other=EMPTY_LSE)
    top = lse.max(axis=1)
    # What fills up the tile counts nothing, even where all parts are empty.
    total = jnp.where(mask, exp2(lse - top[:, None]), 0.0).sum(axis=1)
    at = jnp.broadcast_to(b, head.shape), jnp.where(head < q_heads, head, lse_ref.shape[1] + head)
    plgpu.store(lse_ref.at[at], top + jnp.log2(total), mask=head < q_heads)


def _max_kernel(
    distances_ref, tops_ref, place_ref, length_ref, first_ref, last_ref, q_ref, k_ref, table_ref, rows_ref, layer_ref,
    lse_ref, out_ref, *, address, heads, group, scale, tile, exp2,
):  # fmt: skip
    """Some blocks of slots of one request: the largest probability over all query heads."""
    block = tile.block
    blocks = max(_MAX_BLOCK // block, 1)
    b, begin = pl.program_id(0), pl.program_id(1) * (blocks * block)
    address = address.join_layer(layer_ref)
    row, first, last = rows_ref[b], first_ref[b], last_ref[b]
    kept = KeptLogits(distances_ref, tops_ref)
    # Heads have their places in order, so if there is one for the last, there is one for each.
    last_place = place_ref[address.table_layer, b * heads + heads - 1]
    stays = has_place(last_place, load_of_head(length_ref, row, heads - 1, address=address), kept)

    def write(slot, most_of, at_once=1):
        """Writes some slots; `most_of(head, live)` gives the largest probability in the groups of `at_once` KV heads
        from `head` on."""
        live = (slot >= first) & (slot < last)
        most = jax.lax.fori_loop(
            0,
            heads // at_once,
            lambda step, most: jnp.maximum(most, most_of(step * at_once, live)),
            jnp.zeros(slot.shape, jnp.float32),
        )
        at = jnp.where(live, slot, out_ref.shape[1] + slot)
        plgpu.store(out_ref.at[jnp.broadcast_to(b, slot.shape), at], most, mask=live)

    def read():
        at_once = math.gcd(heads, max(1, _MAX_LOADS // group))
        exists = begin + jnp.arange(blocks, dtype=jnp.int32) * block < last

        def most_of(head, live):
            del live  # what is read of other slots is not written
            loaded = []
            for own in range(at_once):
                place = place_ref[address.table_layer, b * heads + head + own]
                for member in range(group):
                    lse = lse_ref[b, (head + own) * group + member]
                    loaded.append((lse, load_kept(kept, member, place, begin, exists, run=block, block=block)))
            return functools.reduce(jnp.maximum, [exp2(each.logits - lse) for lse, each in loaded])

        write(run_grid(begin, blocks, block), most_of, at_once)

    def compute():
        member = group_members(group)

        def visit(step, carry):
            slot = begin + step * block + jnp.arange(block, dtype=jnp.int32)

            def most_of(head, live):
                logits = _computed_logits(
                    q_ref, k_ref, table_ref, row, b, head, slot, live, address=address, group=group
                )
                at = jnp.broadcast_to(b, member.shape), head * group + member
                lse = plgpu.load(lse_ref.at[at], mask=member < group, other=-EMPTY_LSE)
                return exp2(logits * (scale * LOG2_E) - lse[:, None]).max(axis=0)

            write(slot, most_of)
            return carry

        jax.lax.fori_loop(0, blocks, visit, 0)

    has_candidates = (begin < last) & (begin + blocks * block > first) & (first < last)
    pl.when(has_candidates & stays)(read)
    pl.when(has_candidates & ~stays)(compute)


_STATIC = ("address", "heads", "scale", "tile", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)
def attend_keeping(
    q, k_pages, v_pages, page_table, lengths, rows, first, last, work, layer, *, address, heads, scale, tile, interpret
):
    """(out [B, Hq, D], the logits that were kept, and where: as `logit_places` says)."""
    places = logit_places(lengths, rows, (first < last).astype(jnp.int32), heads=heads)
    out, _, kept, _ = attend_spans(
        q, k_pages, v_pages, page_table, lengths, rows, None, None, places, None, None, work, layer, address=address,
        heads=heads, scale=scale, tile=tile, interpret=interpret,
    )  # fmt: skip
    assert kept is not None, "places were given"
    return out, kept, places


@functools.partial(jax.jit, static_argnames=_STATIC)
def kept_probabilities(
    kept, places, q, k_pages, page_table, lengths, rows, first, last, layer, *, address, heads, scale, tile, interpret
):
    """f32[B, M * page], from what `attend_keeping` left behind."""
    batch, q_heads, _ = q.shape
    group, max_slots = q_heads // heads, page_table.shape[3] * k_pages.shape[1]
    options = {
        "address": address,
        "heads": heads,
        "group": group,
        "scale": scale,
        "tile": tile,
        "exp2": kernel_exp2(interpret),
    }
    inputs = [*kept, places, lengths, first, last, q, k_pages, page_table, rows, layer]
    parts = max(1, min(_LSE_MOST_PARTS, _LSE_PROGRAMS // (batch * q_heads)))
    lse = pl.pallas_call(
        functools.partial(_lse_kernel, **options),
        grid=(batch * heads, group, parts),
        in_specs=[WHOLE] * len(inputs),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((batch, q_heads, parts), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_LSE_WARPS, num_stages=2),
        interpret=interpret,
        name="slot_probabilities_lse",
    )(*inputs)
    if parts > 1:
        # One kernel where XLA makes three.
        lse = pl.pallas_call(
            functools.partial(_merge_lse_kernel, exp2=options["exp2"]),
            grid=(batch,),
            in_specs=[WHOLE],
            out_specs=WHOLE,
            out_shape=jax.ShapeDtypeStruct((batch, q_heads), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=_LSE_WARPS, num_stages=1),
            interpret=interpret,
            name="slot_probabilities_merge_lse",
        )(lse)
    else:
        lse = lse[..., 0]
    return pl.pallas_call(
        functools.partial(_max_kernel, **options),
        grid=(batch, -(-max_slots // max(_MAX_BLOCK, tile.block))),
        in_specs=[WHOLE] * (len(inputs) + 1),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((batch, max_slots), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_MAX_WARPS, num_stages=2),
        interpret=interpret,
        name="slot_probabilities_max",
    )(*inputs, lse)
