"""Prefill attention for Hopper: copies, matrix products and softmax overlap (Pallas' Mosaic GPU backend).

FlashAttention-3 (Shah et al. 2024, section 3): one warp group fetches blocks of K and V into shared memory, two others
each attend with half of a tile of queries.

What is copied starts at a multiple of 8 rows, as the layout of shared memory asks. Hence tiles of queries and blocks of
keys lie on a grid over the packed chunk that does not move with the segments. Who attends with a tile visits each
segment that has tokens in it, and masks the queries of the others.

A tile and a query head are an item. Programs stay, one on each multiprocessor, and take items in turns, the heaviest
first; what the next one needs is fetched while the last one ends. Where items are too few for the GPU, the keys of a
tile are shared out as well, and what was found in the parts is merged behind the kernel (Flash-Decoding, Dao et al.
2023).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import multiprocessors
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.online_softmax import DEAD_SCORE, EMPTY_LSE, LN_2, LOG2_E, merge
from pallas_kernels.segment_visits import SegmentVisits, segment_visits

BLOCK = 128
"""Queries of a tile and keys of a block."""

_WORKERS = 2
_ROWS = BLOCK // _WORKERS
_STAGES = 2  # blocks of K and of V, and tiles of queries, in shared memory
_SWIZZLE = 128  # bytes
# Of the 65,536 of a multiprocessor; the two workers and the fetcher may use 512 a thread together.
_WORKER_REGISTERS, _FETCHER_REGISTERS = 232, 40

_MOST_PARTS = 8
_BLOCK_US = 1.2  # that a program takes for a block
_PARTS_US = 10.0  # and more, where parts are merged: they are written as float32, and read again


def refusal(dtype, dim: int, page_size: int) -> str | None:
    """Why the kernel cannot serve pools of this dtype, head_dim and page size; None if it can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its pools are bfloat16 or float16, not {jnp.dtype(dtype)}"
    if dim not in (64, 128):
        return f"its head_dim is 64 or 128, not {dim}"
    if page_size < 16:
        return f"its pages have 16 or more slots, not {page_size}"
    return None


