"""Recorded attention as an XLA program, for backends without Triton."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.tiles import next_power_of_two

_BLOCK_Q, _BLOCK_K = 64, 256  # queries and slots per step


@functools.partial(jax.jit, static_argnames=("address", "heads", "scale", "own", "largest"))
def record_attention_xla(
    score, q, lse, k_pages, page_table, history, rows, starts, first, power, layer, *, address, heads, scale, own,
    largest,
):  # fmt: skip
    """Loops over segments, the blocks of slots that each holds, and its recorded queries."""
    address = address.join_layer(layer)
    tokens, _, dim = q.shape
    pages, page_size = k_pages.shape[:2]
    table_heads, columns = page_table.shape[2:]
    block_q = min(_BLOCK_Q, next_power_of_two(tokens))
    width = min(max(1, _BLOCK_K // page_size), columns)  # whole pages per step
    block = width * page_size
    q = (q.astype(jnp.float32) * (scale * LOG2_E)).reshape(tokens, heads, -1, dim)
    lse = (lse * LOG2_E).reshape(tokens, heads, -1)
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    table_head = head if table_heads > 1 else head[:1]

    def record_segment(segment, score):
        row, start, end = rows[segment], starts[segment], starts[segment + 1]
        begin = jnp.maximum(first[segment], start)
        queries = jnp.where(power[segment] > 0, end - begin, 0)
        held = jnp.broadcast_to(history[address.table_layer, row], (heads,))
        length = jnp.where(queries > 0, held + (end - start if own else 0), 0)  # [H]

        def record_block(step, score):
            column = step * width + jnp.arange(width, dtype=jnp.int32)
            entry = page_table[address.table_layer, row, table_head, jnp.minimum(column, columns - 1)]
            page = jnp.broadcast_to(address.page(entry, head), (heads, width))
            keys = k_pages[page].reshape(heads, block, dim).astype(jnp.float32)
            slot = step * block + jnp.arange(block, dtype=jnp.int32)

            def add_queries(tile, mass):
                token = begin + tile * block_q + jnp.arange(block_q, dtype=jnp.int32)
                at = jnp.minimum(token, tokens - 1)
                logits = jnp.einsum("qhgd,hnd->qhgn", q[at], keys, precision="highest") - lse[at][..., None]
                seen = jnp.where((token < end)[:, None], held + (token[:, None] - start + 1 if own else 0), 0)  # [q, H]
                live = (slot < seen[..., None])[:, :, None]  # [q, H, 1, n]
                if largest:
                    return jnp.maximum(mass, jnp.where(live, jnp.exp2(logits), 0.0).max(axis=(0, 2)))
                return mass + jnp.where(live, jnp.exp2(logits * power[segment]), 0.0).sum(axis=(0, 2))

            mass = jnp.zeros((heads, block), jnp.float32)
            mass = jax.lax.fori_loop(0, -(-queries // block_q), add_queries, mass)
            page = jnp.where(slot < length[:, None], jnp.repeat(page, page_size, axis=1), pages)
            at = score.at[page, jnp.broadcast_to(slot % page_size, page.shape)]
            return at.max(mass, mode="drop") if largest else at.add(mass, mode="drop")

        return jax.lax.fori_loop(0, -(-length.max() // block), record_block, score)

    return jax.lax.fori_loop(0, rows.shape[0], record_segment, score)
