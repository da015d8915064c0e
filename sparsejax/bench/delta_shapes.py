"""The DeltaKV kernels at production shapes: Llama-8B heads, latents of 512 numbers, 4 references, every 10th a center.

What a call needs is counted without what it reads twice: of the centers that are references of the tokens read, each
once. References are random centers of the row, the worst case; selected tokens are random, too.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    CompressTile,
    DeltaLayout,
    DeltaStore,
    DeltaTile,
    PageAddress,
    ReconstructTile,
    SearchTile,
    delta_attention,
    delta_compress,
    delta_reconstruct,
    init_latents,
    reference_search,
    view_positions,
)
from pallas_kernels.centers import center_count, latent_count
from sparsejax.bench.kernel_shapes import (
    BYTES,
    LLAMA_8B,
    Case,
    Heads,
    Program,
    _operations,
    _random,
    _random_table,
)


class Shape(NamedTuple):
    """Sizes of a compressor and of the cache around it."""

    heads: Heads = LLAMA_8B
    size: int = 512
    neighbors: int = 4
    sinks: int = 16
    step: int = 10
    recent: int = 128
    page: int = 32

    @property
    def geometry(self) -> dict[str, int]:
        return {"sinks": self.sinks, "step": self.step}

    @property
    def features(self) -> int:
        return 2 * self.heads.kv * self.heads.dim

    @property
    def token_bytes(self) -> int:
        """K and V of one token at full precision."""
        return self.features * BYTES

    def latent_bytes(self, dtype: str) -> float:
        """One latent with its references."""
        return self.size * (0.5 + 1 / 16 if dtype == "int4" else BYTES) + 2 * self.neighbors


def _latents(shape: Shape, pages: int, centers: int, dtype: str):
    """Random latents with random references."""
    empty = init_latents(1, shape.page, size=shape.size, neighbors=shape.neighbors, max_centers=centers, dtype=dtype)
    dims = (pages, shape.page)
    if empty.scale is None:
        values, scale = _random(3, *dims, shape.size), None
    else:
        bits = partial(jax.random.bits, shape=(*dims, empty.values.shape[2]), dtype=jnp.uint16)
        values, scale = jax.jit(bits)(jax.random.key(3)), _random(4, *dims, empty.scale.shape[2])
    draw = partial(jax.random.randint, shape=(*dims, shape.neighbors), minval=0, maxval=centers)
    reference = jax.jit(lambda key: draw(key).astype(empty.reference.dtype))(jax.random.key(5))
    return empty._replace(values=values, scale=scale, reference=reference)


def _store(shape: Shape, layers: int, requests: int, context: int, dtype: str):
    """(DeltaStore, layouts of the layers, history): `requests` rows of `context` tokens, the last ones recent."""
    history = max(0, context - shape.recent)
    ring = 2 * shape.recent
    centers = center_count(history, **shape.geometry)
    held = np.zeros((1, 2 * requests + 1, 1), np.int32)
    held[0, 1 : requests + 1], held[0, requests + 1 :] = centers, ring
    near_table, entries = _random_table(held, shape.page, -(-max(centers, ring) // shape.page))
    held = np.zeros((1, requests + 1, 1), np.int32)
    held[0, 1:] = latent_count(history, **shape.geometry)
    latent_table, latent_entries = _random_table(held, shape.page, max(1, -(-int(held.max()) // shape.page)))
    heads = shape.heads
    k, v = (_random(seed, entries * layers * heads.kv, shape.page, heads.dim) for seed in (1, 2))
    store = DeltaStore(k, v, near_table, _latents(shape, latent_entries * layers, centers, dtype), latent_table)
    layouts = [
        DeltaLayout(
            near=PageAddress(0, layers * heads.kv, layer * heads.kv, 1),
            latent=PageAddress(0, layers, layer, 1),
            ring=ring,
            **shape.geometry,
        )
        for layer in range(layers)
    ]
    return store, layouts, history


def _rotations(positions: np.ndarray, dim: int) -> list[jax.Array]:
    angle = positions[..., None] * 500000.0 ** (-np.arange(0, dim, 2) / dim)
    return [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]


def _attention(
    shape: Shape,
    batch: int,
    context: int,
    top: int,
    dtype: str,
    layers: int,
    *,
    tile: DeltaTile | None = None,
) -> Program:
    """One decode step: every layer reads the sinks, `top` of the history and the recent tokens."""
    store, layouts, history = _store(shape, layers, batch, context, dtype)
    heads, operations = shape.heads, _operations(layers)
    rng = np.random.default_rng(1)
    chosen = [np.sort(rng.choice(np.arange(shape.sinks, history), top, replace=False)) for _ in range(batch)]
    selected = jnp.asarray(np.stack(chosen), jnp.int32)
    held, length = (jnp.full(batch, n, jnp.int32) for n in (history, context))
    positions = view_positions(selected, held, length, sinks=shape.sinks, ring=2 * shape.recent)
    rotation = _rotations(np.maximum(np.asarray(positions), 0), heads.dim)
    rows = jnp.arange(1, batch + 1, dtype=jnp.int32)
    ups = [_random(20 + i, shape.size, shape.features) for i in range(layers)]

    @jax.jit
    def step(q, store, rows, history, positions, cos, sin, ups):
        for operation in range(operations):
            layer = operation % layers
            q = delta_attention(
                q, store, rows, rows + batch, history, positions, cos, sin, ups[layer], layout=layouts[layer],
                num_kv_heads=heads.kv, scale=1.0, plain=positions.shape[1] - top, tile=tile,
            )  # fmt: skip
        return q

    queries = [_random(10 + i, batch, heads.query, heads.dim) for i in range(2)]
    arguments = (store, rows, held, positions, *rotation, ups)
    latents = round(top * (1 - 1 / shape.step))
    centers = center_count(history, **shape.geometry)
    references = centers * (1 - (1 - 1 / centers) ** (latents * shape.neighbors))  # distinct ones, of random draws
    exact = shape.sinks + (top - latents) + context - history
    need = latents * shape.latent_bytes(dtype) + (references + exact) * shape.token_bytes
    return Program(lambda i: step(queries[i % 2], *arguments), operations, batch * need)


def _search(
    shape: Shape, rows: int, tokens: int, history: int, flops: bool, *, tile: SearchTile | None = None
) -> Program:
    """Each of `rows` rows compresses `tokens` tokens after `history` of them."""
    layers = _operations(2, many=4)
    store, layouts, _ = _store(shape, layers, rows, history + tokens + shape.recent, "bfloat16")
    heads = shape.heads
    position = np.tile(history + np.arange(tokens, dtype=np.int32), rows)

    @jax.jit
    def step(x, k_pages, v_pages, table, rows, starts, positions):
        found = []
        for layout in layouts:
            found.append(
                reference_search(
                    x, k_pages, v_pages, table, rows, starts, positions, address=layout.near, num_kv_heads=heads.kv,
                    neighbors=shape.neighbors, sinks=shape.sinks, step=shape.step, tile=tile,
                )
            )  # fmt: skip
        return found

    row = jnp.arange(1, rows + 1, dtype=jnp.int32)
    starts = jnp.arange(rows + 1, dtype=jnp.int32) * tokens
    x = _random(6, rows * tokens, shape.features)
    arguments = (*store[:3], row, starts, jnp.asarray(position))
    seen = center_count(position.astype(np.int64) + 1, **shape.geometry)
    need = 2.0 * shape.features * seen.sum() if flops else rows * float(seen.max()) * shape.token_bytes
    return Program(lambda i: step(x, *arguments), layers, float(need))


def _compress(shape: Shape, tokens: int, history: int, *, tile: CompressTile | None = None) -> Program:
    """`tokens` tokens of one row become latents."""
    layers = _operations(2, many=4)
    store, layouts, _ = _store(shape, layers, 1, history + tokens + shape.recent, "bfloat16")
    heads = shape.heads
    centers = center_count(history, **shape.geometry)
    ids = jnp.asarray(np.random.default_rng(2).integers(0, centers, (tokens, shape.neighbors)), jnp.int32)

    @jax.jit
    def step(x, k_pages, v_pages, table, ids, down):
        row, starts = jnp.ones(1, jnp.int32), jnp.array([0, tokens], jnp.int32)
        return [
            delta_compress(
                x, k_pages, v_pages, table, row, starts, ids, down, address=layout.near, num_kv_heads=heads.kv,
                tile=tile,
            )
            for layout in layouts
        ]  # fmt: skip

    x, down = _random(6, tokens, shape.features), _random(7, shape.features, shape.size)
    return Program(lambda i: step(x, *store[:3], ids, down), layers, 2.0 * tokens * shape.features * shape.size)


def _reconstruct(shape: Shape, tokens: int, dtype: str, *, tile: ReconstructTile | None = None) -> Program:
    """All `tokens` tokens of one row, for a chunk that attends to them; the static bound is one chunk of 8k more."""
    layers = _operations(2, many=4)
    store, layouts, history = _store(shape, layers, 1, tokens, dtype)
    heads = shape.heads
    rotation = _rotations(np.arange(tokens + 8192 * (tokens > 8192))[None], heads.dim)
    ups = [_random(20 + i, shape.size, shape.features) for i in range(layers)]

    @jax.jit
    def step(store, cos, sin, ups):
        one = jnp.ones(1, jnp.int32)
        out = []
        for layout, up in zip(layouts, ups, strict=True):
            k, v = delta_reconstruct(
                store, one, one * 2, one * history, one * tokens, cos, sin, layout=layout, num_kv_heads=heads.kv, up=up,
                tile=tile,
            )  # fmt: skip
            # The scratch of a layer is read and given up before the next one's is made.
            out.append(k[0] + v[0])
            cos = cos + 0 * out[-1][0, 0].astype(jnp.float32)
        return out

    latents = latent_count(history, **shape.geometry)
    return Program(lambda i: step(store, *rotation, ups), layers, 2.0 * latents * shape.size * shape.features)


def cases() -> list[Case]:
    """All cases at production shapes, bf16."""
    shape = Shape()
    return [
        *(
            Case(
                f"delta {batch} x {context // 1024}k, top 2048, {dtype}",
                "delta_attention",
                "read",
                partial(_attention, shape, batch, context, 2048, dtype, layers),
            )
            for batch, context, layers in ((8, 131072, 4), (1, 131072, 4), (32, 32768, 4))
            for dtype in ("bfloat16", "int4")
        ),
        Case("search 8k after 120k", "reference_search", "matmul", partial(_search, shape, 1, 8192, 122880, True)),
        Case("search 8k from 0", "reference_search", "matmul", partial(_search, shape, 1, 8192, 0, True)),
        Case("search 8 x 128 at 128k", "reference_search", "read", partial(_search, shape, 8, 128, 131072, False)),
        Case("search 128 at 128k", "reference_search", "read", partial(_search, shape, 1, 128, 131072, False)),
        Case("compress 8k", "delta_compress", "matmul", partial(_compress, shape, 8192, 122880)),
        *(
            Case(
                f"reconstruct 120k, {dtype}", "delta_reconstruct", "matmul", partial(_reconstruct, shape, 122880, dtype)
            )
            for name, dtype in (("reconstruct 120k, bfloat16", "bfloat16"), ("reconstruct 120k, int4", "int4"))
        ),
    ]


def tiny_cases() -> list[Case]:
    """One small case of each kernel, for tests."""
    shape = Shape(Heads(4, 2, 16), size=32, neighbors=2, sinks=2, step=4, recent=8, page=8)
    return [
        Case("delta tiny", "delta_attention", "read", partial(_attention, shape, 2, 64, 16, "int4", 2)),
        Case("search tiny", "reference_search", "matmul", partial(_search, shape, 2, 16, 32, True)),
        Case("compress tiny", "delta_compress", "matmul", partial(_compress, shape, 16, 32)),
        Case("reconstruct tiny", "delta_reconstruct", "matmul", partial(_reconstruct, shape, 48, "bfloat16")),
    ]
