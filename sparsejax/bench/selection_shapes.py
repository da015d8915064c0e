"""The kernels of selection at production shapes: what observation layers do, and what chooses pages."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import page_upper_bounds, select_top, slot_probabilities
from sparsejax.bench.kernel_shapes import (
    BYTES,
    LLAMA_8B,
    Case,
    Heads,
    Program,
    _addresses,
    _decode_case,
    _operations,
    _random,
    _random_table,
)


def _probabilities(batch: int, context: int, page: int, heads: Heads, layers: int) -> Program:
    """Attention of an observation layer, all but some sinks and recent tokens being candidates; one table for all."""
    lengths = np.zeros((1, batch + 1, 1), np.int32)
    lengths[:, 1:] = context
    table, entries = _random_table(lengths, page, -(-context // page))
    addresses = _addresses(layers, heads, per_head=False)
    pool = [_random(seed, entries * addresses[0].entry_stride, page, heads.dim) for seed in (1, 2)]
    operations = _operations(layers, many=8)

    @jax.jit
    def step(q, k_pages, v_pages, table, lengths, rows, first, last):
        total = jnp.zeros(())
        for operation in range(operations):
            q, probabilities = slot_probabilities(
                q, k_pages, v_pages, table, lengths, rows, first, last, address=addresses[operation % layers],
                num_kv_heads=heads.kv, scale=heads.dim**-0.5,
            )  # fmt: skip
            total += probabilities[0, 8]
        return q, total

    rows = jnp.arange(1, batch + 1, dtype=jnp.int32)
    arguments = (*pool, table, jnp.asarray(lengths), rows, jnp.full_like(rows, 4), jnp.full_like(rows, context - 32))
    queries = [_random(10 + i, batch, heads.query, heads.dim) for i in range(2)]
    return Program(
        lambda i: step(queries[i % 2], *arguments), operations, batch * context * heads.kv * heads.slot_bytes
    )


def _select_top(rows: int, size: int, k: int) -> Program:
    """Scores spread over many powers of two, as probabilities are. Each call waits for the one before."""
    operations = _operations(1, many=8)

    @jax.jit
    def step(scores, last):
        first = jnp.zeros_like(last)
        for _ in range(operations):
            chosen = select_top(scores, first, last, jnp.full_like(last, k), k=k, probabilities=True)
            first = jnp.maximum(chosen[:, 0], 0) % 2
        return first

    normal = jax.random.normal(jax.random.key(0), (rows, size))
    scores = jnp.exp(4 * jnp.minimum(normal, 3) - 12)
    last = jnp.full(rows, size, jnp.int32)
    return Program(lambda i: step(scores, last), operations, rows * size * 4)


def _upper_bounds(batch: int, context: int, page: int, heads: Heads) -> Program:
    """Bounds of all pages of a row, for each KV head; one table for all."""
    layers = _operations(1, many=8)
    lengths = np.zeros((1, batch + 1, 1), np.int32)
    lengths[:, 1:] = context
    table, entries = _random_table(lengths, page, -(-context // page))
    addresses = _addresses(layers, heads, per_head=False)
    bounds = _random(1, entries * addresses[0].entry_stride, 2, heads.dim)

    @jax.jit
    def step(q, bounds, table, lengths, rows):
        for address in addresses:
            most = page_upper_bounds(
                q, bounds, table, lengths, rows, address=address, num_kv_heads=heads.kv, page_size=page
            )
            q = q.at[0, 0, 0].set(most[0, 0, 0].astype(q.dtype))  # what the next call waits for
        return q

    arguments = (bounds, table, jnp.asarray(lengths), jnp.arange(1, batch + 1, dtype=jnp.int32))
    query = _random(10, batch, heads.query, heads.dim)
    amount = batch * heads.kv * -(-context // page) * 2 * heads.dim * BYTES
    return Program(lambda i: step(query, *arguments), layers, amount)


def selection_cases() -> list[Case]:
    """What observation layers do, and what chooses pages."""
    cases = []
    for context in (32768, 131072):
        size = f"{context // 1024}k"
        cases += [
            Case(
                f"probabilities 8 x {size}",
                "slot_probabilities",
                f"decode 8 x {size}, page 32" if context == 32768 else "read",
                partial(_probabilities, 8, context, 32, LLAMA_8B, max(1, (131072 // context))),
            ),
            Case(f"top 2048 of 8 x {size}", "select_top", "read", partial(_select_top, 8, context, 2048)),
            Case(
                f"top {2048 // 32} pages of 64 x {context // 32}",
                "select_top",
                "read",
                partial(_select_top, 64, context // 32, 64),
            ),
            Case(
                f"page bounds 8 x {size}", "page_upper_bounds", "read", partial(_upper_bounds, 8, context, 32, LLAMA_8B)
            ),
        ]
    # Followers read single tokens through a table of their own.
    return [*cases, _decode_case(8, 2112, 1)]


def tiny_selection_cases() -> list[Case]:
    """One small case of each kernel, for tests."""
    heads = Heads(4, 2, 16)
    return [
        Case("probabilities tiny", "slot_probabilities", "read", partial(_probabilities, 2, 64, 8, heads, 1)),
        Case("top tiny", "select_top", "read", partial(_select_top, 2, 64, 8)),
        Case("page bounds tiny", "page_upper_bounds", "read", partial(_upper_bounds, 2, 64, 8, heads)),
    ]
