"""Adds to the scores of slots how much one decode step attended to them.

A probability takes the log-sum-exp of all spans of a head. So the spans leave their logits behind (`kept_logits`), and
a second kernel over the same work list turns them into scores.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kept_logits import KeptLogits, block_grid, has_place, read_kept
from pallas_kernels.online_softmax import EMPTY_LSE, LOG2_E
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    group_members,
    kernel_exp2,
    load_queries,
    load_vectors,
    locate_slots,
)

_BLOCK, _NUM_WARPS = 512, 4  # slots of a step that reads logits


def _score_kernel(*refs, address, heads, group, scale, tile, positioned, exp2):
    """One item of the work list: adds the sum over the group of p**power to the score of each of its slots."""
    _, *kept, place_ref, lse_ref, q_ref, k_ref, table_ref, rows_ref, power_ref, layer_ref = refs[:11]
    position_ref, refs = (refs[11], refs[12:]) if positioned else (None, refs[11:])
    head_row_ref, first_ref, last_ref, score_ref = refs
    kept = KeptLogits(*kept)
    item = pl.program_id(0)
    address = address.join_layer(layer_ref, table_ref.shape[0])
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    first, last = first_ref[address.table_layer, item], last_ref[address.table_layer, item]
    head_row = head_row_ref[address.table_layer, item]
    b, h = head_row // heads, head_row % heads
    power = power_ref[b]
    logits_place = place_ref[address.table_layer, head_row]

    def add(steps, slots_of, mass_of):
        """Adds to all slots: `slots_of(step)` gives some, `mass_of(step, live, page, place)` what goes to each."""
        row = rows_ref[b]

        def visit(step, carry):
            slot = slots_of(step)
            live = slot < last
            page, place = locate_slots(table_ref, row, h, slot, live, address=address, page_size=page_size)
            mass = mass_of(step, live, page, place)
            if position_ref is not None:
                live &= plgpu.load(position_ref.at[page, place], mask=live, other=-1) >= 0
            held = plgpu.load(score_ref.at[page, place], mask=live, other=0.0)
            plgpu.store(score_ref.at[page, place], held + mass, mask=live)
            return carry

        jax.lax.fori_loop(0, steps, visit, 0)

    def read():
        """`_BLOCK` slots at a time."""
        block = tile.block
        blocks, factor = max(_BLOCK // block, 1), power.astype(jnp.float32)
        lse = [lse_ref[b, h * group + member] * LOG2_E for member in range(group)]

        def begin(step):
            return first + step * (blocks * block)

        def mass_of(step, live, page, place):
            del page, place
            mass = jnp.zeros(live.shape, jnp.float32)
            for member in range(group):
                logits = read_kept(kept, member, logits_place, begin(step), live)
                mass += exp2((logits - lse[member]) * factor)
            return mass

        add(pl.cdiv(last - first, blocks * block), lambda step: block_grid(begin(step), blocks, block), mass_of)

    def compute():
        """A tile at a time."""
        factor = power.astype(jnp.float32) * LOG2_E
        member = group_members(group)
        at = jnp.broadcast_to(b, member.shape), h * group + member
        lse = plgpu.load(lse_ref.at[at], mask=member < group, other=-EMPTY_LSE)
        q = load_queries(q_ref, b, h, group=group)
        in_block = jnp.arange(tile.block, dtype=jnp.int32)

        def mass_of(step, live, page, place):
            del step
            logits = exact_dot(q, load_vectors(k_ref, page, place, live, dim=dim).T)
            return exp2(logits * (scale * factor) - (lse * factor)[:, None]).sum(axis=0)

        add(pl.cdiv(last - first, tile.block), lambda step: first + step * tile.block + in_block, mass_of)

    records, stays = (first < last) & (power > 0), has_place(logits_place, last, kept)
    pl.when(records & stays)(read)
    pl.when(records & ~stays)(compute)


def add_decode_scores(
    score, kept, places, lse, q, k_pages, page_table, rows, position, power, work, layer, *, address, heads, scale,
    tile, interpret,
):  # fmt: skip
    """Score f32[P, page], in place, from the logits that were kept and the log-sum-exps f32[B, Hq]."""
    inputs = [score, *kept, places, lse, q, k_pages, page_table, rows, power, layer]
    inputs += [*([] if position is None else [position]), work.head_row, work.first, work.last]
    return pl.pallas_call(
        functools.partial(
            _score_kernel,
            address=address,
            heads=heads,
            group=q.shape[1] // heads,
            scale=scale,
            tile=tile,
            positioned=position is not None,
            exp2=kernel_exp2(interpret),
        ),
        grid=(work.head_row.shape[1],),
        in_specs=[WHOLE] * len(inputs),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(score.shape, score.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=2),
        interpret=interpret,
        name="decode_attention_scores",
    )(*inputs)
