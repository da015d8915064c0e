"""What the steps note down for eviction while they attend: beside each slot in the pool's `score`, or per row.

Three things can be recorded for a chunk of a prompt, all of them sums, so that chunks add up to one shot:

* "attention": for every slot, the probability that the recorded queries gave it (or its square);
* "blocks": for every new token, what its neighbours gave it in non-causal attention within blocks (compactor);
* "moments": first and second moments of the queries before RoPE (expected_attention).

Decode steps record "attention" for the rows that ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation, in_order_for_xla, prefill_attention, record_attention
from sparsejax.cache import CacheLayout, KVCache
from sparsejax.engine.requests.blame import blaming
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.models import ModelConfig, RopeConfig
from sparsejax.models.rope import apply_rope, attention_factor, rope_cos_sin

# What a chunk can record; the other things methods ask for are not recorded by steps that have one.
CHUNK_RECORDS = frozenset({"attention", "blocks", "moments"})


MOMENT_BLOCK = 128  # tokens whose moments are summed by one product; more of them waste work at segments' ends


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecordState:
    """What the device keeps for eviction beside the cache. R rows, row 0 the null row; N moment slots, slot 0 unused.

    Attributes:
      power: i32[R], in decode, to which power a row's attention is added to its slots' scores; 0: it is not.
      hole: i32[Lt, R, Ht], the dead slot that the row's next token takes, or -1 to append it.
      moments: f32[L, N, Hq, D + 1, D]: sum of q q^T, and sum of q in the last row; None unless methods need them.
      counts: f32[N], queries in them; None likewise.
    """

    power: jax.Array
    hole: jax.Array
    moments: jax.Array | None = None
    counts: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkRecord:
    """What to record of each segment of a chunk, S lanes.

    Attributes:
      first: i32[S], the first packed token whose attention is recorded; beyond the segment's end: none is.
      power: i32[S], 1 or 2; 0 records nothing.
      blocks: bool[S], record attention within blocks.
      moment_slot: i32[S], where the moments of the segment's queries go; 0: nowhere.
      moment_first: i32[S], the first packed token that enters them.
      fresh: bool[S], the segment begins its text: what its moment slot held belongs to another request.
      decode_power: i32[S], what `RecordState.power` becomes for the row.
    """

    first: jax.Array | np.ndarray
    power: jax.Array | np.ndarray
    blocks: jax.Array | np.ndarray
    moment_slot: jax.Array | np.ndarray
    moment_first: jax.Array | np.ndarray
    fresh: jax.Array | np.ndarray
    decode_power: jax.Array | np.ndarray


def idle_record(
    layout: CacheLayout, config: ModelConfig, records: frozenset[str], max_prefill_seqs: int
) -> RecordState | None:
    """Nothing recorded, and None if the cache cannot evict.

    Args:
      records: what methods may have recorded.
      max_prefill_seqs: requests whose prompts can be under way at once; each may need a moment slot.
    """
    if not layout.with_score:
        return None
    shape = (layout.table_layers, layout.num_rows, layout.table_heads)
    power, hole = jnp.zeros(layout.num_rows, jnp.int32), jnp.full(shape, -1, jnp.int32)
    if "moments" not in records:
        return RecordState(power=power, hole=hole)
    slots, heads, dim = max_prefill_seqs + 1, config.num_heads, config.head_dim
    return RecordState(
        power=power,
        hole=hole,
        moments=jnp.zeros((config.num_layers, slots, heads, dim + 1, dim), jnp.float32),
        counts=jnp.zeros(slots, jnp.float32),
    )


def start_record(state: RecordState, record: ChunkRecord, rows: jax.Array, starts: jax.Array) -> RecordState:
    """Takes a chunk's segments into the state. rows: i32[S]; starts: i32[S + 1]."""
    power = state.power.at[rows].set(jnp.asarray(record.decode_power)).at[0].set(0)
    hole = state.hole.at[:, rows].set(-1)
    if state.moments is None or state.counts is None:
        return RecordState(power=power, hole=hole)
    slot = jnp.asarray(record.moment_slot)
    nowhere = state.counts.shape[0]
    fresh = jnp.where(jnp.asarray(record.fresh) & (slot > 0), slot, nowhere)
    counted = jnp.maximum(starts[1:] - jnp.maximum(jnp.asarray(record.moment_first), starts[:-1]), 0)
    counts = state.counts.at[fresh].set(0.0, mode="drop")
    counts = counts.at[jnp.where(slot > 0, slot, nowhere)].add(counted.astype(jnp.float32), mode="drop")
    moments = state.moments.at[:, fresh].set(0.0, mode="drop")
    return RecordState(power=power, hole=hole, moments=moments, counts=counts)


def attend_chunk(
    cache: KVCache,
    layer: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    history: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    first: jax.Array | None = None,
    power: jax.Array | None = None,
    own: bool = True,
    reduce: Literal["sum", "max"] = "sum",
    implementation: Implementation | None,
) -> tuple[jax.Array, KVCache]:
    """Attention of one layer over packed segments, recorded in the scores of the slots it goes to if that is asked for.

    Args:
      q, k, v, history, rows, starts: as `prefill_attention` takes them.
      first, power, own, reduce: as `record_attention` takes them; without `first` and `power` nothing is recorded.

    Returns:
      (out [T, Hq, D], cache).
    """
    pool, pages, address, scale = cache.pool, cache.table.pages, cache.layout.address(layer), q.shape[-1] ** -0.5
    attention = partial(
        prefill_attention,
        q,
        k,
        v,
        pool.k,
        pool.v,
        pages,
        history,
        rows,
        starts,
        address=address,
        scale=scale,
        implementation=implementation,
    )
    if first is None or power is None:
        return attention(), cache
    if pool.score is None:
        raise ValueError("recording attention needs a layout with_score=True")
    out, lse = attention(return_lse=True)
    score = record_attention(
        pool.score,
        q,
        lse,
        pool.k,
        pages,
        history,
        rows,
        starts,
        first,
        power,
        address=address,
        num_kv_heads=cache.layout.num_kv_heads,
        scale=scale,
        own=own,
        reduce=reduce,
        implementation=implementation,
    )
    # Keys are read for scores until then, and whoever waits for `out` may write them.
    out, score = in_order_for_xla((out, score), implementation=implementation)
    return out, replace(cache, pool=replace(pool, score=score))


