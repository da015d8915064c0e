"""Merging the partial results of a work list (`decode_work`): one output a query head, by log-sum-exp."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.decode_work import WorkList
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.tiles import WHOLE, index_grid, next_power_of_two, vector_mask

_BLOCKS = (4, 64)  # items per step: as many as a head has at most, within these bounds


def _merge_kernel(
    out_ref, lse_ref, layer_ref, first_ref, last_ref, first_span_ref, merged_ref, merged_lse_ref, *, heads, group, block
):
    """One query head: the mean of its items' outputs weighted by the exponentials of their log-sum-exps."""
    head_row, member = pl.program_id(0), pl.program_id(1)
    layer = layer_ref[0]
    first_span = first_span_ref[layer, head_row]
    spans = first_span_ref[layer, head_row + 1] - first_span
    rest = first_span_ref[layer, first_span_ref.shape[1] - 1] + head_row
    parts = spans + (first_ref[layer, rest] < last_ref[layer, rest]).astype(jnp.int32)
    dim = merged_ref.shape[2]
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)

    def visit(step, state):
        part = step * block + jnp.arange(block, dtype=jnp.int32)
        live = part < parts
        item = jnp.where(part < spans, first_span + part, rest)
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
    merged_lse_ref[b, head] = lse.max()  # its only element


def merge_items(
    out: jax.Array, lse: jax.Array, layer: jax.Array, work: WorkList, *, heads: int, dtype, interpret: bool, name: str
) -> tuple[jax.Array, jax.Array]:
    """(out dtype[B, Hq, D], lse f32[B, Hq]) from those of the items, f32[items, G, D] and f32[items, G].

    Args:
      layer: what `PageAddress.split_layer` gave; its table layer picks the work list.
      heads: H; the items are those of B * H (request, KV head) pairs.
      name: of the kernel.
    """
    items, group, dim = out.shape
    batch = (work.first_span.shape[1] - 1) // heads
    parts = next_power_of_two(-(-items // (batch * heads)))
    block = min(max(parts, _BLOCKS[0]), _BLOCKS[1])
    return pl.pallas_call(
        functools.partial(_merge_kernel, heads=heads, group=group, block=block),
        grid=(batch * heads, group),
        in_specs=[WHOLE] * 6,
        out_specs=[WHOLE, WHOLE],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads * group, dim), dtype),
            jax.ShapeDtypeStruct((batch, heads * group), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // 16), num_stages=1),
        interpret=interpret,
        name=name,
    )(out, lse, layer, work.first, work.last, work.first_span)
