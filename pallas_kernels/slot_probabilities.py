"""Decode attention that also says how much it attends to each slot, for whoever chooses what other layers read.

The probabilities are those of OmniKV's observation layers (Hao et al. 2025, ICLR): for every query head a
softmax over the candidates alone, in float32, then the largest over all query heads. K is read once: the spans of
decode attention leave their logits behind, and two small kernels normalise them and take the maximum.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.checks import (
    check_integer,
    check_pool,
    check_query,
    check_scale,
    check_shape,
    check_table,
    query_group,
)
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention_triton import default_tile
from pallas_kernels.decode_work import DecodeTile, WorkList, decode_work_list, limits_for
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.in_order import in_order_for_xla
from pallas_kernels.online_softmax import LOG2_E, absorb, finish, start
from pallas_kernels.paging import PageAddress
from pallas_kernels.slot_probabilities_triton import attend_keeping, kept_probabilities


def slot_probabilities(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    scale: float,
    work: WorkList | None = None,
    tile: DecodeTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends as `decode_attention` does, and ranks candidate slots by the attention they get.

    Args:
      q, k_pages, v_pages, page_table, lengths, rows, address, num_kv_heads, scale, work, tile: as `decode_attention`
        takes them.
      first, last: i32[B]; the candidates of request b are the logical slots first[b] .. last[b]-1, which all its KV
        heads must hold. None if first >= last.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      out [B, Hq, D] in q's dtype, over all slots; and f32[B, M * page]: of each candidate the largest probability that
      a query head gives it, where the candidates' probabilities add up to 1 in each head. What is no candidate may hold
      anything.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    out, rank = attend_then_rank(
        q, k_pages, v_pages, page_table, lengths, rows, first, last, address=address, num_kv_heads=num_kv_heads,
        scale=scale, work=work, tile=tile, implementation=implementation, interpret=interpret,
    )  # fmt: skip
    # Ranking reads keys again, and whoever waits for `out` may write them.
    return in_order_for_xla((out, rank()), implementation=implementation, interpret=interpret)


def attend_then_rank(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    address: PageAddress,
    num_kv_heads: int,
    scale: float,
    work: WorkList | None = None,
    tile: DecodeTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """`slot_probabilities` in two: the attention, and a function that computes the probabilities.

    So they can be left for later, or for `beside`, by who needs the attention first.
    """
    check_pool(k_pages, v_pages)
    check_query(q, None, k_pages.shape[2])
    check_scale(scale)
    check_table(page_table, lengths, "lengths", address, num_kv_heads)
    query_group(q.shape[1], num_kv_heads)
    for name, array in (("rows", rows), ("first", first), ("last", last)):
        check_shape(name, array, (q.shape[0],))
    check_integer(rows=rows, first=first, last=last)
    implementation, interpret = resolve(implementation, interpret)
    common, layer = address.split_layer()
    if q.shape[0] == 0:
        return q, lambda: jnp.zeros((0, page_table.shape[3] * k_pages.shape[1]), jnp.float32)
    if implementation == "xla":
        out = decode_attention(
            q, k_pages, v_pages, page_table, lengths, rows, address=address, num_kv_heads=num_kv_heads, scale=scale,
            implementation="xla",
        )  # fmt: skip
        return out, lambda: _probabilities_xla(
            q, k_pages, page_table, rows, first, last, layer, address=common, heads=num_kv_heads, scale=scale
        )
    tile = tile or default_tile(k_pages)
    if work is None:
        max_slots = page_table.shape[3] * k_pages.shape[1]
        work = decode_work_list(
            lengths, rows, num_kv_heads=num_kv_heads, max_slots=max_slots, limits=limits_for(tile.block)
        )
    options = {
        "address": common,
        "heads": num_kv_heads,
        "scale": scale,
        "tile": tile,
        "interpret": interpret,
    }
    query = q.astype(k_pages.dtype)
    out, kept, places = attend_keeping(
        query, k_pages, v_pages, page_table, lengths, rows, first, last, work, layer, **options
    )
    return out.astype(q.dtype), lambda: kept_probabilities(
        kept, places, query, k_pages, page_table, lengths, rows, first, last, layer, **options
    )


_BLOCK = 256  # slots read per step


@functools.partial(jax.jit, static_argnames=("address", "heads", "scale"))
def _probabilities_xla(q, k_pages, page_table, rows, first, last, layer, *, address, heads, scale):
    """Two loops over blocks of slots that end at the last candidate: one normalises, one takes the largest."""
    address = address.join_layer(layer)
    batch, _, dim = q.shape
    page_size = k_pages.shape[1]
    table_heads, columns = page_table.shape[2:]
    width = min(max(1, _BLOCK // page_size), columns)  # whole pages per step
    block = width * page_size
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    table_head = head if table_heads > 1 else 0
    q = (q.astype(jnp.float32) * (scale * LOG2_E)).reshape(batch, heads, -1, dim)

    def logits(step):
        """(base 2 f32[B, H, G, block], candidates bool[B, 1, 1, block])."""
        column = jnp.minimum(step * width + jnp.arange(width, dtype=jnp.int32), columns - 1)
        entry = page_table[address.table_layer, rows[:, None, None], table_head, column]
        k = k_pages[jnp.broadcast_to(address.page(entry, head), (batch, heads, width))]
        slot = step * block + jnp.arange(block, dtype=jnp.int32)
        live = (slot >= first[:, None]) & (slot < last[:, None])
        k = k.reshape(batch, heads, block, dim).astype(jnp.float32)
        return jnp.einsum("bhgd,bhnd->bhgn", q, k, precision="highest"), live[:, None, None]

    def normalise(step, state):
        scores, live = logits(step)
        return absorb(state, scores, live, lambda weights: jnp.zeros((*weights.shape[:-1], 0)))

    steps = -(-jnp.where(last > first, last, 0).max() // block)
    lse = finish(jax.lax.fori_loop(0, steps, normalise, start(q.shape[:3], 0)))[1][..., None] * LOG2_E

    def take_largest(step, out):
        scores, live = logits(step)
        most = jnp.where(live, jnp.exp2(scores - lse), 0.0).max(axis=(1, 2))
        return jax.lax.dynamic_update_slice(out, most, (0, step * block))

    size = -(-columns // width) * block
    out = jax.lax.fori_loop(0, steps, take_largest, jnp.zeros((batch, size), jnp.float32))
    return out[:, : columns * page_size]


def slot_probabilities_reference(
    q, k_pages, page_table, rows, first, last, *, address: PageAddress, num_kv_heads: int, scale: float
) -> jax.Array:
    """f32[B, M * page]: the probabilities of `slot_probabilities`, 0 where no candidate is. Its attention is
    `decode_attention`'s."""
    batch, _, dim = q.shape
    page_size = k_pages.shape[1]
    table = page_table[address.table_layer][rows]  # [B, Ht, M]
    table = jnp.broadcast_to(table, (batch, num_kv_heads, table.shape[2]))
    slot = jnp.arange(table.shape[2] * page_size)
    live = (slot >= first[:, None]) & (slot < last[:, None])  # [B, S]
    page = address.page(table[..., slot // page_size], jnp.arange(num_kv_heads)[:, None])
    k = jnp.where(live[:, None, :, None], k_pages[page, slot % page_size].astype(jnp.float32), 0.0)
    q = q.astype(jnp.float32).reshape(batch, num_kv_heads, -1, dim)
    with jax.default_matmul_precision("highest"):
        logits = jnp.einsum("bhgd,bhnd->bhgn", q, k) * scale
    live = live[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(live, logits, -jnp.inf), axis=-1)
    return jnp.where(live, probabilities, 0.0).max(axis=(1, 2))
