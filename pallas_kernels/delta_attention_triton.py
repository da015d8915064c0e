"""Attention over tokens that are read back in registers, as Pallas-Triton kernels.

1. Logits: a program reads a block of keys of one KV head back and multiplies them with the queries.
2. Sums: over a part of the tokens, with the softmax of the part: of the values' references for one KV head, and of the
   latents for all query heads at once, which so are read once rather than once a head.
3. Merge and projection: the parts' sums are merged by log-sum-exp, and the sum of the latents is projected.

Between them lie logits and sums; keys and values are never written. One kernel for the first two holds twice the
registers, and reads the latents for every head twice: 277 us instead of 202 for 8 x 2,320 tokens of Llama-8B's heads on
an H200. There the logits read from the L2 cache at its rate, so rotations are read in half precision: 183 us, with sums
of latents over longer parts where there are programs enough, and more programs to merge and project them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.delta_tiles import (
    Columns,
    TokenTile,
    add_bias,
    chunk_count,
    chunk_width,
    head_columns,
    latent_chunk,
    load_grid,
    load_references,
    load_tile,
    mean,
    padded_columns,
    rotate_halves,
    store_refs,
    up_products,
)
from pallas_kernels.dispatch import targets_hopper
from pallas_kernels.online_softmax import LN_2, LOG2_E
from pallas_kernels.tiles import MIN_DOT_ROWS, WHOLE, exact_dot, index_grid, kernel_exp2, next_power_of_two

_CHUNK = 128  # numbers of a latent that one weighted sum takes
_VALUE_CHUNK = 128  # and of the values' references
_PROJECTED = 32  # numbers of a head's output that a program projects
_FEW_PROGRAMS = 264  # two on each of an H200's 132 multiprocessors
_MOST_PARTS = 64  # whose sums are kept, and merged at once
_MOST_STEPS = 4  # of a part, where shorter parts would do, too
_AHEAD_BYTES = 64 * 1024  # most references of a step that are fetched while the one before is summed, on Hopper


class DeltaTile(NamedTuple):
    """Sizes of the kernels' programs, and how Triton compiles them.

    Attributes:
      block: tokens of a program of the logits.
      num_warps, num_stages: of these programs.
      sum_block: tokens of a step of a program of the sums.
      sum_warps: of these programs.
    """

    block: int
    num_warps: int
    num_stages: int
    sum_block: int
    sum_warps: int


# By bytes per element of the near pool.
_TILES = {2: DeltaTile(64, 4, 3, 64, 4), 4: DeltaTile(16, 8, 1, 16, 8)}


def default_tile(k_pages: jax.Array) -> DeltaTile:
    """The tile for a near pool."""
    return _TILES[k_pages.dtype.itemsize]


def _padded(rows: int) -> int:
    """Rows of a tile of queries."""
    return max(MIN_DOT_ROWS, next_power_of_two(rows))


def _fold(programs: int, enough: int, most: int) -> int:
    """How many times the work of one a program can take, a power of two, so that `enough` programs are left."""
    return max(1, min(most, next_power_of_two(programs // enough + 1) // 2))


def _value_piece(head, heads: int, dim: int, piece, width: int) -> tuple[Columns, Columns]:
    """The columns of a piece of a KV head's values: in the head, and in the signal concat(K, V)."""
    number = piece * width + jnp.arange(width, dtype=jnp.int32)
    own = Columns(number, None if dim % width == 0 else number < dim)
    return own, own._replace(number=(heads + head) * dim + number)


