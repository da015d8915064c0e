"""The two kinds of work a step can do, a packed chunk of prompts and one token a row, and how both become one.

A part says which tokens the model computes, what they attend to, and which lanes get a newest token from it. Making a
part backs its tokens with pages; `steps.py` then runs the model once over a part, whichever kind it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation, block_attention_mass, decode_attention
from sparsejax.cache import KVCache, add_scores, allocate
from sparsejax.engine.programs.recording import add_moments, attend_chunk, unrotate
from sparsejax.engine.programs.selection import LaneSelection, Selecting
from sparsejax.engine.programs.state import DecodeState, PrefillBatch
from sparsejax.models import ModelConfig


class Carry(NamedTuple):
    """What the layers hand on.

    Attributes:
      cache: with the K and V of the layers so far: a `KVCache` or a `DeltaCache`.
      moments: of queries, if the step records them.
      view: what decodes read in layers that follow, once a layer has chosen: a `View`, or in a `DeltaCache` a
        `DeltaView`.
    """

    cache: Any
    moments: jax.Array | None
    view: Any = None


class PartAttend(Protocol):
    """Attention of one layer over a part. The K and V of all its tokens have been stored, where `mapping` says."""

    def __call__(
        self,
        layer: int,
        q: jax.Array,
        k: Any,
        v: Any,
        k_pre_rope: Any,
        carry: Carry,
        mapping: Any,
        /,
    ) -> tuple[jax.Array, Carry]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NearTokens:
    """Where tokens go in the sparse layers of a `DeltaCache`. N tokens.

    Attributes:
      rows: i32[N], row of the near table; 0 for nowhere.
      slots: i32[N], slot in it.
      pre_rope: bool[N], their keys are stored before RoPE.
    """

    rows: jax.Array
    slots: jax.Array
    pre_rope: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What goes into the model, i32[N] each.

    Attributes:
      tokens, positions: of the text.
      rope_lengths: length that sets the RoPE base of "dynamic" models (others ignore it).
      rows: table row that a token's K and V belong to; 0 for padding.
      back: how far from the end of its row the token is, as `slot_mapping` takes it.
      hole: i32[N, Lt, Ht], the slot of an evicted token that the token takes instead, or -1; None if none does.
      near: where they go in the sparse layers; None unless the cache is a `DeltaCache`.
    """

    tokens: jax.Array
    positions: jax.Array
    rope_lengths: jax.Array
    rows: jax.Array
    back: jax.Array
    hole: jax.Array | None = None
    near: NearTokens | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lanes:
    """What comes out, one lane a request. B lanes.

    Attributes:
      rows: i32[B], table row; 0 for an idle lane.
      num_output: i32[B], tokens generated before.
      newest: i32[B], the token to go on from instead of a sampled one, or -1.
      counted: bool[B], the token enters `DecodeState.output_count` and `num_output`: it was not counted before.
      live: bool[B], the lane's row gets a newest token.
    """

    rows: jax.Array
    num_output: jax.Array
    newest: jax.Array
    counted: jax.Array
    live: jax.Array


@dataclass(frozen=True)
class Part:
    """Work for one run of the model.

    Attributes:
      tokens, lanes: what goes in, and what comes out.
      ends: i32[B], the token whose logits a lane is sampled from; None: there is a lane for every token, in order.
      attend: attention of one layer.
      ok: bool[], false if the tokens did not fit; their K and V then go nowhere, and no lane is live.
      reads_new_kv: `attend` reads k and v of the tokens themselves, not only what has been stored. Where it does not,
        they may be None.
    """

    tokens: Tokens
    lanes: Lanes
    ends: jax.Array | None
    attend: PartAttend
    ok: jax.Array
    reads_new_kv: bool = True


