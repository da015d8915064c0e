"""Merging the partial results of a work list (`decode_work`): one output a query head, by log-sum-exp."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.decode_work import WorkList
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.tiles import WHOLE, index_grid, load_of_layer, next_power_of_two, vector_mask

_BLOCKS = (4, 64)  # items per step: as many as a head has at most, within these bounds
_TILE = 2048  # most elements of a step: more do not fit the registers
_MANY_HEADS = 264  # KV heads that fill a GPU: two programs on each of an H200's 132 multiprocessors


def _merge_kernel(
    out_ref, lse_ref, layer_ref, first_item_ref, parts_ref, _, __, merged_ref, merged_lse_ref, *, heads, block, members,
    width,
):  # fmt: skip
    """Some query heads of a KV head: the mean of its items' outputs, weighted by exponentials of their log-sum-exps.

    A program does some of the elements. Heads of one item are left as they are.
    """
    head_row, first_member, chunk = pl.program_id(0), pl.program_id(1) * members, pl.program_id(2)
    layer = 0 if first_item_ref.shape[0] == 1 else layer_ref[0]
    first_item, parts = (load_of_layer(ref, layer, head_row) for ref in (first_item_ref, parts_ref))
    group, dim = out_ref.shape[1:]
    column = chunk * width + jnp.arange(width, dtype=jnp.int32)

    def merge(member):
        def visit(step, state):
            part = step * block + jnp.arange(block, dtype=jnp.int32)
            live = part < parts
            item = jnp.where(live, first_item + part, 0)
            lse = plgpu.load(
                lse_ref.at[item, jnp.broadcast_to(member, item.shape)], mask=live, other=online_softmax.EMPTY_LSE
            )
            items, columns = index_grid(item, column)
            mask = vector_mask(live, columns, dim)
            out = plgpu.load(out_ref.at[items, jnp.broadcast_to(member, items.shape), columns], mask=mask, other=0.0)
            # An item whose indices were all dead has nothing to add.
            live &= lse > online_softmax.EMPTY_LSE / 2
            return online_softmax.absorb(
                state,
                lse[None],
                live[None],
                lambda weights: (weights.reshape(-1, 1) * out).sum(axis=0)[None],
                scale=LOG2_E,
            )

        state = online_softmax.start((1,), column.shape[0])
        state = jax.lax.fori_loop(0, pl.cdiv(parts, block), visit, state)
        out, lse = online_softmax.finish(state)
        b, head = head_row // heads, head_row % heads * group + member
        at = (jnp.broadcast_to(b, column.shape), jnp.broadcast_to(head, column.shape), column)
        plgpu.store(merged_ref.at[at], out.reshape(-1).astype(merged_ref.dtype), mask=column < dim)

        @pl.when(chunk == 0)
        def _():
            merged_lse_ref[b, head] = lse.max()  # its only element

    @pl.when(parts != 1)
    def _():
        for member in range(members):
            merge(first_member + member)


def merge_items(
    out: jax.Array,
    lse: jax.Array,
    layer: jax.Array,
    work: WorkList,
    *,
    heads: int,
    whole: tuple[jax.Array, jax.Array],
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, Hq, D], lse f32[B, Hq]) from those of the items, f32[items, G, D] and f32[items, G].

    Args:
      layer: what `PageAddress.split_layer` gave; its table layer picks the work list.
      heads: H; the items are those of B * H (request, KV head) pairs.
      whole: (out, lse) of the result, written in place, that hold the heads of one item already.
    """
    items, group, dim = out.shape
    batch = work.parts.shape[1] // heads
    parts = next_power_of_two(-(-items // (batch * heads)))
    block = min(max(parts, _BLOCKS[0]), _BLOCKS[1])
    # Where there are many heads of few items most are one: fewer programs then, which find that there is nothing to do.
    members = group if batch * heads >= _MANY_HEADS and parts <= _BLOCKS[0] else 1
    width = min(next_power_of_two(dim), _TILE // block)
    inputs = (out, lse, layer, work.first_item, work.parts, *whole)
    return pl.pallas_call(
        functools.partial(_merge_kernel, heads=heads, block=block, members=members, width=width),
        grid=(batch * heads, group // members, pl.cdiv(dim, width)),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE, WHOLE],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in whole],
        input_output_aliases={5: 0, 6: 1},
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // 16), num_stages=1),
        interpret=interpret,
        name="decode_attention_merge",
    )(*inputs)
