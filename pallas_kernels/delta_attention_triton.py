"""Attention over tokens that are read back in registers, as a Pallas-Triton kernel over the spans of the work list."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.delta_places import find_places
from pallas_kernels.delta_tiles import (
    chunks_of,
    head_columns,
    latent_chunk,
    load_references,
    load_tile,
    load_up,
    mean,
    rotate_halves,
    store_arrays,
    store_refs,
    up_products,
)
from pallas_kernels.merge_items import merge_items
from pallas_kernels.online_softmax import LOG2_E, SoftmaxState
from pallas_kernels.tiles import WHOLE, exact_dot, index_grid, kernel_exp2, next_power_of_two

_MIN_DOT_ROWS = 16  # the smallest tile of a tensor-core product
_CHUNK = 128  # numbers of a latent that one product or weighted sum takes


class DeltaTile(NamedTuple):
    """Tokens read per step of a program's loop, and how Triton compiles the program.

    Attributes:
      block: tokens of a step.
      resident: the columns of `up` that a head's keys need, d * D numbers, stay in shared memory for the whole span,
        and with two stages what a step reads is fetched while the one before computes. Otherwise every step reads them
        again.
      num_warps, num_stages: of the compiled program.
    """

    block: int
    resident: bool
    num_warps: int
    num_stages: int


# By bytes per element of the near pool.
_TILES = {2: DeltaTile(64, False, 8, 3), 4: DeltaTile(16, False, 8, 1)}


def default_tile(k_pages: jax.Array) -> DeltaTile:
    """The tile for a near pool."""
    return _TILES[k_pages.dtype.itemsize]


def _span_kernel(*refs, head_rows, heads, group, scale, tile, quantised, biased, exp2):
    """One item of the work list: its partial output [items, G, D] and log-sum-exp [items, G]."""
    store, refs = store_refs(refs, quantised=quantised)
    q_ref, position_ref, cos_ref, sin_ref, up_ref, *refs = refs
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    head_row_ref, first_ref, last_ref, out_ref, lse_ref = refs
    item = pl.program_id(0)
    dtype, dim = store.k.dtype, q_ref.shape[2]
    half = dim // 2
    first, last = first_ref[0, item], last_ref[0, item]

    @pl.when(first < last)
    def _():
        head_row = head_row_ref[0, item]
        b, head = head_row // heads, head_row % heads
        columns = head_columns(head, heads, dim)
        key_columns = (columns.first, columns.second)
        half_column = jnp.arange(columns.first[0].shape[0], dtype=jnp.int32)
        column = jnp.arange(columns.value[0].shape[0], dtype=jnp.int32)
        member = jnp.arange(max(_MIN_DOT_ROWS, next_power_of_two(group)), dtype=jnp.int32)
        members, halves = index_grid(member, half_column)
        real = (members < group) & (halves < half)
        q_first, q_second = (
            plgpu.load(q_ref.at[b, head * group + members, halves + start], mask=real, other=0.0) for start in (0, half)
        )

        def read_latents(tokens):
            return (latent_chunk(store, tokens, chunk, width, dtype)[0] for chunk in range(chunks))

        def load_columns(at):
            """Chunks of rows of some columns of `up`, as the latents come; each is loaded when it is asked for."""
            for chunk in range(chunks):
                number = chunk * width + jnp.arange(width, dtype=jnp.int32)
                yield load_up(up_ref, number, number < store.size, *at)

        def with_bias(vectors, compressed, columns):
            if bias_ref is None:
                return vectors
            bias = plgpu.load(bias_ref.at[columns[0]], mask=columns[1], other=0.0).astype(jnp.float32)
            return vectors + jnp.where(compressed[:, None], bias[None, :], 0.0)

        def visit(step, state):
            place = first + step * tile.block + jnp.arange(tile.block, dtype=jnp.int32)
            at_request = jnp.broadcast_to(b, place.shape)
            live = plgpu.load(position_ref.at[at_request, place], mask=place < last, other=-1) >= 0
            tokens = load_tile(store, b, place, live, head * head_rows)
            read = functools.partial(load_references, near=tokens.near, live=live)
            keys = [read(store.k, column=half_column + start, column_live=half_column < half) for start in (0, half)]
            places, halves = index_grid(place, half_column)
            in_half = live[:, None] & (halves < half)
            cos, sin = (plgpu.load(ref.at[b, places, halves], mask=in_half, other=0.0) for ref in (cos_ref, sin_ref))
            latents = list(read_latents(tokens)) if tile.resident else None
            if latents is None:
                deltas = up_products(store, up_ref, tokens, key_columns, dtype)
            else:
                deltas = [sum(map(exact_dot, latents, part)) for part in up_parts]
            values = read(store.v, column=column, column_live=column < dim)
            k_first, k_second = (
                with_bias(delta, tokens.compressed, at) + mean(vectors)
                for delta, at, vectors in zip(deltas, key_columns, keys, strict=True)
            )
            k_first, k_second = rotate_halves(k_first, k_second, cos, sin)
            logits = exact_dot(q_first, k_first.astype(dtype).T) + exact_dot(q_second, k_second.astype(dtype).T)
            base = with_bias(mean(values), tokens.compressed, columns.value).astype(dtype)

            def weighted_sums(weights):
                weights = weights.astype(dtype)
                held = latents or read_latents(tokens)
                return exact_dot(weights, base), tuple(exact_dot(weights, z) for z in held)

            return online_softmax.absorb(state, logits, live[None, :], weighted_sums, scale=scale * LOG2_E, exp2=exp2)

        chunks, width = chunks_of(store, _CHUNK)
        up_parts = [list(load_columns(at)) for at in key_columns] if tile.resident else []
        # Values are projected once, at the end: what is summed up are the references' and the latents.
        state = online_softmax.start(member.shape, column.shape[0])
        sums = tuple(jnp.zeros((member.shape[0], width), jnp.float32) for _ in range(chunks))
        state = SoftmaxState((state.values, sums), state.top, state.total)
        state = jax.lax.fori_loop(0, pl.cdiv(last - first, tile.block), visit, state)
        (out, sums), lse = online_softmax.finish(state)
        for total, up in zip(sums, load_columns(columns.value), strict=True):
            out += exact_dot(total.astype(dtype), up)
        members, columns_at = index_grid(member, column)
        mask = (members < group) & (columns_at < dim)
        plgpu.store(out_ref.at[item, members, columns_at], out, mask=mask)
        plgpu.store(lse_ref.at[item, member], lse, mask=member < group)


@functools.partial(jax.jit, static_argnames=("layout", "heads", "scale", "tile", "interpret"))
def delta_attention_triton(
    q, store, rows, recent_rows, history, positions, cos, sin, up, up_bias, work, near_layer, latent_layer, *, layout,
    heads, scale, tile, interpret,
):  # fmt: skip
    """(out [B, Hq, D], lse f32[B, Hq])."""
    group, dim = q.shape[1] // heads, q.shape[2]
    items = work.head_row.shape[1]
    everywhere = jnp.full_like(rows, jnp.iinfo(jnp.int32).max)  # the positions that are listed are all held
    places = find_places(
        store, rows, recent_rows, history, everywhere, positions, near_layer, latent_layer,
        tokens=positions.shape[1], layout=layout, interpret=interpret,
    )  # fmt: skip
    inputs = [*store_arrays(store, places), q, positions, cos, sin, up]
    inputs += [*([] if up_bias is None else [up_bias]), work.head_row, work.first, work.last]
    out, lse = pl.pallas_call(
        functools.partial(
            _span_kernel,
            head_rows=layout.near.head_stride * store.k_pages.shape[1],
            heads=heads,
            group=group,
            scale=scale,
            tile=tile,
            quantised=store.latents.scale is not None,
            biased=up_bias is not None,
            exp2=kernel_exp2(interpret),
        ),
        grid=(items,),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((items, group, dim), jnp.float32),
            jax.ShapeDtypeStruct((items, group), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="delta_attention_spans",
    )(*inputs)
    return merge_items(
        out, lse, near_layer, work, heads=heads, dtype=q.dtype, interpret=interpret, name="delta_attention_merge"
    )