def _logits_kernel(*refs, head_rows, heads, group, block, plain, biased):
    """Unscaled logits of the queries of one KV head and `block` tokens; dead blocks are not written.

    The last `plain` tokens, which have no latent, begin a block of their own.
    """
    store, refs = store_refs(refs, quantised=False)
    q_ref, cos_ref, sin_ref, up_ref, *refs = refs
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    (logit_ref,) = refs
    head, index, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dtype, dim = store.k.dtype, q_ref.shape[2]
    half, width = dim // 2, logit_ref.shape[2]
    columns, halves = head_columns(head, heads, dim), padded_columns(half)

    def visit(place, inside, keys_of):
        tokens = load_tile(store, b, place, inside, head * head_rows)

        @pl.when(tokens.live.astype(jnp.int32).max() > 0)
        def _():
            first, second = keys_of(tokens)
            cos, sin = (
                load_grid(ref, place, halves.number, tokens.live, halves.exists, at=(b,)) for ref in (cos_ref, sin_ref)
            )
            k_halves = [k.astype(dtype).T for k in rotate_halves(first, second, cos, sin)]
            member = jnp.arange(_padded(group), dtype=jnp.int32)
            row, real = head * group + member, member < group
            q_halves = [
                load_grid(q_ref, row, halves.number + start, real, halves.exists, at=(b,)) for start in (0, half)
            ]
            logits = exact_dot(q_halves[0], k_halves[0]) + exact_dot(q_halves[1], k_halves[1])
            rows, places = index_grid(row, place)
            plgpu.store(logit_ref.at[b, rows, places], logits, mask=real[:, None] & inside[None, :])

    def references(tokens: TokenTile, near):
        """Those of both halves of the keys."""
        return [
            load_references(store.k, near, tokens.live, halves.number + start, halves.exists) for start in (0, half)
        ]

    def plain_keys(tokens: TokenTile):
        # The mean of references that all are the token itself.
        return [mean(vectors) for vectors in references(tokens, tokens.near[:1])]

    def keys(tokens: TokenTile):
        # Fetched while the products run; the rotation would take too many registers for that.
        fetched = references(tokens, tokens.near)
        deltas = up_products(store, up_ref, tokens, (columns.first, columns.second), dtype)
        return [
            add_bias(bias_ref, delta, tokens.compressed, at) + mean(vectors)
            for delta, at, vectors in zip(deltas, (columns.first, columns.second), fetched, strict=True)
        ]

    number = jnp.arange(block, dtype=jnp.int32)
    blocks = pl.cdiv(width - plain, block)

    @pl.when(index < blocks)
    def _():
        place = index * block + number
        visit(place, place < width - plain, keys)

    @pl.when(index >= blocks)
    def _():
        place = width - plain + (index - blocks) * block + number
        visit(place, place < width, plain_keys)


def _sums_kernel(*refs, head_rows, heads, group, scale, block, steps, latent_steps, biased, exp2):
    """Softmax-weighted sums over a part, some blocks of tokens: of one head's references of values, or of latents.

    There is a program for each piece of each KV head, and behind them one for each chunk of the latents, which serves
    all queries. A part is `steps` blocks for the former and `latent_steps` for the latter.
    """
    store, refs = store_refs(refs, quantised=False)
    logit_ref, *refs = refs
    bias_ref, refs = (refs[0], refs[1:]) if biased else (None, refs)
    base_ref, latent_ref, lse_ref, latent_lse_ref = refs
    part, unit, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dtype, dim, width = store.v.dtype, base_ref.shape[3], logit_ref.shape[2]
    pieces, own_width = chunk_count(dim, _VALUE_CHUNK), chunk_width(dim, _VALUE_CHUNK)
    head, piece = unit // pieces, unit % pieces
    is_base = head < heads
    own_rows = jnp.where(is_base, head, 0) * head_rows

    def sums_of(row, real, columns: int, steps: int, weighted_sum):
        """(sums f32[n, columns], lse f32[n]) of the query heads `row` i32[n]."""

        def visit(step, state):
            place = (part * steps + step) * block + jnp.arange(block, dtype=jnp.int32)
            tokens = load_tile(store, b, place, place < width, own_rows)
            return online_softmax.absorb(
                state,
                # Of dead tokens, too, whatever these hold: so the load does not wait for those of the tile.
                load_grid(logit_ref, row, place, real, place < width, at=(b,)),
                real[:, None] & tokens.live[None, :],
                lambda weights: weighted_sum(weights.astype(dtype), tokens),
                scale=scale * LOG2_E,
                exp2=exp2,
            )

        state = online_softmax.start(row.shape, columns)
        state = visit(0, state) if steps == 1 else jax.lax.fori_loop(0, steps, visit, state)
        return online_softmax.finish(state)

    @pl.when(is_base)
    def _():
        member = jnp.arange(_padded(group), dtype=jnp.int32)
        row, real = head * group + member, member < group
        own, columns = _value_piece(head, heads, dim, piece, own_width)

        def weighted_sum(weights, tokens):
            values = mean(load_references(store.v, tokens.near, tokens.live, *own))
            return exact_dot(weights, add_bias(bias_ref, values, tokens.compressed, columns).astype(dtype))

        out, lse = sums_of(row, real, own_width, steps, weighted_sum)
        rows, numbers = index_grid(row, own.number)
        plgpu.store(base_ref.at[b, part, rows, numbers], out, mask=real[:, None] & (numbers < dim))
        at = jnp.broadcast_to(b, row.shape), row, jnp.broadcast_to(part, row.shape)
        plgpu.store(lse_ref.at[at], lse, mask=real & (piece == 0))

    @pl.when(jnp.logical_not(is_base) & (part < latent_ref.shape[1]))
    def _():
        chunk, columns = unit - heads * pieces, chunk_width(store.size, _CHUNK)
        row = jnp.arange(_padded(heads * group), dtype=jnp.int32)
        real = row < heads * group

        def weighted_sum(weights, tokens):
            return exact_dot(weights, latent_chunk(store, tokens, chunk, columns, dtype)[0])

        sums, lse = sums_of(row, real, columns, latent_steps, weighted_sum)
        rows, numbers = index_grid(row, chunk * columns + jnp.arange(columns, dtype=jnp.int32))
        mask = real[:, None] & (numbers < latent_ref.shape[3])
        plgpu.store(latent_ref.at[b, part, rows, numbers], sums, mask=mask)
        at = jnp.broadcast_to(b, row.shape), row, jnp.broadcast_to(part, row.shape)
        plgpu.store(latent_lse_ref.at[at], lse, mask=real & (chunk == 0))


