"""Merging the partial results of a work list (`decode_work`): one output a query head, by log-sum-exp.

Where heads fill the GPU, whichever program ends the last item of a head merges them all (`merge_parts`), while others
still read: that is sooner than another kernel could start. Few heads have many items each, which a kernel of many
programs merges sooner (`merge_items`). Either adds up the items of a head in their order, whichever ended first:
results do not differ from call to call.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.decode_work import WorkList
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.tiles import WHOLE, load_of_layer, next_power_of_two

_BLOCKS = (4, 64)  # items per step: as many as a head has at most, within these bounds
_TILE = 2048  # most elements of a step of the kernel: more do not fit the registers
_TILE_AT_THE_END = 4096  # of a program that has read an item, and has larger tiles already
_MANY_HEADS = 256  # KV heads that fill a GPU: about two programs on each of an H200's 132 multiprocessors


def ends_merge(num_heads: int) -> bool:
    """Whether the items of `num_heads` (request, KV head) pairs are merged by the programs that end them."""
    return num_heads >= _MANY_HEADS


def is_last_end(ends_ref, head_row: jax.Array, parts: jax.Array, *, interpreted: bool) -> jax.Array:
    """Counts the end of an item: whether it is the last of its head.

    The count releases what this program has written, and acquires what the other items' programs have.

    Args:
      ends_ref: i32[B*H], how many items of each head have ended; 0 at first.
      head_row, parts: i32[] the head, and its items.
    """
    if not interpreted:
        plgpu.debug_barrier()  # the count speaks for all threads of this program
    one = jnp.ones((), jnp.int32)  # the interpreter takes no Python int
    return plgpu.atomic_add(ends_ref, (head_row,), one) == parts - 1


def merge_parts(
    out_ref, lse_ref, first_item: jax.Array, parts: jax.Array, member: jax.Array, column: jax.Array, *, block: int
) -> tuple[jax.Array, jax.Array]:
    """(out f32[m, n], lse f32[m]) of some query heads of a KV head, inside a kernel.

    Args:
      out_ref, lse_ref: f32[items, G, D] and f32[items, G] of the items.
      first_item, parts: i32[] where those of the head begin, and how many there are.
      member: i32[m] query heads of the group; there may be some behind it.
      column: i32[n] components; there may be some behind D.
      block: items per step.
    """
    group, dim = out_ref.shape[1:]
    shape = (*member.shape, block, *column.shape)

    def visit(step, state):
        part = step * block + jnp.arange(block, dtype=jnp.int32)
        live = jnp.broadcast_to((member < group)[:, None] & (part < parts)[None], shape[:2])
        item = jnp.broadcast_to(jnp.where(part < parts, first_item + part, 0)[None], shape[:2])
        members = jnp.broadcast_to(member[:, None], shape[:2])
        lse = plgpu.load(lse_ref.at[item, members], mask=live, other=online_softmax.EMPTY_LSE)
        at = (*(jnp.broadcast_to(x[..., None], shape) for x in (item, members)), jnp.broadcast_to(column, shape))
        exists = jnp.broadcast_to(live[..., None], shape) & (at[2] < dim)
        out = plgpu.load(out_ref.at[at], mask=exists, other=0.0)
        # An item whose indices were all dead has nothing to add.
        return online_softmax.absorb(
            state,
            lse,
            live & (lse > online_softmax.EMPTY_LSE / 2),
            lambda weights: (weights[..., None] * out).sum(axis=1),
            scale=LOG2_E,
        )

    state = online_softmax.start(member.shape, column.shape[0])
    return online_softmax.finish(jax.lax.fori_loop(0, pl.cdiv(parts, block), visit, state))


def merge_at_the_end(out_ref, lse_ref, first_item: jax.Array, parts: jax.Array, *, num_heads: int):
    """(out f32[members, padded D], lse f32[members]) of one of `num_heads` KV heads; arguments as `merge_parts`."""
    items, group, dim = out_ref.shape
    member, column = (jnp.arange(next_power_of_two(size), dtype=jnp.int32) for size in (group, dim))
    block = min(_usual_parts(items, num_heads), max(_TILE_AT_THE_END // (member.shape[0] * column.shape[0]), 1))
    return merge_parts(out_ref, lse_ref, first_item, parts, member, column, block=block)


def _usual_parts(items: int, num_heads: int) -> int:
    """Items of a head to read at once: its share of those that there can be, within bounds."""
    return min(max(next_power_of_two(-(-items // num_heads)), _BLOCKS[0]), _BLOCKS[1])


def _merge_kernel(
    out_ref, lse_ref, layer_ref, first_item_ref, parts_ref, _, __, merged_ref, merged_lse_ref, *, heads, block, width
):
    """Some elements of a query head. KV heads of one item are left as they are."""
    head_row, member, chunk = (pl.program_id(axis) for axis in range(3))
    layer = 0 if first_item_ref.shape[0] == 1 else layer_ref[0]
    first_item, parts = (load_of_layer(ref, layer, head_row) for ref in (first_item_ref, parts_ref))
    group, dim = out_ref.shape[1:]
    column = chunk * width + jnp.arange(width, dtype=jnp.int32)

    @pl.when(parts != 1)
    def _():
        out, lse = merge_parts(
            out_ref, lse_ref, first_item, parts, member + jnp.zeros(1, jnp.int32), column, block=block
        )
        b, head = head_row // heads, head_row % heads * group + member
        at = (jnp.broadcast_to(b, column.shape), jnp.broadcast_to(head, column.shape), column)
        plgpu.store(merged_ref.at[at], out.reshape(-1).astype(merged_ref.dtype), mask=column < dim)

        @pl.when(chunk == 0)
        def _():
            merged_lse_ref[b, head] = lse.max()  # its only element


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
    num_heads = work.parts.shape[1]
    block = _usual_parts(items, num_heads)
    width = min(next_power_of_two(dim), _TILE // block)
    inputs = (out, lse, layer, work.first_item, work.parts, *whole)
    return pl.pallas_call(
        functools.partial(_merge_kernel, heads=heads, block=block, width=width),
        grid=(num_heads, group, pl.cdiv(dim, width)),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE, WHOLE],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in whole],
        input_output_aliases={5: 0, 6: 1},
        compiler_params=plgpu.CompilerParams(num_warps=max(1, block // 16), num_stages=1),
        interpret=interpret,
        name="decode_attention_merge",
    )(*inputs)
