"""`select_top` as Pallas-Triton kernels: one program a row, or several kernels over the chunks of long rows.

Both find the k-th largest key as the largest number that at least k keys reach. Short rows stay in a program's
registers and are searched bit by bit. Long rows are cut into chunks: each pass compares every key of every chunk with
32 pivots, which settles five bits, and the next pass starts from the sum of the chunks' counts. Once exactly as many
keys as are wanted reach a pivot, passes only hand on what is known. The last counts then tell every chunk where in the
result its slots go.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles import WHOLE, index_grid, next_power_of_two

_LOWEST = np.int32(np.iinfo(np.int32).min)
_SHORT = 8192  # slots of a row that one program searches alone
_CHUNKS = (4096, 2048)  # slots of one: where there are many, or few
_FEW_CHUNKS = 66  # half of an H200's multiprocessors
_BLOCK = 1024  # slots of a chunk that are compared with the pivots at once
_PIVOTS = 32
# What a pass settles: the bits from here to the pass before, five at most; the last one has pivots at every number that
# is left, and beyond.
_SHIFTS = (27, 22, 17, 12, 7, 2, 0)
_PROBABILITY_SHIFTS = (25, 20, 15, 10, 5, 1, 0)  # of keys from 0 on and below 2**30, that of 2.0
# The keys of all numbers, NaN as one above infinity, and of probabilities. What lies outside is moved in: were it not,
# a search could end with more keys above its floor than are wanted, and these be written past the row.
_KEYS, _PROBABILITY_KEYS = (_LOWEST, np.int32(0x7F800001)), (np.int32(0), np.int32((1 << 30) - 1))
_CHUNKS_PER_STEP = 128  # whose counts are summed at once


def ordered_keys(scores: jax.Array) -> jax.Array:
    """i32 numbers in the order of the floats, denormal ones included; -0.0 equals 0.0."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == _LOWEST, 0, bits)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _load_keys(scores_ref, row, slot, first, last, bounds):
    """(keys within bounds, live) of the slots i32[n]; keys that are not live are the lowest."""
    live = (slot >= first) & (slot < last)
    scores = plgpu.load(scores_ref.at[jnp.broadcast_to(row, slot.shape), slot], mask=live, other=0.0)
    return jnp.where(live, jnp.clip(ordered_keys(scores), *bounds), _LOWEST), live


def _emit(out_ref, row, slot, keys, live, floor, *, wanted, equal_wanted, equal_before, place_before):
    """Writes the chosen of the slots: keys above `floor`, and of those that equal it the first `equal_wanted`.

    Args:
      equal_before: slots before these whose key equals the floor.
      place_before: slots before these that are chosen.
    """
    above, equal = live & (keys > floor), live & (keys == floor)
    equals = equal_before + jnp.cumsum(equal.astype(jnp.int32))
    chosen = above | (equal & (equals <= equal_wanted))
    place = place_before + jnp.cumsum(chosen.astype(jnp.int32)) - 1
    # Masked lanes point behind the row: interpreted, they would otherwise undo what a live lane writes.
    place = jnp.where(chosen, place, out_ref.shape[1] + slot)
    plgpu.store(out_ref.at[jnp.broadcast_to(row, slot.shape), place], slot, mask=chosen)
    _fill(out_ref, row, slot, wanted)


def _fill(out_ref, row, place, wanted):
    """Writes -1 to those of the places of the result that no slot is chosen for."""
    size = out_ref.shape[1]
    empty = (place >= wanted) & (place < size)
    at = jnp.where(empty, place, size + place)
    plgpu.store(out_ref.at[jnp.broadcast_to(row, place.shape), at], jnp.full_like(place, -1), mask=empty)


def _row_kernel(scores_ref, first_ref, last_ref, wanted_ref, out_ref, *, block):
    """One row, all of it in registers."""
    row = pl.program_id(0)
    wanted = wanted_ref[row]
    slot = jnp.arange(block, dtype=jnp.int32)
    keys, live = _load_keys(scores_ref, row, slot, first_ref[row], last_ref[row], _KEYS)

    def settle(step, floor):
        trial = floor + jnp.left_shift(jnp.int32(1), 31 - step)  # from the lowest number on, wrapping at the first bit
        return jnp.where((live & (keys >= trial)).astype(jnp.int32).sum() >= wanted, trial, floor)

    floor = jax.lax.fori_loop(0, 32, settle, _LOWEST)
    above = (live & (keys > floor)).astype(jnp.int32).sum()
    _emit(
        out_ref, row, slot, keys, live, floor, wanted=wanted, equal_wanted=wanted - above, equal_before=0,
        place_before=0,
    )  # fmt: skip


