"""The shapes at which kernels are measured, and the programs that measure them.

Each case is one program of several calls, one for each layer of a pool that is larger than any cache, as a model's
step issues them: the work list of decode attention is made once in it and counts. Pages are in random order, data is
random. A call of attention starts only when the one before has ended, since its query is that call's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    BlockTile,
    DecodeTile,
    PageAddress,
    PrefillTile,
    RecordTile,
    SpanLimits,
    add_linear,
    add_rms_norm,
    block_attention_mass,
    decode_attention,
    decode_work_list,
    gated_linear,
    move_slots,
    prefill_attention,
    record_attention,
    rotate_and_store,
    scan_pages,
    store_kv,
)

DTYPE = jnp.bfloat16
BYTES = 2  # of an element of DTYPE


Lengths = Literal["equal", "ragged", "served"]
"""Of the heads in a batch: all alike, one table for all layers and heads; from 0.1 to 0.9 of the context, a table per
layer and head; or as the requests of a service have them, one table for all: log-normal around a sixteenth of the
context, which is the most."""


class Program(NamedTuple):
    """Something to time.

    Attributes:
      call: given a number that rises by one each time, dispatches the program and returns something to wait for.
      operations: kernel calls in it.
      amount: bytes or floating-point operations that one of these calls really needs.
    """

    call: Callable[[int], Any]
    operations: int
    amount: float


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    Attributes:
      name: unique name.
      kernel: the operation.
      ceiling: what it is compared with: "read", "copy" or the name of the case that is its yardstick.
      build: makes the program; keyword options go to the kernel (`tile`) or the work list (`limits`), for tuning.
    """

    name: str
    kernel: str
    ceiling: str
    build: Callable[..., Program]


@dataclass(frozen=True)
class Heads:
    """Attention of a model: query heads, KV heads and their size."""

    query: int
    kv: int
    dim: int

    @property
    def slot_bytes(self) -> int:
        """K and V of one token of one head."""
        return 2 * self.dim * BYTES


LLAMA_8B = Heads(32, 8, 128)
QWEN_7B = Heads(28, 4, 128)