def add_moments(
    moments: jax.Array, layer: int, q: jax.Array, record: ChunkRecord, starts: jax.Array, segment: jax.Array
) -> jax.Array:
    """Adds one layer's queries to the moments of their segments.

    The chunk is cut where segments start and every MOMENT_BLOCK tokens, and all pieces are multiplied out at once: a
    loop over the segments that skips those without moments would make the device wait for the host in every turn.

    Args:
      moments: f32[L, N, Hq, D + 1, D].
      q: [T, Hq, D] before RoPE.
      segment: i32[T], S for padding.
    """
    tokens, block = q.shape[0], min(MOMENT_BLOCK, q.shape[0])
    cut = jnp.sort(jnp.concatenate([jnp.arange(0, tokens, block, dtype=jnp.int32), starts]))  # [P]
    token = cut[:, None] + jnp.arange(block, dtype=jnp.int32)  # [P, block]
    inside = token < jnp.append(cut[1:], tokens)[:, None]
    token = jnp.minimum(token, tokens - 1)
    owner = segment[token[:, 0]]  # [P], for a piece that is not empty
    slot = jnp.append(jnp.asarray(record.moment_slot), 0)[owner]
    first = jnp.append(jnp.asarray(record.moment_first), 0)[owner]
    wanted = inside & (slot > 0)[:, None] & (token >= first[:, None])

    pieces = jnp.where(wanted[..., None, None], q[token], 0)  # [P, block, Hq, D]
    outer = jnp.einsum("pthi,pthj->phij", pieces, pieces, preferred_element_type=jnp.float32)
    total = pieces.sum(axis=1, keepdims=True, dtype=jnp.float32).swapaxes(1, 2)  # [P, Hq, 1, D]
    # A product with a one-hot matrix: sums that are scattered would come in another order every time.
    of_slot = jax.nn.one_hot(slot, moments.shape[1], dtype=jnp.float32)  # [P, N]
    added = jnp.einsum(
        "pn,phij->nhij", of_slot, jnp.concatenate([outer, total], axis=2), precision=jax.lax.Precision.HIGHEST
    )
    return moments.at[layer].add(added)


def unrotate(config: RopeConfig, x: jax.Array, positions: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """x before RoPE, from x after it. x: [T, H, D] in its own dtype, computed in float32; positions: i32[T]."""
    cos, sin = rope_cos_sin(config, x.shape[-1], positions, lengths)
    scale = attention_factor(config) ** 2  # cos^2 + sin^2 of a scaled rotation
    return apply_rope(x.astype(jnp.float32), cos / scale, -sin / scale)


@dataclass(frozen=True)
class Recording:
    """What a request's method wants recorded.

    Attributes:
      power: of the prompt's attention; 0: not recorded.
      blocks, moments: record them.
      decode_power: of the attention of generated tokens; 0: not recorded.
    """

    power: int = 0
    blocks: bool = False
    moments: bool = False
    decode_power: int = 0

    @property
    def any_of_chunk(self) -> bool:
        """Whether chunks record anything."""
        return self.power > 0 or self.blocks or self.moments


def recording_for(compression: CompressionParams) -> Recording:
    """What to record of requests that ask for this."""
    if not compression.evicts:
        return Recording()
    method = compression.policy
    attention = "attention" in method.records
    return Recording(
        power=method.power if attention else 0,
        blocks="blocks" in method.records,
        moments="moments" in method.records,
        decode_power=method.power if attention and "decode" in method.records and not compression.once else 0,
    )


def watched(compression: CompressionParams) -> bool:
    """Whether decode steps of requests that ask for this record attention, or find dead slots in their rows."""
    return recording_for(compression).decode_power > 0 or compression.per_step


def chunk_record(chunks: Sequence[Chunk], starts: np.ndarray, moment_slots: Mapping[str, int]) -> ChunkRecord:
    """What the chunks' requests want recorded. starts: i32[S + 1]."""
    segments = starts.shape[0] - 1
    first, moment_first = starts[1:].copy(), starts[1:].copy()
    power, moment_slot, decode_power = (np.zeros(segments, np.int32) for _ in range(3))
    blocks, fresh = np.zeros(segments, bool), np.zeros(segments, bool)
    for i, chunk in enumerate(chunks):
        params = chunk.request.compression
        wanted = recording_for(params)
        decode_power[i] = wanted.decode_power
        fresh[i] = chunk.start == 0
        if chunk.compressed_at is None:
            continue
        power[i], blocks[i] = wanted.power, wanted.blocks
        with blaming([chunk.request]):
            first[i] = starts[i] + max(params.record_from(chunk.compressed_at) - chunk.start, 0)
            if wanted.moments:
                moment_slot[i] = moment_slots[chunk.request.request_id]
                moment_first[i] = starts[i] + max(
                    params.policy.record_from(chunk.compressed_at, params.window) - chunk.start, 0
                )
    return ChunkRecord(
        first=first,
        power=power,
        blocks=blocks,
        moment_slot=moment_slot,
        moment_first=moment_first,
        fresh=fresh,
        decode_power=decode_power,
    )
