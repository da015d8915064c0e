"""Adds to the scores of slots how much one decode step attended to them.

A probability takes the log-sum-exp of all spans of a head. So the spans leave their logits behind, G numbers a slot
next to the 2 * D of its K and V, and a second kernel over the same work list turns them into scores.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.online_softmax import EMPTY_LSE, LOG2_E
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

# The logits that are kept. What lies beyond is computed a second time: correct whatever the lengths, and slower.
_MOST_BYTES = 256 << 20

ALIGNMENT = 128
"""Every head's logits start at a multiple of this, which is one of every block: blocks are stored whole."""

_NOWHERE = 1 << 30  # the place of a head without one
_BLOCK, _NUM_WARPS = 512, 4  # slots of a step that reads logits


def most_places(heads: int, group: int, max_slots: int) -> int:
    """The static size of the logits f32[group, places] of `heads` (request, KV head) pairs."""
    return ALIGNMENT * min(heads * -(-max_slots // ALIGNMENT), max(1, _MOST_BYTES // (4 * group * ALIGNMENT)))


@functools.partial(jax.jit, static_argnames=("heads",))
def logit_places(lengths: jax.Array, rows: jax.Array, power: jax.Array, *, heads: int) -> jax.Array:
    """i32[Lt, B*H] where the logits of each (request, KV head) start, in units of ALIGNMENT.

    Requests that record nothing take no place. As the work list it does not depend on the layer: one serves a step.
    """
    layers, batch = lengths.shape[0], rows.shape[0]
    length = jnp.broadcast_to(lengths[:, rows], (layers, batch, heads))
    units = jnp.where(power[:, None] > 0, -(-length // ALIGNMENT), 0).reshape(layers, -1)
    end = jnp.cumsum(units, axis=1, dtype=jnp.int32)
    return jnp.where(units > 0, end - units, _NOWHERE)


def has_place(place, last, logits_ref):
    """Whether an item that ends before slot `last` of a head with `place` keeps its logits, inside a kernel."""
    return place + pl.cdiv(last, ALIGNMENT) <= logits_ref.shape[1] // ALIGNMENT


def _score_kernel(*refs, address, heads, group, scale, tile, positioned, exp2):
    """One item of the work list: adds the sum over the group of p**power to the score of each of its slots."""
    _, logits_ref, place_ref, lse_ref, q_ref, k_ref, table_ref, rows_ref, power_ref, layer_ref, *refs = refs
    position_ref, refs = (refs[0], refs[1:]) if positioned else (None, refs)
    head_row_ref, first_ref, last_ref, score_ref = refs
    item = pl.program_id(0)
    address = address.join_layer(layer_ref, table_ref.shape[0])
    dim, page_size = q_ref.shape[2], k_ref.shape[1]
    first, last = first_ref[address.table_layer, item], last_ref[address.table_layer, item]
    head_row = head_row_ref[address.table_layer, item]
    b, h = head_row // heads, head_row % heads
    power = power_ref[b]
    logits_place = place_ref[address.table_layer, head_row]
    kept = has_place(logits_place, last, logits_ref)

    def add(block, members, logits_of):
        """Adds to all slots, `block` at a time; `logits_of(slot, live, page, place)` gives f32[members, block]."""
        row, factor = rows_ref[b], power.astype(jnp.float32) * LOG2_E
        member = jnp.arange(members, dtype=jnp.int32)
        real = member < group
        lse = plgpu.load(lse_ref.at[jnp.broadcast_to(b, member.shape), h * group + member], mask=real, other=-EMPTY_LSE)

        def visit(step, carry):
            slot = first + step * block + jnp.arange(block, dtype=jnp.int32)
            live = slot < last
            page, place = locate_slots(table_ref, row, h, slot, live, address=address, page_size=page_size)
            logits = logits_of(member, slot, live, page, place)
            mass = exp2(logits * (scale * factor) - (lse * factor)[:, None]).sum(axis=0)
            if position_ref is not None:
                live &= plgpu.load(position_ref.at[page, place], mask=live, other=-1) >= 0
            held = plgpu.load(score_ref.at[page, place], mask=live, other=0.0)
            plgpu.store(score_ref.at[page, place], held + mass, mask=live)
            return carry

        jax.lax.fori_loop(0, pl.cdiv(last - first, block), visit, 0)

    def read(member, slot, live, page, place):
        del page, place
        at_member, at_place = index_grid(member, logits_place * ALIGNMENT + slot)
        mask = (at_member < group) & live[None, :]
        return plgpu.load(logits_ref.at[at_member, at_place], mask=mask, other=0.0)

    def compute(member, slot, live, page, place):
        del slot
        members, columns = index_grid(member, jnp.arange(next_power_of_two(dim), dtype=jnp.int32))
        mask = vector_mask(member < group, columns, dim)
        q = plgpu.load(q_ref.at[b, h * group + members, columns], mask=mask, other=0.0)
        return exact_dot(q, load_vectors(k_ref, page, place, live, dim=dim).T)

    records = (first < last) & (power > 0)
    pl.when(records & kept)(lambda: add(_BLOCK, next_power_of_two(group), read))
    pl.when(records & ~kept)(lambda: add(tile.block, max(16, next_power_of_two(group)), compute))


def add_decode_scores(
    score, logits, places, lse, q, k_pages, page_table, rows, position, power, work, layer, *, address, heads, scale,
    tile, interpret,
):  # fmt: skip
    """Score f32[P, page], in place, from the logits f32[G, places] (before `scale`) and the log-sum-exps f32[B, Hq]."""
    inputs = [score, logits, places, lse, q, k_pages, page_table, rows, power, layer]
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