def _merge_kernel(base_ref, latent_ref, lse_ref, latent_lse_ref, merged_base_ref, merged_ref, merged_lse_ref, *, exp2):
    """A chunk of the sums of one query head over all parts, weighted by the exponentials of the parts' log-sum-exps."""
    row, unit, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    base_chunks = chunk_count(base_ref.shape[3], _CHUNK)

    def merge(ref, parts_ref, out, chunk):
        size, parts = ref.shape[3], parts_ref.shape[2]
        part = jnp.arange(next_power_of_two(parts), dtype=jnp.int32)
        lse = plgpu.load(parts_ref.at[b, row, part], mask=part < parts, other=online_softmax.EMPTY_LSE)
        live = lse > online_softmax.EMPTY_LSE / 2
        top = lse.max()
        weight = jnp.where(live, exp2((lse - top) * LOG2_E), 0.0)
        total = jnp.maximum(weight.sum(), 1e-30)
        weight = weight / total
        width = chunk_width(size, _CHUNK)
        number = chunk * width + jnp.arange(width, dtype=jnp.int32)
        parts_at, numbers = index_grid(part, number)
        exists = number < size
        # Not only those of live parts, for which the loads would have to wait.
        mask = (part < parts)[:, None] & exists[None, :]
        sums = plgpu.load(ref.at[b, parts_at, jnp.broadcast_to(row, parts_at.shape), numbers], mask=mask, other=0.0)
        merged = jnp.where(live[:, None], weight[:, None] * sums, 0.0).sum(axis=0)
        plgpu.store(out.at[b, row, number], merged.astype(out.dtype), mask=exists)
        return jnp.where(top > online_softmax.EMPTY_LSE / 2, top + jnp.log2(total) * LN_2, top)

    @pl.when(unit < base_chunks)
    def _():
        merged_lse_ref[b, row] = merge(base_ref, lse_ref, merged_base_ref, unit)

    @pl.when(unit >= base_chunks)
    def _():
        merge(latent_ref, latent_lse_ref, merged_ref, unit - base_chunks)


def _project_kernel(base_ref, latent_ref, up_ref, out_ref, *, heads, group):
    """A piece of the output of the queries of one KV head: their latent, projected, and their references."""
    head, piece, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    dim, size = out_ref.shape[2], latent_ref.shape[2]
    member = jnp.arange(_padded(group), dtype=jnp.int32)
    row, real = head * group + member, member < group
    own, columns = _value_piece(head, heads, dim, piece, chunk_width(dim, _PROJECTED))
    width = chunk_width(size, 2 * _CHUNK)

    def visit(step, total):
        number = step * width + jnp.arange(width, dtype=jnp.int32)
        exists = None if size % width == 0 else number < size
        latents = load_grid(latent_ref, row, number, real, exists, at=(b,))
        return total + exact_dot(latents, load_grid(up_ref, number, columns.number, exists, columns.exists))

    out = load_grid(base_ref, row, own.number, real, own.exists, at=(b,))
    out = jax.lax.fori_loop(0, chunk_count(size, width), visit, out)
    rows, columns_at = index_grid(row, own.number)
    plgpu.store(out_ref.at[b, rows, columns_at], out.astype(out_ref.dtype), mask=real[:, None] & (columns_at < dim))


