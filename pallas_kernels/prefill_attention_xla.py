"""Prefill attention as an XLA program, for backends without Triton."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import online_softmax
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.query_tiles import QueryTiles, query_tiles
from pallas_kernels.tiles import next_power_of_two

_BLOCK_Q, _BLOCK_K = 64, 256  # queries of a tile, keys per step


@functools.partial(jax.jit, static_argnames=("address", "scale"))
def prefill_attention_xla(q, k, v, k_pages, v_pages, page_table, history, rows, starts, layer, *, address, scale):
    """One query tile after the other; each loops over the blocks of keys that it really has."""
    address = address.join_layer(layer)
    tokens, q_heads, dim = q.shape
    heads, page_size = k.shape[1], k_pages.shape[1]
    group = q_heads // heads
    table_heads, columns = page_table.shape[2:]
    block_q = min(_BLOCK_Q, next_power_of_two(tokens))
    own_block = min(_BLOCK_K, next_power_of_two(tokens))
    width = min(max(1, _BLOCK_K // page_size), columns)  # whole pages per step
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    table_head = head if table_heads > 1 else head[:1]

    def attend(state, queries, keys, values, live):
        """queries [H, G*block_q, D], keys and values [H, n, D], live broadcastable to [H, G*block_q, n]."""
        scores = jnp.einsum("hmd,hnd->hmn", queries, keys.astype(jnp.float32), precision="highest")
        values = values.astype(jnp.float32)
        return online_softmax.absorb(
            state, scores, live, lambda weights: jnp.einsum("hmn,hnd->hmd", weights, values, precision="highest")
        )

    def one_tile(tile: QueryTiles):
        token = tile.first + jnp.arange(block_q, dtype=jnp.int32)
        queries = q[jnp.minimum(token, tokens - 1)].astype(jnp.float32) * (scale * LOG2_E)
        queries = queries.reshape(block_q, heads, group, dim).transpose(1, 2, 0, 3).reshape(heads, -1, dim)
        held = jnp.broadcast_to(history[address.table_layer, tile.row], (heads,))[:, None]  # [H, 1]
        held = jnp.where(tile.key_first < tile.last, held, 0)  # padding reads nothing

        def visit_history(step, state):
            column = step * width + jnp.arange(width, dtype=jnp.int32)
            entry = page_table[address.table_layer, tile.row, table_head, jnp.minimum(column, columns - 1)]
            page = address.page(entry, head)  # [H, width]
            keys, values = (pool[page].reshape(heads, -1, dim) for pool in (k_pages, v_pages))
            position = step * width * page_size + jnp.arange(width * page_size, dtype=jnp.int32)
            live = position < held  # [H, n]
            # Dead slots may hold anything, NaN included, and 0 * NaN is NaN.
            return attend(state, queries, keys, jnp.where(live[..., None], values, 0), live[:, None])

        def visit_own(step, state):
            key = tile.key_first + step * own_block + jnp.arange(own_block, dtype=jnp.int32)
            keys, values = (x[jnp.minimum(key, tokens - 1)].transpose(1, 0, 2) for x in (k, v))
            live = (key <= token[:, None]) & (key < tile.last)  # [block_q, n]
            values = jnp.where((key < tile.last)[:, None], values, 0)
            return attend(state, queries, keys, values, jnp.tile(live, (group, 1)))

        state = online_softmax.start((heads, group * block_q), dim)
        state = jax.lax.fori_loop(0, -(-held.max() // (width * page_size)), visit_history, state)
        own = jnp.minimum(tile.first + block_q, tile.last) - tile.key_first
        state = jax.lax.fori_loop(0, -(-own // own_block), visit_own, state)
        out, lse = online_softmax.finish(state)
        out = out.reshape(heads, group, block_q, dim).transpose(2, 0, 1, 3).reshape(block_q, q_heads, dim)
        lse = lse.reshape(heads, group, block_q).transpose(2, 0, 1).reshape(block_q, q_heads)
        return jnp.where(token < tile.last, token, tokens), out, lse

    token, out, lse = jax.lax.map(one_tile, query_tiles(rows, starts, tokens, block_q))
    return (
        jnp.zeros((tokens, q_heads, dim), jnp.float32).at[token].set(out, mode="drop"),
        jnp.zeros((tokens, q_heads), jnp.float32).at[token].set(lse, mode="drop"),
    )