def best_parts(items: int, blocks: int, programs: int) -> int:
    """Into how many parts to share the keys of each tile out: as many as run at once, if there are keys enough.

    Args:
      items: tiles of all query heads.
      blocks: blocks of keys that a tile may see. That is a bound: where it sees few, what the parts cost is lost.
      programs: that run at once.
    """

    def cost(parts):
        return -(-blocks // parts) * _BLOCK_US + (_PARTS_US if parts > 1 else 0.0)

    most = min(_MOST_PARTS, programs // items)
    return min(range(1, most + 1), key=cost, default=1)


class _Item(NamedTuple):
    """What a program attends with and to. int32 inside the kernel.

    Attributes:
      tile: of queries.
      part: of the keys that the tile sees.
      q_head, head: query head and KV head.
      table_head: the head's place in the page table.
      visits: (first, end) of the tile's visits.
    """

    tile: jax.Array
    part: jax.Array
    q_head: jax.Array
    head: jax.Array
    table_head: jax.Array
    visits: tuple[jax.Array, jax.Array]


class _Visit(NamedTuple):
    """A visit's steps, a block of keys each: first those that need masks, then whole blocks. int32 inside the kernel.

    Attributes:
      row, first, last, key_first: as in `SegmentVisits`.
      held: slots of history.
      has_own: 1 if the tile's own block is the first masked one.
      tail, has_tail, tail_block: slots of history in that block, which is not full; 1 if it is the next masked one.
      lead, has_lead, lead_block: the segment begins this many tokens into that block; 1 if it is the last masked one.
      masked: number of masked blocks.
      full, full_first: number of full blocks of history, which are the first whole ones, and the first.
      whole, whole_first: number of the segment's whole blocks, and the first.
      total: number of steps.
    """

    row: jax.Array
    first: jax.Array
    last: jax.Array
    key_first: jax.Array
    held: jax.Array
    has_own: jax.Array | int
    tail: jax.Array
    has_tail: jax.Array
    tail_block: jax.Array
    lead: jax.Array
    has_lead: jax.Array
    lead_block: jax.Array
    masked: jax.Array
    full: jax.Array
    full_first: jax.Array | int
    whole: jax.Array
    whole_first: jax.Array
    total: jax.Array


def _flag(condition: jax.Array) -> jax.Array:
    """1 where true, else 0."""
    return jnp.where(condition, 1, 0)


def _share(visit: _Visit, part: jax.Array, parts: int) -> _Visit:
    """The steps of a visit that belong to one of `parts`."""
    low, high = (jax.lax.div(visit.total * i, jnp.int32(parts)) for i in (part, part + 1))

    def cut(before, count):
        """(first, number) of those that are taken of `count` steps behind `before` others."""
        begin, end = (jnp.minimum(jnp.maximum(x - before, 0), count) for x in (low, high))
        return begin, end - begin

    _, has_own = cut(0, 1)
    _, has_tail = cut(1, visit.has_tail)
    _, has_lead = cut(1 + visit.has_tail, visit.has_lead)
    full_first, full = cut(visit.masked, visit.full)
    whole_first, whole = cut(visit.masked + visit.full, visit.whole)
    return visit._replace(
        has_own=has_own,
        has_tail=has_tail,
        has_lead=has_lead,
        masked=has_own + has_tail + has_lead,
        full=full,
        full_first=full_first,
        whole=whole,
        whole_first=visit.whole_first + whole_first,
        total=high - low,
    )


def _kernel(
    q_ref, k_ref, v_ref, k_pages_ref, v_pages_ref, table_ref, history_ref, layer_ref, bounds_ref, row_ref, first_ref,
    last_ref, key_first_ref, order_ref, out_ref, *refs, address, group, scale, piece, parts, with_lse, interpreted,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_ready, q_free, k_ready, v_ready, k_free, v_free, switched = refs[
        with_lse : len(refs) - with_lse
    ]
    program, worker = jax.lax.axis_index("program"), jax.lax.axis_index("worker")
    programs = jax.lax.axis_size("program")
    address = address.join_layer(layer_ref)
    q_heads, dim, page_size = q_ref.shape[1], q_ref.shape[2], k_pages_ref.shape[1]
    table_heads = table_ref.shape[2]
    sharing = q_heads // table_heads  # query heads that see as many keys as each other
    rounds, rest = divmod(order_ref.shape[0] * parts * sharing, programs)

    def place(turn):
        """This program's place in a round of items. Odd rounds run backwards, because items get lighter."""
        return jnp.where(jax.lax.rem(turn, jnp.int32(2)) == 0, program, programs - 1 - program)

    turns = rounds + _flag(place(jnp.int32(rounds)) < rest)

    def item_of(turn):
        def split(index, size):
            return jax.lax.div(index, jnp.int32(size)), jax.lax.rem(index, jnp.int32(size))

        share, q_head = split(turn * programs + place(turn), sharing)
        place_in_order, part = split(share, parts)
        tile, table_head = split(order_ref[place_in_order], table_heads)
        q_head += table_head * sharing
        return _Item(
            tile=tile,
            part=part,
            q_head=q_head,
            head=jax.lax.div(q_head, jnp.int32(group)),
            table_head=table_head,
            visits=(bounds_ref[tile], bounds_ref[tile + 1]),
        )

    def block_of(token):
        return jax.lax.div(token, jnp.int32(BLOCK))

    def plan(visit, item):
        row, first, last, key_first = row_ref[visit], first_ref[visit], last_ref[visit], key_first_ref[visit]
        held = history_ref[address.table_layer, row, item.table_head]
        full, lead_block = block_of(held), block_of(key_first)
        tail, lead = held - full * BLOCK, key_first - lead_block * BLOCK
        has_tail, has_lead = _flag(tail > 0), _flag((lead > 0) & (lead_block < item.tile))
        masked = 1 + has_tail + has_lead
        whole_first = lead_block + _flag(lead > 0)
        whole = jnp.maximum(item.tile - whole_first, 0)
        visit = _Visit(
            row=row,
            first=first,
            last=last,
            key_first=key_first,
            held=held,
            has_own=1,
            tail=tail,
            has_tail=has_tail,
            tail_block=full,
            lead=lead,
            has_lead=has_lead,
            lead_block=lead_block,
            masked=masked,
            full=full,
            full_first=0,
            whole=whole,
            whole_first=whole_first,
            total=masked + full + whole,
        )
        return _share(visit, item.part, parts) if parts > 1 else visit

    def slot_of(step):
        return jax.lax.rem(step, jnp.int32(_STAGES))

    @pl.when(worker == _WORKERS)
    def _fetch():
        plgpu.set_max_registers(_FETCHER_REGISTERS, action="decrease")

        def fetch_item(turn, start):
            item, q_slot = item_of(turn), slot_of(turn)

            @pl.when(turn >= _STAGES)
            def _():
                plgpu.barrier_wait(q_free.at[q_slot])

            for i in range(_WORKERS):
                rows = pl.ds(item.tile * BLOCK + i * _ROWS, _ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[rows, item.q_head], q_smem.at[q_slot, i], q_ready.at[q_slot])

            def fetch(step, source):
                """`source(i)`: ((K, V), index) of piece i of the block."""
                slot = slot_of(step)
                pieces = [source(i) for i in range(BLOCK // piece)]
                for smem, ready, free, which in ((k_smem, k_ready, k_free, 0), (v_smem, v_ready, v_free, 1)):

                    @pl.when(step >= _STAGES)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for i, (arrays, index) in enumerate(pieces):
                        plgpu.copy_gmem_to_smem(
                            arrays[which].at[index], smem.at[slot, pl.ds(i * piece, piece)], ready.at[slot]
                        )

            def fetch_own(step, block):
                fetch(step, lambda i: ((k_ref, v_ref), (pl.ds(block * BLOCK + i * piece, piece), item.head)))

            def fetch_history(step, block, visit):
                def source(i):
                    token = block * BLOCK + i * piece
                    column = jax.lax.div(token, jnp.int32(page_size))
                    entry = table_ref[
                        address.table_layer, visit.row, item.table_head, jnp.minimum(column, table_ref.shape[3] - 1)
                    ]
                    # Past the history anything may stand in the table; the null entry's page is there to be read.
                    page = address.page(jnp.where(token < visit.held, entry, 0), item.head)
                    return (k_pages_ref, v_pages_ref), (page, pl.ds(token - column * page_size, piece))

                fetch(step, source)

            def fetch_visit(index, start):
                visit = plan(index, item)

                @pl.when(visit.has_own > 0)
                def _():
                    fetch_own(start, item.tile)

                @pl.when(visit.has_tail > 0)
                def _():
                    fetch_history(start + visit.has_own, visit.tail_block, visit)

                @pl.when(visit.has_lead > 0)
                def _():
                    fetch_own(start + visit.has_own + visit.has_tail, visit.lead_block)

                after = start + visit.masked

                @pl.loop(0, visit.full)
                def _(i):
                    fetch_history(after + i, visit.full_first + i, visit)

                @pl.loop(0, visit.whole)
                def _(i):
                    fetch_own(after + visit.full + i, visit.whole_first + i)

                return start + visit.total

            return jax.lax.fori_loop(*item.visits, fetch_visit, start)

        total = jax.lax.fori_loop(0, turns, fetch_item, jnp.int32(0))
        # Every arrival is waited for, the last ones too.
        for slot in range(_STAGES):

            @pl.when(total > slot)
            def _(slot=slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            @pl.when(turns > slot)
            def _(slot=slot):
                plgpu.barrier_wait(q_free.at[slot])

    @pl.when(worker < _WORKERS)
    def _attend():
        plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
        wgmma_layout = plgpu.Layout.WGMMA
        row_base = worker * _ROWS

        def cast(x):
            if interpreted:
                return x
            return plgpu.layout_cast(x, wgmma_layout if x.ndim == 2 else wgmma_layout.reduce(1))

        def iota(shape, axis):
            if interpreted:
                return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return plgpu.broadcasted_iota(
                jnp.int32, shape, axis, layout=wgmma_layout if len(shape) == 2 else wgmma_layout.reduce(1)
            )

        def spread(x, shape):
            return jax.lax.broadcast_in_dim(x, shape, [0])

        def switch():
            plgpu.barrier_arrive(switched)
            plgpu.barrier_wait(switched)

        def softmax(scores, top, sums):
            new_top = jnp.maximum(top, scores.max(axis=1) * (scale * LOG2_E))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores * (scale * LOG2_E) - spread(new_top, scores.shape))
            return new_top, sums * shrink + weights.sum(axis=1), shrink, weights.astype(v_smem.dtype)

        def accumulate(values, weights, slot):
            if interpreted:
                return values + jnp.dot(weights, v_smem[slot], preferred_element_type=jnp.float32)
            return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, v_smem.at[slot]))(
                plgpu.WGMMAAccumulatorRef.init(values)
            )

        def clear_dead_values(slot, low, high):
            """Zeroes the values before `low` and from `high` on: a weight of 0 does not hide a NaN."""
            for row in range(0, BLOCK, _ROWS):
                v = v_smem.at[slot, pl.ds(row, _ROWS)]
                key = row + iota((_ROWS, dim), 0)
                kept = cast(v[...])
                v[...] = jnp.where((key >= low) & (key < high), kept, jnp.zeros_like(kept))
            plgpu.commit_smem()

        def attend_item(turn, start):
            item, q_slot = item_of(turn), slot_of(turn)
            base = item.tile * BLOCK
            my_q = q_smem.at[q_slot, worker]

            def scores_of(slot):
                if interpreted:
                    switch()
                    return jnp.dot(my_q[...], k_smem[slot].T, preferred_element_type=jnp.float32)

                def product(acc):
                    plgpu.wgmma(acc, my_q, k_smem.at[slot].transpose((1, 0)))
                    switch()
                    return acc[...]

                return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_ROWS, BLOCK), jnp.float32))

            def attend(step, state, mask=None):
                """Absorbs the block of a step. `mask`: (scores -> scores, first live key, end of the live keys)."""
                values, top, sums = state
                slot = slot_of(step)
                plgpu.barrier_wait(k_ready.at[slot])
                scores = scores_of(slot)
                plgpu.barrier_arrive(k_free.at[slot])
                if mask is not None:
                    scores = mask[0](scores)
                top, sums, shrink, weights = softmax(scores, top, sums)
                values *= spread(shrink, values.shape)
                values, top, sums, weights = jax.lax.optimization_barrier((values, top, sums, weights))
                plgpu.barrier_arrive(switched)
                plgpu.barrier_wait(v_ready.at[slot])
                if mask is not None:
                    _, low, high = mask

                    @pl.when((low > 0) | (high < BLOCK))
                    def _():
                        clear_dead_values(slot, low, high)

                plgpu.barrier_wait(switched)
                values = accumulate(values, weights, slot)
                plgpu.barrier_arrive(v_free.at[slot])
                return values, top, sums

            def attend_visit(index, carry):
                start, state = carry
                visit = plan(index, item)

                def attend_masked(step, state):
                    order = step - start
                    is_own = (order == 0) & (visit.has_own > 0)
                    is_tail = (order == visit.has_own) & (visit.has_tail > 0)
                    is_lead = (order == visit.has_own + visit.has_tail) & (visit.has_lead > 0)
                    low = jnp.where(is_own, jnp.maximum(visit.key_first - base, 0), jnp.where(is_lead, visit.lead, 0))
                    high = jnp.where(is_own, visit.last - base, jnp.where(is_tail, visit.tail, BLOCK))
                    slack = jnp.where(is_own, 0, BLOCK)

                    def mask(scores):
                        query, key = iota((_ROWS,), 0) + row_base, iota(scores.shape, 1)
                        own = (query >= visit.first - base) & (query < visit.last - base)
                        end = jnp.where(own, jnp.minimum(high, query + slack + 1), 0)
                        return jnp.where((key >= low) & (key < spread(end, scores.shape)), scores, DEAD_SCORE)

                    return attend(step, state, (mask, low, high))

                end = start + visit.total
                shared = (visit.first > base) | (visit.last < base + BLOCK)
                unmasked = jnp.where(shared, end, start + visit.masked)
                state = jax.lax.fori_loop(start, unmasked, attend_masked, state)
                return end, jax.lax.fori_loop(unmasked, end, attend, state)

            plgpu.barrier_wait(q_ready.at[q_slot])
            state = (
                cast(jnp.zeros((_ROWS, dim), jnp.float32)),
                cast(jnp.full((_ROWS,), EMPTY_LSE, jnp.float32)),
                cast(jnp.zeros((_ROWS,), jnp.float32)),
            )
            end, (values, top, sums) = jax.lax.fori_loop(*item.visits, attend_visit, (start, state))

            # Worker 1 comes half a step behind worker 0, from its start to its last step of all: while one of them
            # stores what it found, the other's products go on.
            @pl.when((worker == 0) | (turn + 1 < turns))
            def _():
                switch()

            weight = jnp.maximum(sums, 1e-30)
            mine = pl.ds(base + row_base, _ROWS)
            own_part = (item.part,) if parts > 1 else ()
            if parts > 1:
                # From registers: shared memory has no room left for float32.
                out_ref[*own_part, mine, item.q_head] = values / spread(weight, values.shape)
            else:
                my_q[...] = (values / spread(weight, values.shape)).astype(q_smem.dtype)
            if with_lse:
                lse_ref, lse_smem = refs[0], refs[-1]
                lse_smem[worker] = jnp.where(sums > 0.0, (top + jnp.log2(weight)) * LN_2, EMPTY_LSE)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(lse_smem.at[worker], lse_ref.at[*own_part, item.q_head, mine])
            if parts == 1:
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(my_q, out_ref.at[mine, item.q_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[q_slot])
            return end

        @pl.when(worker == 1)
        def _():
            switch()

        jax.lax.fori_loop(0, turns, attend_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _heaviest_first(visits: SegmentVisits, history: jax.Array, tiles: int) -> jax.Array:
    """i32[tiles * Ht], of tile * Ht + head of the table: those first that see the most keys. Any order is right.

    Args:
      history: i32[rows, Ht], for the table that this layer reads.
    """
    held = history[visits.row]
    tile, visit = jnp.arange(tiles)[:, None, None], jnp.arange(visits.row.shape[0])[:, None]
    own = (visits.bounds[:-1, None, None] <= visit) & (visit < visits.bounds[1:, None, None])
    blocks = -(-held // BLOCK) + tile + 1 - visits.key_first[:, None] // BLOCK
    seen = jnp.where(own, blocks, 0).sum(axis=1)  # [tiles, Ht]
    return jnp.argsort(seen.ravel(), descending=True).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("address", "scale", "with_lse", "parts", "programs", "interpret"))
def prefill_attention_mosaic(
    q, k, v, k_pages, v_pages, page_table, history, rows, starts, layer, *, address, scale, with_lse, parts=None,
    programs=None, interpret=None,
):  # fmt: skip
    """(out [T, Hq, D], lse f32[T, Hq] or None) of `prefill_attention`, where the arguments are described and checked.

    q, k, v have the pools' dtype, S > 0, and `refusal` is None. `parts`: into which the keys of a tile are shared out;
    None lets `best_parts` decide. `programs`: that run at once; None means one for each multiprocessor of the GPU.
    `interpret`: parameters of Pallas' GPU interpreter, for which `programs` must be given.
    """
    real_tokens, q_heads = q.shape[:2]
    tiles = -(-real_tokens // BLOCK)
    tokens = tiles * BLOCK
    if tokens > real_tokens:
        q, k, v = (jnp.pad(x, ((0, tokens - real_tokens), (0, 0), (0, 0))) for x in (q, k, v))
    visits = segment_visits(rows, starts, tokens, BLOCK)
    programs = programs or multiprocessors()
    if parts is None:
        slots = page_table.shape[3] * k_pages.shape[1]
        parts = best_parts(q_heads * tiles, -(-slots // BLOCK) + tiles, programs)
    items = q_heads * tiles * parts
    if items <= programs:  # all at once
        order = jnp.arange(tiles * page_table.shape[2], dtype=jnp.int32)
    else:
        order = _heaviest_first(visits, history[address.join_layer(layer, history.shape[0]).table_layer], tiles)
    arrays = (q, k, v, k_pages, v_pages, page_table, history, layer, *visits, order)
    # No program is without an item: its workers would wait for each other for ever.
    options = (address, scale, with_lse or parts > 1, parts, min(programs, items))
    if interpret is None:
        outs = lowered_once(_call, *arrays, options=options)
    else:
        outs = _call(*arrays, options=options, interpret=interpret)
    if parts > 1:
        out, lse = merge(outs[0], outs[1].swapaxes(1, 2))
        return out[:real_tokens].astype(q.dtype), lse[:real_tokens] if with_lse else None
    return outs[0][:real_tokens], outs[1].T[:real_tokens] if with_lse else None


def _call(q, k, v, k_pages, *others, options, interpret=None):
    """[out [T, Hq, D], lse f32[Hq, T] if wanted] of whole tiles. others: the rest of what the kernel reads.

    With several parts both have these as a first axis, and out is float32.
    """
    address, scale, with_lse, parts, programs = options
    tokens, q_heads, dim = q.shape
    piece = min(k_pages.shape[1], BLOCK)
    swizzled = (plgpu.TilingTransform((8, _SWIZZLE // q.dtype.itemsize)), plgpu.SwizzleTransform(_SWIZZLE))
    keys = plgpu.SMEM((_STAGES, BLOCK, dim), q.dtype, transforms=swizzled)
    # Each copy arrives once at the barrier that says that a block is there, each worker once at the one that frees it.
    ready = plgpu.Barrier(num_arrivals=BLOCK // piece, num_barriers=_STAGES)
    free = plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES)
    several = (parts,) if parts > 1 else ()
    out_types = [jax.ShapeDtypeStruct((*several, *q.shape), jnp.float32 if several else q.dtype)]
    if with_lse:
        # Tokens last: what is copied is contiguous.
        out_types.append(jax.ShapeDtypeStruct((*several, q_heads, tokens), jnp.float32))
    return plgpu.kernel(
        functools.partial(
            _kernel,
            address=address,
            group=q_heads // k.shape[1],
            scale=scale,
            piece=piece,
            parts=parts,
            with_lse=with_lse,
            interpreted=interpret is not None,
        ),
        out_type=out_types,
        scratch_types=[
            plgpu.SMEM((_STAGES, _WORKERS, _ROWS, dim), q.dtype, transforms=swizzled),
            keys,
            keys,
            plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_STAGES),
            free,
            ready,
            ready,
            free,
            free,
            plgpu.Barrier(num_arrivals=_WORKERS),
            *([plgpu.SMEM((_WORKERS, _ROWS), jnp.float32)] if with_lse else []),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=_WORKERS + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="prefill_attention",
    )(q, k, v, k_pages, *others)