def _operations(layers: int, *, many: int = 32) -> int:
    """Kernel calls of a program that goes round `layers` layers: as many as a model has, few on a CPU."""
    return layers * max(1, (many if jax.default_backend() == "gpu" else 1) // layers)


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.jit(partial(jax.random.normal, shape=shape, dtype=DTYPE))(jax.random.key(seed))


def _random_table(lengths: np.ndarray, page: int, columns: int) -> tuple[jax.Array, int]:
    """(page_table i32[Lt, R, Ht, M] of entries in random order, number of entries with the null one)."""
    used = -(-lengths // page)
    entries = int(used.sum()) + 1
    table = np.zeros((*lengths.shape, columns), np.int32)
    table[np.arange(columns) < used[..., None]] = np.random.default_rng(0).permutation(np.arange(1, entries))
    return jnp.asarray(table), entries


def _addresses(layers: int, heads: Heads, per_head: bool) -> list[PageAddress]:
    if per_head:
        return [PageAddress(layer, 1, 0, 0) for layer in range(layers)]
    return [PageAddress(0, layers * heads.kv, layer * heads.kv, 1) for layer in range(layers)]


def _decode(
    batch: int,
    context: int,
    page: int,
    heads: Heads,
    lengths_are: Lengths,
    scored: bool,
    layers: int,
    *,
    tile: DecodeTile | None = None,
    limits: SpanLimits | None = None,
) -> Program:
    """`scored`: every request records what its slots were attended to."""
    ragged = lengths_are == "ragged"
    lengths = np.zeros((layers, batch + 1, heads.kv) if ragged else (1, batch + 1, 1), np.int32)
    lengths[:, 1:] = context
    rng = np.random.default_rng(1)
    if ragged:
        lengths[:, 1:] = rng.uniform(0.1, 0.9, lengths[:, 1:].shape) * context
    elif lengths_are == "served":
        lengths[:, 1:] = np.clip(rng.lognormal(np.log(context / 16), 1.0, lengths[:, 1:].shape), 16, context)
    addresses = _addresses(layers, heads, ragged)
    columns = -(-context // page)
    table, entries = _random_table(lengths, page, columns)
    pool = [_random(seed, entries * addresses[0].entry_stride, page, heads.dim) for seed in (1, 2)]
    operations = _operations(layers)

    @partial(jax.jit, donate_argnums=0)
    def step(score, q, k_pages, v_pages, table, lengths, rows, power):
        work = None
        if limits is not None:
            work = decode_work_list(lengths, rows, num_kv_heads=heads.kv, max_slots=columns * page, limits=limits)
        attend = partial(decode_attention, num_kv_heads=heads.kv, scale=1.0, work=work, tile=tile)
        for operation in range(operations):
            at = (q, k_pages, v_pages, table, lengths, rows)
            if score is None:
                q = attend(*at, address=addresses[operation % layers])
            else:
                q, score = attend(*at, address=addresses[operation % layers], score=score, power=power)
        return score, q

    score = [jnp.zeros(pool[0].shape[:2]) if scored else None]
    rows = jnp.arange(1, batch + 1, dtype=jnp.int32)
    arguments = (*pool, table, jnp.asarray(lengths), rows, jnp.ones_like(rows))
    queries = [_random(10 + i, batch, heads.query, heads.dim) for i in range(2)]

    def call(i: int):
        score[0], out = step(score[0], queries[i % 2], *arguments)
        return out

    slots = lengths.sum() / layers if ragged else lengths.sum() * heads.kv
    return Program(call, operations, slots * heads.slot_bytes)


def _causal_flops(tokens: int, history: float, heads: Heads) -> float:
    """Two products of a multiplication and an addition for every (query, key) pair, half of the chunk's own pairs."""
    return 4.0 * heads.query * heads.dim * tokens * (history + tokens / 2)


def _prefill(
    tokens: int,
    history: int,
    page: int,
    heads: Heads,
    segments: int = 1,
    ragged: bool = False,
    *,
    tile: PrefillTile | None = None,
) -> Program:
    """`segments` of `tokens` each. Ragged: a table per layer and head, histories from 0.1 to 0.9 of `history`."""
    operations = _operations(2, many=4)
    lengths = np.zeros((operations, segments + 1, heads.kv) if ragged else (1, segments + 1, 1), np.int32)
    lengths[:, 1:] = history
    if ragged:
        lengths[:, 1:] = np.random.default_rng(1).uniform(0.1, 0.9, lengths[:, 1:].shape) * history
    table, entries = _random_table(lengths, page, max(1, -(-history // page)))
    addresses = _addresses(operations, heads, ragged)
    pool = [_random(seed, entries * addresses[0].entry_stride, page, heads.dim) for seed in (1, 2)]

    @jax.jit
    def step(q, k, v, k_pages, v_pages, table, history, rows, starts):
        for address in addresses:
            q = prefill_attention(
                q, k, v, k_pages, v_pages, table, history, rows, starts, address=address, scale=heads.dim**-0.5,
                tile=tile,
            )  # fmt: skip
        return q

    new = [_random(3 + i, segments * tokens, n, heads.dim) for i, n in enumerate((heads.query, heads.kv, heads.kv))]
    segment = jnp.arange(segments + 1, dtype=jnp.int32)
    where = (table, jnp.asarray(lengths), segment[1:], segment * tokens)
    flops = segments * _causal_flops(tokens, float(lengths[:, 1:].mean()), heads)
    return Program(lambda i: step(*new, *pool, *where), operations, flops)


def _record(
    window: int,
    tokens: int,
    history: int,
    page: int,
    heads: Heads,
    flops: bool,
    *,
    tile: RecordTile | None = None,
    limits: SpanLimits | None = None,
) -> Program:
    """The last `window` queries of a chunk are recorded; a table per layer and head."""
    layers = _operations(1, many=8)
    held = history + tokens
    lengths = np.zeros((layers, 2, heads.kv), np.int32)
    lengths[:, 1] = held
    table, entries = _random_table(lengths, page, -(-held // page))
    pool = _random(1, entries, page, heads.dim)
    addresses = _addresses(layers, heads, per_head=True)

    @partial(jax.jit, donate_argnums=0)
    def step(score, q, lse, k_pages, table, history, rows, starts, first, power):
        for address in addresses:
            score = record_attention(
                score, q, lse, k_pages, table, history, rows, starts, first, power, address=address,
                num_kv_heads=heads.kv, scale=heads.dim**-0.5, tile=tile, limits=limits,
            )  # fmt: skip
        return score

    one = jnp.ones(1, jnp.int32)
    arguments = (
        _random(3, tokens, heads.query, heads.dim), jnp.full((tokens, heads.query), 11.0), pool, table,
        jnp.asarray(np.maximum(lengths - tokens, 0)), one, jnp.array([0, tokens], jnp.int32), one * (tokens - window),
        one,
    )  # fmt: skip
    score = [jnp.zeros(pool.shape[:2])]

    def call(i: int):
        del i
        score[0] = step(score[0], *arguments)
        return score[0]

    pairs = heads.query * window * (held - window / 2)
    return Program(call, layers, 2.0 * heads.dim * pairs if flops else held * heads.kv * heads.slot_bytes / 2)


def _block_mass(tokens: int, block: int, heads: Heads, *, tile: BlockTile | None = None) -> Program:
    operations = _operations(1, many=8)

    @jax.jit
    def step(q, k, starts):
        total = jnp.zeros(())
        for _ in range(operations):
            mass = block_attention_mass(q, k, starts, block=block, scale=1.0, tile=tile)
            total += mass[0, 0]
            q = q.at[0, 0, 0].set(total.astype(q.dtype))  # what the next call waits for
        return total

    new = [_random(3 + i, tokens, n, heads.dim) for i, n in enumerate((heads.query, heads.kv))]
    starts = jnp.array([0, tokens], jnp.int32)
    return Program(lambda i: step(*new, starts), operations, 2.0 * heads.query * heads.dim * tokens * block)


def _cudnn(tokens: int, heads: Heads) -> Program:
    """cuDNN's causal attention through JAX, the yardstick of prefill; XLA's on a CPU."""
    operations = _operations(2, many=4)
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"

    @jax.jit
    def step(q, k, v):
        for _ in range(operations):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return q

    new = [_random(3 + i, 1, tokens, n, heads.dim) for i, n in enumerate((heads.query, heads.kv, heads.kv))]
    return Program(lambda i: step(*new), operations, _causal_flops(tokens, 0, heads))


def _in_place(step: Callable[..., Any], pool: list[jax.Array], *arguments: Any) -> Callable[[int], Any]:
    """A call of `step(k_pages, v_pages, *arguments)` that donates the pools and keeps what it returns."""
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def call(i: int):
        pool[:] = compiled(*pool, *arguments)
        return pool

    return call


class _Places(NamedTuple):
    """Pools for tokens that are stored, larger than any cache, and where they go."""

    pools: list[jax.Array]
    addresses: list[PageAddress]
    entry: jax.Array
    slot: jax.Array


def _places(tokens: int, page: int, heads: Heads) -> _Places:
    # On a CPU there is no cache of 50 MB to get past: cases are only run, not timed in earnest.
    most = 32 if jax.default_backend() == "gpu" else 4
    layers = max(4, min(most, (1 << 30) // (tokens * heads.kv * heads.slot_bytes)))
    table, entries = _random_table(np.array([[[0], [tokens]]]), page, -(-tokens // page))
    addresses = _addresses(layers, heads, per_head=False)
    pools = [_random(seed, entries * addresses[0].entry_stride, page, heads.dim) for seed in (1, 2)]
    token = np.arange(tokens, dtype=np.int32)
    entry = table[0, 1, 0][token // page].reshape(1, tokens, 1)
    return _Places(pools, addresses, entry, jnp.asarray(token % page).reshape(1, tokens, 1))


def _store(tokens: int, page: int, heads: Heads) -> Program:
    pools, addresses, entry, slot = _places(tokens, page, heads)

    def step(k_pages, v_pages, k, v, entry, slot):
        for address in addresses:
            k_pages, v_pages = store_kv(k_pages, v_pages, k, v, entry, slot, address=address)
        return k_pages, v_pages

    new = [_random(3 + i, tokens, heads.kv, heads.dim) for i in range(2)]
    call = _in_place(step, pools, *new, entry, slot)
    return Program(call, len(addresses), 2 * tokens * heads.kv * heads.slot_bytes)


def _rotate(tokens: int, page: int, heads: Heads) -> Program:
    pools, addresses, entry, slot = _places(tokens, page, heads)

    def step(k_pages, v_pages, qkv, rotation, entry, slot):
        for address in addresses:
            _, k_pages, v_pages = rotate_and_store(
                k_pages, v_pages, qkv, rotation, rotation, entry, slot, num_kv_heads=heads.kv, address=address
            )
        return k_pages, v_pages

    width = heads.query + 2 * heads.kv
    rotation = jnp.full((tokens, heads.dim // 2), 0.5**0.5)
    call = _in_place(step, pools, _random(3, tokens, width, heads.dim), rotation, entry, slot)
    return Program(call, len(addresses), 2 * tokens * width * heads.dim * BYTES)


def _norm(tokens: int, dim: int) -> Program:
    operations = _operations(1)
    x, weight = _random(1, tokens, dim), _random(2, dim)

    @jax.jit
    def step(x, delta):
        for _ in range(operations):
            x, delta = add_rms_norm(x, delta, weight, eps=1e-5)
        return x, delta

    return Program(lambda i: step(x, x), operations, 4 * x.nbytes)


def _linear(tokens: int, inner: int, columns: int, gated: bool, **options: Any) -> Program:
    """The product of gates and what they are for, gated; or one that is added."""
    operations = 3  # weights of so many layers are more than the L2 cache holds
    x, *weights = _random(1, tokens, inner), *(_random(2 + i, inner, columns) for i in range(operations))
    total = None if gated else _random(9, tokens, columns)

    @jax.jit
    def step(x, total, weights):
        if gated:
            return [gated_linear(x, weight, **options) for weight in weights]
        return [sum(y for y in add_linear(total, x, weight, **options) if y is not None) for weight in weights]

    return Program(lambda i: step(x, total, weights), operations, 2 * tokens * inner * columns)


def _linear_cases(tokens: int, inner: int, columns: int, gated: bool) -> list[Case]:
    """By XLA, which is the yardstick, and by the kernel where there is one."""
    name = f"{'gated' if gated else 'added'} product of {tokens} x {inner} x {columns}"
    build = partial(_linear, tokens, inner, columns, gated)
    kernel = "gated_linear" if gated else "add_linear"
    return [
        Case(f"{name}, XLA", "xla_linear", "matmul", partial(build, implementation="xla")),
        Case(name, kernel, f"{name}, XLA", build),
    ]


def _move(moves: int, page: int, heads: Heads) -> Program:
    pages = -(-4 * moves // page)
    pool = [_random(seed, pages, page, heads.dim) for seed in (1, 2)]
    slots = jnp.asarray(np.random.default_rng(0).permutation(pages * page)[: 2 * moves].astype(np.int32))
    call = _in_place(move_slots, pool, slots[:moves], slots[moves:])
    return Program(call, 1, 2 * moves * heads.slot_bytes)


def _scan(layers: int, batch: int, context: int, page: int, heads: Heads) -> Program:
    """What a step that evicts looks at: the scores and positions of all tables of a batch."""
    columns = -(-context // page)
    tables = (layers, batch, heads.kv)
    count = layers * batch * heads.kv * columns
    pages = np.random.default_rng(0).permutation(count).reshape(*tables, columns)
    position = np.empty((count, page), np.int32)
    position[pages] = np.arange(columns * page).reshape(columns, page)
    lengths, sinks, last = (jnp.full(tables, n, jnp.int32) for n in (context, 4, context - 8))
    score = jax.jit(partial(jax.random.uniform, shape=position.shape))(jax.random.key(1))
    arguments = (jnp.asarray(position), score, jnp.asarray(pages, jnp.int32), lengths, sinks, last)
    step = jax.jit(scan_pages)
    return Program(lambda i: step(*arguments), 1, count // columns * context * 8)


def _decode_case(
    batch: int, context: int, page: int, heads: Heads = LLAMA_8B, lengths: Lengths = "equal", scored: bool = False
) -> Case:
    size = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    model = "" if heads == LLAMA_8B else f", {heads.query}/{heads.kv} heads"
    kind = "" if lengths == "equal" else f", {lengths}"
    name = f"decode {batch} x {size}, page {page}{model}{kind}{', scored' if scored else ''}"
    typical = context // 10 if lengths == "served" else context
    layers = max(1, min(8, (4 << 30) // (batch * typical * heads.kv * heads.slot_bytes)))
    return Case(
        name, "decode_attention", "read", partial(_decode, batch, context, page, heads, lengths, scored, layers)
    )


def cases() -> list[Case]:
    """All cases at production shapes, bf16."""
    uniform = [(8, 32768), (32, 8192), (64, 16384), (1, 131072)]
    ragged = [(8, 32768), (32, 32768), (1, 131072)]
    return [
        *(_decode_case(*shape, page) for page in (32, 1) for shape in uniform),
        *(_decode_case(*shape, 32, QWEN_7B) for shape in uniform),
        *(_decode_case(*shape, 32, lengths="ragged") for shape in ragged),
        *(_decode_case(batch, 8192, 32, lengths="served") for batch in (96, 256)),
        *(_decode_case(batch, 4096, 32) for batch in (32, 64)),
        # As a serving batch has them: short contexts, some tokens past a round number.
        *(_decode_case(batch, 2111, 32) for batch in (1, 16, 32, 64, 128, 256)),
        _decode_case(256, 1100, 32),
        *(_decode_case(*shape, 32, scored=True) for shape in ((64, 2111), (32, 4096), (64, 4096), (8, 32768))),
        Case(
            "record 32 queries at 32k",
            "record_attention",
            "read",
            partial(_record, 32, 2048, 30720, 32, LLAMA_8B, False),
        ),
        Case(
            "record 2k after 30k", "record_attention", "matmul", partial(_record, 2048, 2048, 30720, 32, LLAMA_8B, True)
        ),
        Case("block mass 8k", "block_attention_mass", "matmul", partial(_block_mass, 8192, 128, LLAMA_8B)),
        Case("cuDNN causal 8k", "cudnn", "matmul", partial(_cudnn, 8192, LLAMA_8B)),
        Case("cuDNN causal 32k", "cudnn", "matmul", partial(_cudnn, 32768, LLAMA_8B)),
        *(
            Case(name, "prefill_attention", yardstick, partial(_prefill, tokens, history, 32, LLAMA_8B, *rest))
            for name, yardstick, tokens, history, *rest in (
                ("prefill 8k", "cuDNN causal 8k", 8192, 0),
                ("prefill 32k", "cuDNN causal 32k", 32768, 0),
                ("prefill 8 x 1k", "cuDNN causal 8k", 1024, 0, 8),
                ("prefill 8 x 1000", "cuDNN causal 8k", 1000, 0, 8),
                ("prefill 8k after 24k", "cuDNN causal 32k", 8192, 24576),
                ("prefill 2k after 30k", "cuDNN causal 32k", 2048, 30720),
                ("prefill 512 after 32k", "cuDNN causal 32k", 512, 32768),
                ("prefill 256 after 32k", "cuDNN causal 32k", 256, 32768),
                ("prefill 2k after 32k, ragged", "cuDNN causal 32k", 2048, 32768, 1, True),
            )
        ),
        Case("store_kv 8192 tokens", "store_kv", "copy", partial(_store, 8192, 32, LLAMA_8B)),
        Case("store_kv 256 tokens", "store_kv", "copy", partial(_store, 256, 32, LLAMA_8B)),
        Case("rotate_and_store 256 tokens", "rotate_and_store", "copy", partial(_rotate, 256, 32, LLAMA_8B)),
        Case("rotate_and_store 1 token", "rotate_and_store", "copy", partial(_rotate, 1, 32, LLAMA_8B)),
        Case("add_rms_norm 1 token", "add_rms_norm", "copy", partial(_norm, 1, 4096)),
        Case("add_rms_norm 8 tokens", "add_rms_norm", "copy", partial(_norm, 8, 4096)),
        *(case for tokens in (128, 256, 512, 2048, 8192) for case in _linear_cases(tokens, 4096, 28672, True)),
        *(case for tokens in (2048, 8192) for case in _linear_cases(tokens, 14336, 4096, False)),
        Case("move_slots 512k", "move_slots", "copy", partial(_move, 1 << 19, 32, LLAMA_8B)),
        Case("scan pages 64 x 2k, 32 layers", "scan_pages", "read", partial(_scan, 32, 64, 2048, 32, LLAMA_8B)),
    ]


def tiny_cases() -> list[Case]:
    """One small case of each kernel, for tests."""
    heads = Heads(4, 2, 16)
    return [
        _decode_case(2, 64, 8, heads),
        _decode_case(2, 64, 8, heads, "ragged"),
        _decode_case(2, 64, 8, heads, "served"),
        _decode_case(2, 64, 8, heads, scored=True),
        Case("record tiny", "record_attention", "read", partial(_record, 4, 16, 48, 8, heads, False)),
        Case("block mass tiny", "block_attention_mass", "matmul", partial(_block_mass, 32, 16, heads)),
        Case("cuDNN causal tiny", "cudnn", "matmul", partial(_cudnn, 32, heads)),
        Case("prefill tiny", "prefill_attention", "cuDNN causal tiny", partial(_prefill, 32, 16, 8, heads, 2, True)),
        Case("store_kv tiny", "store_kv", "copy", partial(_store, 16, 8, heads)),
        Case("rotate_and_store tiny", "rotate_and_store", "copy", partial(_rotate, 16, 8, heads)),
        Case("add_rms_norm tiny", "add_rms_norm", "copy", partial(_norm, 4, 16)),
        *_linear_cases(8, 16, 32, True),
        *_linear_cases(8, 16, 32, False),
        Case("move_slots tiny", "move_slots", "copy", partial(_move, 16, 8, heads)),
        Case("scan pages tiny", "scan_pages", "read", partial(_scan, 2, 2, 30, 8, heads)),
    ]