@functools.partial(jax.jit, static_argnames=("layout", "heads", "scale", "plain", "tile", "interpret"))
def delta_attention_triton(
    q, store, unpacked, places, cos, sin, up, up_bias, *, layout, heads, scale, plain, tile, interpret
):
    """(out [B, Hq, D], lse f32[B, Hq]). `unpacked` [B, V, d] are the latents of the tokens, if the pool holds codes."""
    if store.k_pages.dtype == jnp.bfloat16:
        # Every KV head reads them anew. Their error is at most an eighth of what rounds a rotated key.
        cos, sin = cos.astype(jnp.float16), sin.astype(jnp.float16)
    batch, q_heads, dim = q.shape
    near, latent = places
    group, size, width = q_heads // heads, store.latents.size, latent.shape[1]
    values = store.latents.values
    if unpacked is not None:
        values = unpacked
        latent = jnp.where(latent >= 0, jnp.arange(batch * width, dtype=jnp.int32).reshape(batch, width), -1)
    pools = [pool.reshape(-1, pool.shape[2]) for pool in (store.k_pages, store.v_pages, values)]
    inputs = [*pools, near, latent]
    bias = [] if up_bias is None else [up_bias]
    smallest = max(MIN_DOT_ROWS, next_power_of_two(width))
    block, sum_block = min(tile.block, smallest), min(tile.sum_block, smallest)
    blocks = pl.cdiv(width, sum_block)
    steps = next_power_of_two(pl.cdiv(blocks, _MOST_PARTS))
    value_pieces, value_width = chunk_count(dim, _VALUE_CHUNK), chunk_width(dim, _VALUE_CHUNK)
    ahead = near.shape[1] * sum_block * value_width * store.v_pages.dtype.itemsize
    fetch_ahead = (interpret or targets_hopper()) and ahead <= _AHEAD_BYTES
    if fetch_ahead:
        most = min(_MOST_STEPS, next_power_of_two(blocks))
        steps = max(steps, _fold(blocks * heads * value_pieces * batch, 2 * _FEW_PROGRAMS, most))
    parts = pl.cdiv(width, sum_block * steps)
    common = {
        "head_rows": layout.near.head_stride * store.k_pages.shape[1],
        "heads": heads,
        "group": group,
        "biased": up_bias is not None,
    }
    exp2 = kernel_exp2(interpret)
    real = jax.ShapeDtypeStruct

    def call(kernel, grid, out_shape, name, num_warps, num_stages, *inputs):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[WHOLE] * len(inputs),
            out_specs=jax.tree.map(lambda _: WHOLE, out_shape),
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
            name=name,
        )(*inputs)

    logits = call(
        # All heads of a block one after the other, so that tokens without a latent, which are last, fill the gaps.
        functools.partial(_logits_kernel, block=block, plain=plain, **common),
        (heads, pl.cdiv(width - plain, block) + pl.cdiv(plain, block), batch),
        real((batch, q_heads, width), jnp.float32),
        "delta_attention_logits",
        tile.num_warps,
        tile.num_stages,
        *(*inputs, q, cos, sin, up, *bias),
    )
    # Sums of latents are long: longer parts of them where there are programs enough, and where the others do so little
    # that all programs are to run at once.
    chunks = chunk_count(size, _CHUNK)
    more = max(_fold(parts * chunks * batch, _FEW_PROGRAMS, 8), min(parts, 2) if steps == 1 else 1)
    latent_parts = pl.cdiv(parts, more)
    *sums, lse, latent_lse = call(
        functools.partial(
            _sums_kernel, scale=scale, block=sum_block, steps=steps, latent_steps=steps * more, exp2=exp2, **common
        ),
        (parts, heads * value_pieces + chunks, batch),
        [
            real((batch, parts, q_heads, dim), jnp.float32),
            real((batch, latent_parts, q_heads, size), jnp.float32),
            real((batch, q_heads, parts), jnp.float32),
            real((batch, q_heads, latent_parts), jnp.float32),
        ],
        "delta_attention_sums",
        tile.sum_warps,
        3 if fetch_ahead else 1,
        *(*inputs, logits, *bias),
    )
    base, latents, lse = call(
        functools.partial(_merge_kernel, exp2=exp2),
        (q_heads, chunk_count(dim, _CHUNK) + chunks, batch),
        [
            real(q.shape, jnp.float32),
            real((batch, q_heads, size), q.dtype),
            real((batch, q_heads), jnp.float32),
        ],
        "delta_attention_merge",
        4,
        1,
        *(*sums, lse, latent_lse),
    )
    out = call(
        functools.partial(_project_kernel, heads=heads, group=group),
        (heads, chunk_count(dim, _PROJECTED), batch),
        real(q.shape, q.dtype),
        "delta_attention_project",
        4,
        3,
        *(base, latents, up),
    )
    return out, lse