def _count(counts_ref, row, start, stop, until=None):
    """i32[32]: the sum of the counts of the chunks start .. stop-1; and of those before `until`, if that is given."""
    pivot = jnp.arange(_PIVOTS, dtype=jnp.int32)

    def add(step, sums):
        chunk = start + step * _CHUNKS_PER_STEP + jnp.arange(_CHUNKS_PER_STEP, dtype=jnp.int32)
        chunks, pivots = index_grid(chunk, pivot)
        counts = plgpu.load(
            counts_ref.at[jnp.broadcast_to(row, chunks.shape), chunks, pivots], mask=chunks < stop, other=0
        )
        shares = (counts,) if until is None else (counts, jnp.where(chunks < until, counts, 0))
        return tuple(total + share.sum(axis=0) for total, share in zip(sums, shares, strict=True))

    steps = pl.cdiv(jnp.maximum(stop - start, 0), _CHUNKS_PER_STEP)
    zeros = jnp.zeros(_PIVOTS, jnp.int32)
    sums = jax.lax.fori_loop(0, steps, add, (zeros,) if until is None else (zeros, zeros))
    return sums[0] if until is None else sums


def _reached(totals, wanted):
    """The last pivot that at least `wanted` keys reach; they all reach the first."""
    pivot = jnp.arange(_PIVOTS, dtype=jnp.int32)
    return ((pivot > 0) & (totals >= wanted)).astype(jnp.int32).sum()


def _at(counts, index):
    """The count of one pivot."""
    return jnp.where(jnp.arange(_PIVOTS, dtype=jnp.int32) == index, counts, 0).sum()


def _search_kernel(
    scores_ref, first_ref, last_ref, wanted_ref, shift_ref, state_ref, counts_ref, next_state_ref, next_counts_ref, *,
    size, bounds,
):  # fmt: skip
    """One chunk of `size` slots: how many of its keys reach each pivot floor + (j << shift), j = 0 .. 31.

    The floor follows from the pass before: its floor, its shift and the counts of all chunks. `shift_ref` holds that
    shift and the new one, the state of a row its floor and whether just the wanted keys reach it. From then on a chunk
    has one count, that of the first pivot.
    """
    row, chunk = pl.program_id(0), pl.program_id(1)
    first, last, wanted = first_ref[row], last_ref[row], wanted_ref[row]
    floor_before, was_settled = state_ref[row, 0], state_ref[row, 1] > 0
    start, stop = first // size, pl.cdiv(last, size)
    searched = ((chunk >= start) & (chunk < stop)) | (chunk == 0)
    pivot = jnp.arange(_PIVOTS, dtype=jnp.int32)
    at = jnp.broadcast_to(row, pivot.shape), jnp.broadcast_to(chunk, pivot.shape), pivot

    def hand_on(floor, is_settled):
        @pl.when(chunk == 0)
        def _():
            next_state_ref[row, 0] = floor
            next_state_ref[row, 1] = is_settled.astype(jnp.int32)

    @pl.when(searched & was_settled)
    def _():
        hand_on(floor_before, was_settled)
        plgpu.store(next_counts_ref.at[at], plgpu.load(counts_ref.at[at]))

    @pl.when(searched & ~was_settled)
    def _():
        # All is fetched before anything is waited for: beside products, a fetch takes microseconds. Keys that are not
        # live are below every number's, so none of them reaches a pivot that matters.
        slot = chunk * size + jnp.arange(_BLOCK, dtype=jnp.int32)
        blocks = [_load_keys(scores_ref, row, slot + block, first, last, bounds)[0] for block in range(0, size, _BLOCK)]
        counts_before = plgpu.load(counts_ref.at[at])
        totals = _count(counts_ref, row, start, stop)
        reached = _reached(totals, wanted)
        floor = floor_before + jnp.left_shift(reached, shift_ref[0])
        # Not at the lowest number, below which there is none.
        is_settled = (floor > _LOWEST) & (_at(totals, reached) == wanted)
        hand_on(floor, is_settled)

        @pl.when(is_settled)
        def _():
            plgpu.store(next_counts_ref.at[at], jnp.where(pivot == 0, _at(counts_before, reached), 0))

        @pl.when(~is_settled)
        def _():
            bound = floor + jnp.left_shift(pivot, shift_ref[1])
            # Summed over the threads once, behind all blocks.
            counts = jnp.zeros((_PIVOTS, _BLOCK), jnp.int32)
            for keys in blocks:
                counts += (keys[None, :] >= bound[:, None]).astype(jnp.int32)
            plgpu.store(next_counts_ref.at[at], counts.sum(axis=1))