def prefill_part(
    cache: KVCache,
    batch: PrefillBatch,
    *,
    config: ModelConfig,
    records: frozenset[str] = frozenset(),
    implementation: Implementation | None,
) -> tuple[KVCache, Part]:
    """A packed chunk: T tokens and S lanes, of which those count that end a prompt.

    Args:
      records: what the segments may ask to have recorded, of `recording`'s three kinds.
    """
    num_tokens = batch.tokens.shape[0]
    starts, rows = jnp.asarray(batch.starts), jnp.asarray(batch.rows)
    segment = batch.segment
    history = cache.table.length
    cache, ok = allocate(cache, rows, starts[1:] - starts[:-1], max_count=num_tokens)
    tokens = Tokens(
        tokens=jnp.asarray(batch.tokens),
        positions=jnp.asarray(batch.positions),
        rope_lengths=jnp.asarray(batch.rope_lengths),
        # A refused allocation leaves the lengths as they were: `back` would then point at live tokens.
        rows=jnp.where(ok, jnp.append(rows, 0)[segment], 0),
        back=jnp.append(starts, num_tokens)[segment + 1] - jnp.arange(num_tokens, dtype=jnp.int32),
    )

    def attend(layer, q, k, v, k_pre_rope, carry, mapping):
        del k_pre_rope
        record, moments = batch.record, carry.moments
        wanted: dict[str, Any] = {}
        if record is not None and "attention" in records:
            # A refused allocation has no slots behind the history.
            wanted = {"first": jnp.asarray(record.first), "power": jnp.where(ok, record.power, 0)}
        out, cache = attend_chunk(
            carry.cache,
            layer,
            q,
            k,
            v,
            history=history,
            rows=rows,
            starts=starts,
            implementation=implementation,
            **wanted,
        )
        if record is None:
            return out, carry._replace(cache=cache)
        if "blocks" in records:
            mass = block_attention_mass(q, k, starts, implementation=implementation)
            asked = jnp.append(jnp.asarray(record.blocks), False)[segment]
            cache = add_scores(cache, layer, mapping, jnp.where(asked[:, None], mass, 0))
        if "moments" in records and moments is not None:
            before_rope = unrotate(config.rope, q, tokens.positions, tokens.rope_lengths)
            moments = add_moments(moments, layer, before_rope, record, starts, segment)
        return out, carry._replace(cache=cache, moments=moments)

    lanes = Lanes(
        rows=rows,
        num_output=jnp.asarray(batch.num_output),
        newest=jnp.asarray(batch.newest),
        counted=jnp.asarray(batch.newest) < 0,
        live=jnp.asarray(batch.last) & (rows > 0) & ok,
    )
    return cache, Part(tokens=tokens, lanes=lanes, ends=jnp.maximum(starts[1:] - 1, 0), attend=attend, ok=ok)


