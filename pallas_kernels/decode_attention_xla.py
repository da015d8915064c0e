"""Decode attention as an XLA program, for backends without Triton."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import online_softmax
from pallas_kernels.in_order import in_order
from pallas_kernels.online_softmax import LOG2_E

_BLOCK = 256  # slots read per step


@functools.partial(jax.jit, static_argnames=("address", "heads", "scale"))
def decode_attention_xla(
    q, k_pages, v_pages, page_table, lengths, rows, indices, position, score, power, layer, *, address, heads, scale
):
    """A loop over blocks of slots that ends at the longest live length, so work follows what is held and not M.

    A second one adds to the scores, which take the log-sum-exp of all blocks.
    """
    address = address.join_layer(layer)
    batch, q_heads, dim = q.shape
    page_size = k_pages.shape[1]
    table_heads, columns = page_table.shape[2:]
    tl = address.table_layer
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    length = jnp.broadcast_to(lengths[tl, rows], (batch, heads))
    q = (q.astype(jnp.float32) * (scale * LOG2_E)).reshape(batch, heads, -1, dim)

    def pages_of(column):
        """Pages at table columns i32[B, n_heads, n], n_heads in {1, H} -> i32[B, H, n]."""
        table_head = jnp.minimum(head, table_heads - 1) if table_heads > 1 else 0
        return jnp.broadcast_to(
            address.page(page_table[tl, rows[:, None, None], table_head, column], head), (batch, heads, column.shape[2])
        )

    if indices is None:
        width = min(max(1, _BLOCK // page_size), columns)  # whole pages per step
        block = width * page_size
        steps = -(-length.max() // block)
        # Whole pages as rows: of pools with one slot a page, XLA would copy what only differs in where the 1 stands.
        pools = [pool.reshape(pool.shape[0], page_size * dim) for pool in (k_pages, v_pages)]

        def read_pages(step):
            column = step * width + jnp.arange(width, dtype=jnp.int32)[None, None]
            page = pages_of(jnp.minimum(column, columns - 1))
            slot = step * block + jnp.arange(block, dtype=jnp.int32)
            k, v = (pool[page].reshape(batch, heads, block, dim) for pool in pools)
            live = slot < length[..., None]
            if position is not None:
                live &= position[page].reshape(batch, heads, block) >= 0
            return k, v, live, jnp.repeat(page, page_size, axis=2)

        read = read_pages
    else:
        block = min(_BLOCK, indices.shape[2])
        steps = -(-indices.shape[2] // block)
        indices = jnp.pad(indices, ((0, 0), (0, 0), (0, steps * block - indices.shape[2])), constant_values=-1)

        def read_listed(step):
            slot = jax.lax.dynamic_slice_in_dim(indices, step * block, block, axis=2)
            live = (slot >= 0) & (slot < length[..., None])
            slot = jnp.where(live, slot, 0)
            page = pages_of(slot // page_size)
            return k_pages[page, slot % page_size], v_pages[page, slot % page_size], live, page

        read = read_listed

    def visit(step, state):
        k, v, live, _ = read(step)
        scores = jnp.einsum("bhgd,bhnd->bhgn", q, k.astype(jnp.float32), precision="highest")
        # Dead slots may hold anything, NaN included, and 0 * NaN is NaN.
        v = jnp.where(live[..., None], v.astype(jnp.float32), 0.0)
        weighted_sum = functools.partial(jnp.einsum, "bhgn,bhnd->bhgd", precision="highest")
        return online_softmax.absorb(state, scores, live[:, :, None], lambda weights: weighted_sum(weights, v))

    state = online_softmax.start(q.shape[:3], dim)
    out, lse = online_softmax.finish(jax.lax.fori_loop(0, steps, visit, state))

    def record(step, score):
        k, _, live, page = read(step)
        logits = jnp.einsum("bhgd,bhnd->bhgn", q, k.astype(jnp.float32), precision="highest")
        mass = jnp.exp2((logits - LOG2_E * lse[..., None]) * power[:, None, None, None]).sum(axis=2)  # [B, H, n]
        page = jnp.where(live & (power > 0)[:, None, None], page, score.shape[0])
        place = jnp.broadcast_to(jnp.arange(block, dtype=jnp.int32) % page_size, page.shape)
        return score.at[page, place].add(mass, mode="drop")

    if score is not None:
        score = jax.lax.fori_loop(0, steps, record, score)
        out, score = in_order((out, score), implementation="xla")  # whoever waits for `out` may write keys
    return out.reshape(batch, q_heads, dim), lse.reshape(batch, q_heads), score
