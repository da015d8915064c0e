"""Adds to the scores of slots how much one decode step attended to them.

A probability takes the log-sum-exp of all spans of a head. So the spans leave their logits behind (`kept_logits`). The
program of a head that is one item reads its own back (`add_kept_scores`), while others still read keys; a second kernel
over the same work list does the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kept_logits import KeptLogits, block_grid, has_place, load_kept
from pallas_kernels.online_softmax import EMPTY_LSE, LOG2_E
from pallas_kernels.paging import PageAddress
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


class ScoreRefs(NamedTuple):
    """What scores are added to, inside a kernel, and what it takes to find the slots of table row `row`.

    Attributes:
      score: reference to the pool f32[P, page].
      table: reference to the whole table [Lt, R, Ht, M].
      row: i32[] row of the table.
      head: i32[] KV head.
      address: of the layer.
    """

    score: Any
    table: Any
    row: jax.Array
    head: jax.Array
    address: PageAddress

    def add(self, steps, last, slots_of, fetch, mass_of) -> None:
        """Adds to slots before `last` what `mass_of` gives for them, which is to be 0 for dead slots.

        Args:
          steps: how often.
          slots_of: step -> i32[...] the slots of a step.
          fetch: (step, live) -> what can be loaded before it is known where the slots are.
          mass_of: (fetched, live, page, place) -> f32[...].
        """
        page_size = self.score.shape[1]

        def visit(step, carry):
            slot = slots_of(step)
            live = slot < last
            page, place = locate_slots(
                self.table, self.row, self.head, slot, live, address=self.address, page_size=page_size
            )
            fetched = fetch(step, live)
            held = plgpu.load(self.score.at[page, place], mask=live, other=0.0)
            plgpu.store(self.score.at[page, place], held + mass_of(fetched, live, page, place), mask=live)
            return carry

        jax.lax.fori_loop(0, steps, visit, 0)


def add_kept_scores(
    refs: ScoreRefs, kept: KeptLogits, place, lse_of, first, last, power, *, group, block, exp2
) -> None:
    """Adds the sum over the group of p**power to the scores of slots first .. last-1, from logits that were kept.

    Args:
      place: of the head, in units of `kept_logits.ALIGNMENT`.
      lse_of: member of the group -> f32[] its log-sum-exp, natural.
      block: slots of a block of the spans.
    """
    blocks, factor = max(_BLOCK // block, 1), power.astype(jnp.float32)
    lse = [lse_of(member) * LOG2_E for member in range(group)]

    def begin(step):
        return first + step * (blocks * block)

    def fetch(step, live):
        return [load_kept(kept, member, place, begin(step), live) for member in range(group)]

    def mass_of(fetched, live, page, at):
        del live, page, at
        masses = [exp2((each.logits - own_lse) * factor) for each, own_lse in zip(fetched, lse, strict=True)]
        return functools.reduce(jnp.add, masses)

    steps = pl.cdiv(last - first, blocks * block)
    refs.add(steps, last, lambda step: block_grid(begin(step), blocks, block), fetch, mass_of)


def _score_kernel(*refs, address, heads, group, scale, tile, positioned, exp2):
    """One item of the work list: adds the sum over the group of p**power to the score of each of its slots."""
    _, *kept, place_ref, lse_ref, q_ref, k_ref, table_ref, rows_ref, power_ref, layer_ref = refs[:11]
    position_ref, refs = (refs[11], refs[12:]) if positioned else (None, refs[11:])
    head_row_ref, first_ref, last_ref, parts_ref, score_ref = refs
    kept = KeptLogits(*kept)
    item = pl.program_id(0)
    address = address.join_layer(layer_ref, table_ref.shape[0])
    dim = q_ref.shape[2]
    first, last = first_ref[address.table_layer, item], last_ref[address.table_layer, item]
    head_row = head_row_ref[address.table_layer, item]
    b, h = head_row // heads, head_row % heads
    power = power_ref[b]
    logits_place, parts = place_ref[address.table_layer, head_row], parts_ref[address.table_layer, head_row]
    own = ScoreRefs(score_ref, table_ref, rows_ref[b], h, address)

    def read():
        """Many slots at a time."""
        add_kept_scores(
            own, kept, logits_place, lambda member: lse_ref[b, h * group + member], first, last, power, group=group,
            block=tile.block, exp2=exp2,
        )  # fmt: skip

    def compute():
        """A tile at a time."""
        factor = power.astype(jnp.float32) * LOG2_E
        member = group_members(group)
        at = jnp.broadcast_to(b, member.shape), h * group + member
        lse = plgpu.load(lse_ref.at[at], mask=member < group, other=-EMPTY_LSE)
        q = load_queries(q_ref, b, h, group=group)
        in_block = jnp.arange(tile.block, dtype=jnp.int32)

        def mass_of(_, live, page, place):
            logits = exact_dot(q, load_vectors(k_ref, page, place, live, dim=dim).T)
            mass = exp2(logits * (scale * factor) - (lse * factor)[:, None]).sum(axis=0)
            if position_ref is None:
                return mass
            return jnp.where(plgpu.load(position_ref.at[page, place], mask=live, other=-1) >= 0, mass, 0.0)

        own.add(
            pl.cdiv(last - first, tile.block),
            last,
            lambda step: first + step * tile.block + in_block,
            lambda step, live: None,
            mass_of,
        )

    records, stays = (first < last) & (power > 0), has_place(logits_place, last, kept)
    pl.when(records & stays & (parts > 1))(read)  # else the span has done it
    pl.when(records & ~stays)(compute)


def add_decode_scores(
    score, kept, places, lse, q, k_pages, page_table, rows, position, power, work, layer, *, address, heads, scale,
    tile, interpret,
):  # fmt: skip
    """Score f32[P, page], in place, from the logits that were kept and the log-sum-exps f32[B, Hq].

    Heads that are one item, and whose logits were kept, have their scores by now.
    """
    inputs = [score, *kept, places, lse, q, k_pages, page_table, rows, power, layer]
    inputs += [*([] if position is None else [position]), work.head_row, work.first, work.last, work.parts]
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
