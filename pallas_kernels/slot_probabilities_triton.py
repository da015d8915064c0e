"""`slot_probabilities` as Pallas-Triton kernels: decode attention that keeps its logits, and two that read them.

What is kept is bounded (`decode_scores`). Logits that have no place are computed a second time: correct whatever the
lengths, and slower.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_attention_triton import attend_spans
from pallas_kernels.decode_scores import ALIGNMENT, has_place, logit_places
from pallas_kernels.online_softmax import DEAD_SCORE, EMPTY_LSE, LOG2_E
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    index_grid,
    kernel_exp2,
    load_vectors,
    locate_slots,
    next_power_of_two,
    vector_mask,
)

_LSE_BLOCK, _LSE_WARPS = 4096, 8  # logits of one query head that are read at once
_MAX_BLOCK, _MAX_WARPS = 512, 4  # slots of a program that takes the largest
_MIN_DOT_ROWS = 16  # the smallest tile of a tensor-core product


def _head_length(length_ref, address, row, head):
    return length_ref[address.table_layer, row, head if length_ref.shape[2] > 1 else 0]


def _computed_logits(q_ref, k_ref, table_ref, row, b, head, slot, live, *, address, group):
    """f32[members, n] logits, before the scale, of the query heads of one KV head."""
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    member = jnp.arange(max(_MIN_DOT_ROWS, next_power_of_two(group)), dtype=jnp.int32)
    members, columns = index_grid(member, jnp.arange(next_power_of_two(dim), dtype=jnp.int32))
    mask = vector_mask(member < group, columns, dim)
    q = plgpu.load(q_ref.at[b, head * group + members, columns], mask=mask, other=0.0)
    page, place = locate_slots(table_ref, row, head, slot, live, address=address, page_size=page_size)
    return exact_dot(q, load_vectors(k_ref, page, place, live, dim=dim).T)


def _lse_kernel(
    logits_ref, place_ref, length_ref, first_ref, last_ref, q_ref, k_ref, table_ref, rows_ref, layer_ref, lse_ref, *,
    address, heads, group, scale, tile, exp2,
):  # fmt: skip
    """One query head: the log-sum-exp, base 2, of its scaled logits over the candidates."""
    head_row, own = pl.program_id(0), pl.program_id(1)
    address = address.join_layer(layer_ref)
    b, head = head_row // heads, head_row % heads
    row, first, last = rows_ref[b], first_ref[b], last_ref[b]
    place = place_ref[address.table_layer, head_row]
    kept = has_place(place, _head_length(length_ref, address, row, head), logits_ref)

    def normalise(member, begin, block, logits_of):
        """Writes the log-sum-exps of the members i32[m]; `logits_of(slot, live)` gives f32[m, block]."""

        def visit(step, state):
            top, total = state
            slot = begin + step * block + jnp.arange(block, dtype=jnp.int32)
            live = (slot >= first) & (slot < last)
            logits = jnp.where(live[None, :], logits_of(slot, live) * (scale * LOG2_E), DEAD_SCORE)
            new_top = jnp.maximum(top, logits.max(axis=1))
            return new_top, total * exp2(top - new_top) + exp2(logits - new_top[:, None]).sum(axis=1)

        start = jnp.full(member.shape, EMPTY_LSE, jnp.float32), jnp.zeros(member.shape, jnp.float32)
        steps = jnp.where(first < last, pl.cdiv(last - begin, block), 0)
        top, total = jax.lax.fori_loop(0, steps, visit, start)
        lse = jnp.where(total > 0.0, top + jnp.log2(jnp.maximum(total, 1e-30)), EMPTY_LSE)
        # Masked lanes point behind the row: interpreted, they would otherwise undo what a live lane writes.
        at = jnp.where(member < group, head * group + member, lse_ref.shape[1] + member)
        plgpu.store(lse_ref.at[jnp.broadcast_to(b, member.shape), at], lse, mask=member < group)

    def read(slot, live):
        at = jnp.broadcast_to(own, slot.shape), place * ALIGNMENT + slot
        return plgpu.load(logits_ref.at[at], mask=live, other=0.0)[None, :]

    def compute(slot, live):
        return _computed_logits(q_ref, k_ref, table_ref, row, b, head, slot, live, address=address, group=group)

    @pl.when(kept | (first >= last))
    def _():
        aligned = first // ALIGNMENT * ALIGNMENT  # so that whole vectors are loaded
        normalise(own + jnp.zeros(1, jnp.int32), aligned, _LSE_BLOCK, read)

    @pl.when(~kept & (first < last) & (own == 0))
    def _():
        members = max(_MIN_DOT_ROWS, next_power_of_two(group))
        normalise(jnp.arange(members, dtype=jnp.int32), first, tile.block, compute)


def _max_kernel(
    logits_ref, place_ref, length_ref, first_ref, last_ref, q_ref, k_ref, table_ref, rows_ref, layer_ref, lse_ref,
    out_ref, *, address, heads, group, scale, tile, exp2,
):  # fmt: skip
    """A block of slots of one request: the largest probability over all query heads."""
    b, begin = pl.program_id(0), pl.program_id(1) * _MAX_BLOCK
    address = address.join_layer(layer_ref)
    row, first, last = rows_ref[b], first_ref[b], last_ref[b]
    # Heads have their places in order, so if there is one for the last, there is one for each.
    last_place = place_ref[address.table_layer, b * heads + heads - 1]
    kept = has_place(last_place, _head_length(length_ref, address, row, heads - 1), logits_ref)

    def write(begin, block, members, logits_of):
        """Writes `block` slots; `logits_of(head, slot, live)` gives f32[members, block]."""
        slot = begin + jnp.arange(block, dtype=jnp.int32)
        live = (slot >= first) & (slot < last)
        member = jnp.arange(members, dtype=jnp.int32)

        def visit(head, most):
            at = jnp.broadcast_to(b, member.shape), head * group + member
            lse = plgpu.load(lse_ref.at[at], mask=member < group, other=-EMPTY_LSE)
            probability = exp2(logits_of(head, slot, live) * (scale * LOG2_E) - lse[:, None])
            return jnp.maximum(most, probability.max(axis=0))

        most = jax.lax.fori_loop(0, heads, visit, jnp.zeros((block,), jnp.float32))
        at = jnp.where(live, slot, out_ref.shape[1] + slot)
        plgpu.store(out_ref.at[jnp.broadcast_to(b, slot.shape), at], most, mask=live)

    def read(head, slot, live):
        place = place_ref[address.table_layer, b * heads + head]
        members, at = index_grid(jnp.arange(next_power_of_two(group), dtype=jnp.int32), place * ALIGNMENT + slot)
        return plgpu.load(logits_ref.at[members, at], mask=(members < group) & live[None, :], other=0.0)

    def compute(head, slot, live):
        return _computed_logits(q_ref, k_ref, table_ref, row, b, head, slot, live, address=address, group=group)

    has_candidates = (begin < last) & (begin + _MAX_BLOCK > first) & (first < last)

    @pl.when(has_candidates & kept)
    def _():
        write(begin, _MAX_BLOCK, next_power_of_two(group), read)

    @pl.when(has_candidates & ~kept)
    def _():
        members = max(_MIN_DOT_ROWS, next_power_of_two(group))

        def visit(step, carry):
            write(begin + step * tile.block, tile.block, members, compute)
            return carry

        jax.lax.fori_loop(0, _MAX_BLOCK // tile.block, visit, 0)


@functools.partial(jax.jit, static_argnames=("address", "heads", "scale", "tile", "interpret"))
def slot_probabilities_triton(
    q, k_pages, v_pages, page_table, lengths, rows, first, last, work, layer, *, address, heads, scale, tile, interpret
):
    """(out [B, Hq, D], probabilities f32[B, M * page])."""
    batch, q_heads, _ = q.shape
    group, max_slots = q_heads // heads, page_table.shape[3] * k_pages.shape[1]
    places = logit_places(lengths, rows, (first < last).astype(jnp.int32), heads=heads)
    out, _, logits = attend_spans(
        q, k_pages, v_pages, page_table, lengths, rows, None, None, places, work, layer, address=address, heads=heads,
        scale=scale, tile=tile, interpret=interpret,
    )  # fmt: skip
    options = {
        "address": address,
        "heads": heads,
        "group": group,
        "scale": scale,
        "tile": tile,
        "exp2": kernel_exp2(interpret),
    }
    inputs = [logits, places, lengths, first, last, q, k_pages, page_table, rows, layer]
    lse = pl.pallas_call(
        functools.partial(_lse_kernel, **options),
        grid=(batch * heads, group),
        in_specs=[WHOLE] * len(inputs),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((batch, q_heads), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_LSE_WARPS, num_stages=2),
        interpret=interpret,
        name="slot_probabilities_lse",
    )(*inputs)
    probabilities = pl.pallas_call(
        functools.partial(_max_kernel, **options),
        grid=(batch, -(-max_slots // _MAX_BLOCK)),
        in_specs=[WHOLE] * (len(inputs) + 1),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((batch, max_slots), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=_MAX_WARPS, num_stages=2),
        interpret=interpret,
        name="slot_probabilities_max",
    )(*inputs, lse)
    return out, probabilities
