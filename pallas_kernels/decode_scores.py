"""Adds to the scores of slots how much one decode step attended to them.

A probability takes the log-sum-exp of all spans of a head. So the spans leave their logits behind (`kept_logits`). A
program that ends a head, because it is one item or because the last of its items merges them, reads them back
(`add_kept_scores`) while others still read keys; a second kernel over the same work list does the rest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.kept_logits import KeptLogits, has_place, keeps_all, load_kept, run_grid
from pallas_kernels.merge_items import ends_merge
from pallas_kernels.online_softmax import EMPTY_LSE, LOG2_E
from pallas_kernels.paging import PageAddress
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    group_members,
    kernel_exp2,
    load_of_head,
    load_queries,
    load_vectors,
    locate_slots,
)

_BLOCK, _NUM_WARPS = 1024, 4  # slots of a step that reads logits


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

    def locate(self, slot: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(page, place), each like `slot`, of those that are live."""
        return locate_slots(
            self.table, self.row, self.head, slot, live, address=self.address, page_size=self.score.shape[1]
        )

    def add(self, page: jax.Array, place: jax.Array, live: jax.Array, mass_of: Callable[[], jax.Array]) -> None:
        """Adds `mass_of()` to live slots. It is called once they are being fetched, and need not wait for them."""
        held = plgpu.load(self.score.at[page, place], mask=live, other=0.0)
        plgpu.store(self.score.at[page, place], held + mass_of(), mask=live)


def add_kept_scores(
    refs: ScoreRefs, kept: KeptLogits, place, lse_of, first, last, power, *, group, block, exp2
) -> None:
    """Adds the sum over the group of p**power to the scores of slots first .. last-1, from logits that were kept.

    Slots that are next to each other in a page are read and written together, as runs, those behind `last` with them:
    their logits are -inf, so that they keep what they have. (The page is this request's alone.)

    Args:
      place: of the head, in units of `kept_logits.ALIGNMENT`.
      lse_of: member of the group -> f32[] its log-sum-exp, natural.
      first: a multiple of the block.
      block: slots of a block of the spans.
    """
    run = min(refs.score.shape[1], block)
    runs = max(_BLOCK, block) // run
    factor = power.astype(jnp.float32)
    lse = [lse_of(member) * LOG2_E for member in range(group)]

    def visit(step, carry):
        begin = first + step * (runs * run)
        slot = begin + jnp.arange(runs, dtype=jnp.int32) * run
        live = slot < last
        page, start = refs.locate(slot, live)
        loaded = [load_kept(kept, member, place, begin, live, run=run, block=block) for member in range(group)]
        pages = jnp.broadcast_to(page[:, None], (runs, run))
        places = run_grid(0, 1, run) + (start // run * run)[:, None]  # Triton is to see what these are multiples of

        def mass():
            masses = [exp2((each.logits - own_lse) * factor) for each, own_lse in zip(loaded, lse, strict=True)]
            return functools.reduce(jnp.add, masses)

        refs.add(pages, places, jnp.broadcast_to(live[:, None], (runs, run)), mass)
        return carry

    jax.lax.fori_loop(0, pl.cdiv(last - first, runs * run), visit, 0)


def _score_kernel(*refs, address, heads, group, scale, tile, positioned, ending, exp2):
    """One item of the work list, unless the spans did its head: adds the sum over the group of p**power to scores."""
    _, *kept, place_ref, lse_ref, q_ref, k_ref, table_ref, length_ref, rows_ref, power_ref, layer_ref = refs[:12]
    position_ref, refs = (refs[12], refs[13:]) if positioned else (None, refs[12:])
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
    row = rows_ref[b]
    own = ScoreRefs(score_ref, table_ref, row, h, address)

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

        def visit(step, carry):
            slot = first + step * tile.block + in_block
            live = slot < last
            page, place = own.locate(slot, live)

            def mass():
                logits = exact_dot(q, load_vectors(k_ref, page, place, live, dim=dim).T)
                mass = exp2(logits * (scale * factor) - (lse * factor)[:, None]).sum(axis=0)
                if position_ref is None:
                    return mass
                return jnp.where(plgpu.load(position_ref.at[page, place], mask=live, other=-1) >= 0, mass, 0.0)

            own.add(page, place, live, mass)
            return carry

        jax.lax.fori_loop(0, pl.cdiv(last - first, tile.block), visit, 0)

    stays = has_place(logits_place, last, kept)
    ended = parts == 1
    if ending:
        ended = has_place(logits_place, load_of_head(length_ref, row, h, address=address), kept)
    records = (first < last) & (power > 0) & ~(stays & ended)
    pl.when(records & stays)(read)
    pl.when(records & ~stays)(compute)


def add_decode_scores(
    score, kept, places, lse, q, k_pages, page_table, lengths, rows, position, power, work, layer, *, address, heads,
    scale, tile, interpret,
):  # fmt: skip
    """Score f32[P, page], in place, from the logits that were kept and the log-sum-exps f32[B, Hq].

    Heads that a program ended, and whose logits were kept, have their scores by now.
    """
    ending = ends_merge(work.parts.shape[1])
    group = q.shape[1] // heads
    if ending and keeps_all(kept, work.parts.shape[1], page_table.shape[3] * k_pages.shape[1]):
        return score
    inputs = [score, *kept, places, lse, q, k_pages, page_table, lengths, rows, power, layer]
    inputs += [*([] if position is None else [position]), work.head_row, work.first, work.last, work.parts]
    return pl.pallas_call(
        functools.partial(
            _score_kernel,
            address=address,
            heads=heads,
            group=group,
            scale=scale,
            tile=tile,
            positioned=position is not None,
            ending=ending,
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