def decode_part(
    cache: KVCache,
    state: DecodeState,
    rows: jax.Array,
    forced: jax.Array | None = None,
    *,
    watch: bool = False,
    select: Selecting | None = None,
    implementation: Implementation | None,
) -> tuple[KVCache, Part]:
    """The newest token of each row: B tokens, B lanes.

    Args:
      rows: i32[B], 0 for idle lanes.
      forced: i32[B], the token to go on with instead of a sampled one, or -1; None: all are sampled.
      watch: some rows record attention or have dead slots.
      select: some rows select what they read.
    """
    live = rows > 0
    record = state.record if watch else None
    hole, count = None, live.astype(jnp.int32)
    if record is not None:
        hole = record.hole[:, rows]  # [Lt, B, Ht]
        count = (live[:, None] & (hole < 0)).astype(jnp.int32)
    cache, ok = allocate(cache, rows, count, max_count=1)

    selection = None
    if select is not None and state.select is not None:
        selection = LaneSelection(select, state.select, cache, rows, implementation=implementation)

    def read_all(layer: int, q: jax.Array, rows: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Attention of these rows to everything they hold."""
        attention = partial(
            decode_attention,
            q,
            cache.pool.k,
            cache.pool.v,
            cache.table.pages,
            cache.table.length,
            rows,
            address=cache.layout.address(layer),
            num_kv_heads=cache.layout.num_kv_heads,
            scale=q.shape[-1] ** -0.5,
            implementation=implementation,
        )
        if record is None:
            return attention(), cache
        assert cache.pool.score is not None, "caches that record keep scores"
        out, score = attention(
            position=cache.pool.position, score=cache.pool.score, power=jnp.where(ok, record.power[rows], 0)
        )
        return out, replace(cache, pool=replace(cache.pool, score=score))

    def attend(layer, q, k, v, k_pre_rope, carry, mapping):
        del k, v, k_pre_rope, mapping
        if selection is None:
            out, cache = read_all(layer, q, rows, carry.cache)
            return out, carry._replace(cache=cache)
        out, cache, view = selection.attend(layer, q, carry.cache, carry.view, partial(read_all, layer, q))
        return out, carry._replace(cache=cache, view=view)

    position = state.position[rows]
    tokens = Tokens(
        tokens=state.token[rows],
        positions=position,
        rope_lengths=position + 1,
        rows=jnp.where(ok, rows, 0),
        back=jnp.ones_like(rows),
        hole=None if hole is None else jnp.where(ok, hole, -1).swapaxes(0, 1),
    )
    newest = jnp.full_like(rows, -1) if forced is None else jnp.asarray(forced)
    num_output = state.num_output[rows]
    lanes = Lanes(
        rows=rows,
        # A lane with a newest token says how many there are with it.
        num_output=jnp.where(newest >= 0, num_output + 1, num_output),
        newest=newest,
        counted=num_output >= 0,  # else it decodes its prompt
        live=live & ok,
    )
    return cache, Part(tokens=tokens, lanes=lanes, ends=None, attend=attend, ok=ok, reads_new_kv=False)


def join(prefill: Part, decode: Part, first_free: jax.Array) -> Part:
    """Both parts as one: the decoded tokens take the chunk's first padding tokens, so the model's work stays the same.

    Args:
      prefill: a chunk of T tokens with padding for every live lane of `decode`; if there is less, `ok` is false.
      decode: its rows are none of the chunk's.
      first_free: i32[], the chunk's number of live tokens.

    Returns:
      A part of T tokens; its lanes are those of the chunk, then those of `decode`.
    """
    size = prefill.tokens.tokens.shape[0]
    busy = decode.lanes.rows > 0
    place = first_free + jnp.cumsum(busy, dtype=jnp.int32) - 1
    # Idle lanes have no place. Numbers of their own keep the indices of the writes below unique.
    place = jnp.where(busy, place, size + jnp.arange(busy.shape[0], dtype=jnp.int32))
    source = jnp.minimum(place, size - 1)

    put = partial(_put, place)

    def attend(layer, q, k, v, k_pre_rope, carry, mapping):
        out, carry = prefill.attend(layer, q, k, v, k_pre_rope, carry, mapping)
        new = _take(source, q, *((k, v, k_pre_rope) if decode.reads_new_kv else (None, None, None)))
        decoded, carry = decode.attend(layer, new[0], new[1], new[2], new[3], carry, mapping)
        return put(out, decoded), carry

    assert prefill.ends is not None, "a chunk names the tokens that end its segments"
    into = prefill.tokens
    if decode.tokens.hole is not None:
        into = replace(into, hole=jnp.full((size, *decode.tokens.hole.shape[1:]), -1, jnp.int32))
    return Part(
        tokens=jax.tree.map(put, into, decode.tokens),
        lanes=jax.tree.map(lambda *both: jnp.concatenate(both), prefill.lanes, decode.lanes),
        ends=jnp.concatenate([prefill.ends, source]),
        attend=attend,
        ok=prefill.ok & decode.ok & (first_free + busy.sum() <= size),
    )


# Jitted, so that they are traced once for all layers.


@jax.jit
def _take(source: jax.Array, *arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Rows i32[N] of each array."""
    return tuple(None if array is None else array[source] for array in arrays)


@jax.jit
def _put(place: jax.Array, into: jax.Array, values: jax.Array) -> jax.Array:
    """`into` with values [N, ...] in rows i32[N]; those beyond its end are dropped."""
    return into.at[place].set(values, mode="drop", unique_indices=True)
