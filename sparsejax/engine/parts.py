"""The two kinds of work a step can do, a packed chunk of prompts and one token a row, and how both become one.

A part says which tokens the model computes, what they attend to, and which lanes get a newest token from it. Making a
part backs its tokens with pages; `steps.py` then runs the model once over a part, whichever kind it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation, decode_attention, prefill_attention
from sparsejax.cache import KVCache, allocate
from sparsejax.engine.state import DecodeState, PrefillBatch
from sparsejax.models import Attend


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """What goes into the model, i32[N] each.

    Attributes:
      tokens, positions: of the text.
      rope_lengths: length that sets the RoPE base of "dynamic" models (others ignore it).
      rows: table row that a token's K and V belong to; 0 for padding.
      back: how far from the end of its row the token is, as `slot_mapping` takes it.
    """

    tokens: jax.Array
    positions: jax.Array
    rope_lengths: jax.Array
    rows: jax.Array
    back: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lanes:
    """What comes out, one lane a request. B lanes.

    Attributes:
      rows: i32[B], table row; 0 for an idle lane.
      num_output: i32[B], tokens generated before.
      newest: i32[B], the token to go on from instead of a sampled one, or -1.
      live: bool[B], the lane's row gets a newest token.
    """

    rows: jax.Array
    num_output: jax.Array
    newest: jax.Array
    live: jax.Array


@dataclass(frozen=True)
class Part:
    """Work for one run of the model.

    Attributes:
      tokens, lanes: what goes in, and what comes out.
      ends: i32[B], the token whose logits a lane is sampled from; None: there is a lane for every token, in order.
      attend: attention of one layer. The K and V of all tokens have been stored when it is called.
      ok: bool[], false if the tokens did not fit; their K and V then go nowhere, and no lane is live.
    """

    tokens: Tokens
    lanes: Lanes
    ends: jax.Array | None
    attend: Attend
    ok: jax.Array


def prefill_part(cache: KVCache, batch: PrefillBatch, *, implementation: Implementation | None) -> tuple[KVCache, Part]:
    """A packed chunk: T tokens and S lanes, of which those count that end a prompt."""
    num_tokens = batch.tokens.shape[0]
    starts, rows = jnp.asarray(batch.starts), jnp.asarray(batch.rows)
    segment = batch.segment
    history = cache.table.length
    cache, ok = allocate(cache, rows, starts[1:] - starts[:-1], max_count=num_tokens)

    def attend(layer, q, k, v, k_pre_rope, cache):
        del k_pre_rope
        out = prefill_attention(
            q,
            k,
            v,
            cache.pool.k,
            cache.pool.v,
            cache.table.pages,
            history,
            rows,
            starts,
            address=cache.layout.address(layer),
            scale=q.shape[-1] ** -0.5,
            implementation=implementation,
        )
        return out, cache

    tokens = Tokens(
        tokens=jnp.asarray(batch.tokens),
        positions=jnp.asarray(batch.positions),
        rope_lengths=jnp.asarray(batch.rope_lengths),
        # A refused allocation leaves the lengths as they were: `back` would then point at live tokens.
        rows=jnp.where(ok, jnp.append(rows, 0)[segment], 0),
        back=jnp.append(starts, num_tokens)[segment + 1] - jnp.arange(num_tokens, dtype=jnp.int32),
    )
    lanes = Lanes(
        rows=rows,
        num_output=jnp.asarray(batch.num_output),
        newest=jnp.asarray(batch.newest),
        live=jnp.asarray(batch.last) & (rows > 0) & ok,
    )
    return cache, Part(tokens=tokens, lanes=lanes, ends=jnp.maximum(starts[1:] - 1, 0), attend=attend, ok=ok)


def decode_part(
    cache: KVCache, state: DecodeState, rows: jax.Array, *, implementation: Implementation | None
) -> tuple[KVCache, Part]:
    """The newest token of each row: B tokens, B lanes. rows: i32[B], 0 for idle lanes."""
    live = rows > 0
    cache, ok = allocate(cache, rows, live.astype(jnp.int32), max_count=1)

    def attend(layer, q, k, v, k_pre_rope, cache):
        del k, v, k_pre_rope
        out = decode_attention(
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
        return out, cache

    position = state.position[rows]
    tokens = Tokens(
        tokens=state.token[rows],
        positions=position,
        rope_lengths=position + 1,
        rows=jnp.where(ok, rows, 0),
        back=jnp.ones_like(rows),
    )
    lanes = Lanes(rows=rows, num_output=state.num_output[rows], newest=jnp.full_like(rows, -1), live=live & ok)
    return cache, Part(tokens=tokens, lanes=lanes, ends=None, attend=attend, ok=ok)


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

    def put(into: jax.Array, values: jax.Array) -> jax.Array:
        return into.at[place].set(values, mode="drop", unique_indices=True)

    def attend(layer, q, k, v, k_pre_rope, cache):
        out, cache = prefill.attend(layer, q, k, v, k_pre_rope, cache)
        decoded, cache = decode.attend(layer, q[source], k[source], v[source], k_pre_rope[source], cache)
        return put(out, decoded), cache

    assert prefill.ends is not None, "a chunk names the tokens that end its segments"
    return Part(
        tokens=jax.tree.map(put, prefill.tokens, decode.tokens),
        lanes=jax.tree.map(lambda *both: jnp.concatenate(both), prefill.lanes, decode.lanes),
        ends=jnp.concatenate([prefill.ends, source]),
        attend=attend,
        ok=prefill.ok & decode.ok & (first_free + busy.sum() <= size),
    )