def _emit_kernel(scores_ref, first_ref, last_ref, wanted_ref, state_ref, counts_ref, out_ref, *, size, bounds):
    """One chunk of `size` slots: writes its chosen slots, and its share of what stays empty."""
    row, chunk = pl.program_id(0), pl.program_id(1)
    first, last, wanted = first_ref[row], last_ref[row], wanted_ref[row]
    start, stop = first // size, pl.cdiv(last, size)
    slot = chunk * size + jnp.arange(size, dtype=jnp.int32)
    has_chosen = (chunk >= start) & (chunk < stop) & (wanted > 0)

    @pl.when(has_chosen)
    def _():
        keys, live = _load_keys(scores_ref, row, slot, first, last, bounds)  # before the counts are waited for
        totals, before = _count(counts_ref, row, start, stop, chunk)
        # Where just the wanted keys reach the floor, they are those above the number below it, and none equals that.
        below = (state_ref[row, 1] > 0).astype(jnp.int32)
        reached = _reached(totals, wanted)
        above, above_before = _at(totals, reached + 1 - below), _at(before, reached + 1 - below)
        equal_before = jnp.where(below > 0, 0, _at(before, reached) - above_before)
        equal_wanted = wanted - above
        _emit(
            out_ref, row, slot, keys, live, state_ref[row, 0] + reached - below, wanted=wanted,
            equal_wanted=equal_wanted, equal_before=equal_before,
            place_before=above_before + jnp.minimum(equal_before, equal_wanted),
        )  # fmt: skip

    @pl.when(~has_chosen)
    def _():
        _fill(out_ref, row, slot, wanted)


@functools.partial(jax.jit, static_argnames=("k", "probabilities", "interpret"))
def select_top_triton(scores, first, last, wanted, *, k, probabilities, interpret):
    """i32[N, k]; wanted: i32[N] slots to take, at most k and what there is."""
    rows, size = scores.shape
    params = functools.partial(plgpu.CompilerParams, num_stages=1)
    out_shape = jax.ShapeDtypeStruct((rows, k), jnp.int32)
    if size <= _SHORT:
        block = max(next_power_of_two(size), 128)
        return pl.pallas_call(
            functools.partial(_row_kernel, block=block),
            grid=(rows,),
            in_specs=[WHOLE] * 4,
            out_specs=WHOLE,
            out_shape=out_shape,
            compiler_params=params(num_warps=min(16, max(4, block // 512))),
            interpret=interpret,
            name="select_top_row",
        )(scores, first, last, wanted)
    many, few = _CHUNKS
    chunk = few if rows * pl.cdiv(size, many) <= _FEW_CHUNKS else many
    chunks = pl.cdiv(size, chunk)
    bounds, shifts = (_PROBABILITY_KEYS, _PROBABILITY_SHIFTS) if probabilities else (_KEYS, _SHIFTS)
    state = jnp.stack([jnp.full(rows, bounds[0], jnp.int32), jnp.zeros(rows, jnp.int32)], axis=1)
    counts = jnp.zeros((rows, chunks, _PIVOTS), jnp.int32)
    # The shifts are data, so that one compiled kernel serves all passes.
    for before, shift in zip((0, *shifts), shifts, strict=False):
        state, counts = pl.pallas_call(
            functools.partial(_search_kernel, size=chunk, bounds=bounds),
            grid=(rows, chunks),
            in_specs=[WHOLE] * 7,
            out_specs=[WHOLE] * 2,
            out_shape=[
                jax.ShapeDtypeStruct(state.shape, jnp.int32),
                jax.ShapeDtypeStruct(counts.shape, jnp.int32),
            ],
            compiler_params=params(num_warps=8),
            interpret=interpret,
            name="select_top_search",
        )(scores, first, last, wanted, jnp.array([before, shift, 0], jnp.int32), state, counts)
    return pl.pallas_call(
        functools.partial(_emit_kernel, size=chunk, bounds=bounds),
        grid=(rows, chunks),
        in_specs=[WHOLE] * 6,
        out_specs=WHOLE,
        out_shape=out_shape,
        compiler_params=params(num_warps=8),
        interpret=interpret,
        name="select_top_emit",
    )(scores, first, last, wanted, state, counts)
