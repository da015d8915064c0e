"""Parts of a step over a `DeltaCache`: chunks and decodes of requests that are stored compressed, and of dense ones.

A dense request is served as everywhere, by one part over the full layers and another over the sparse ones. A compressed
request has the same part over the full layers; in the sparse layers

* a chunk, which is one segment, attends to its history as it is read back and to itself, and then what leaves the
  recent window is compressed: behind each layer, so that nothing dense outlives it;
* a decode attends to the sinks, to what the layers' observation layer selected of the history, and to what is recent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation, attend_then_rank, beside, select_top
from sparsejax.cache import DeltaCache, Entries, allocate_delta
from sparsejax.engine.programs.delta_compress import compress_chunk, written_after
from sparsejax.engine.programs.delta_ops import DeltaView, SparseLayer, StoreSpec, make_view
from sparsejax.engine.programs.parts import Carry, NearTokens, Part, decode_part, prefill_part
from sparsejax.engine.programs.placing import DeltaMapping
from sparsejax.engine.programs.state import DecodeState, PrefillBatch, StoreState
from sparsejax.models import ModelConfig


@dataclass(frozen=True)
class StoreOptions:
    """What a step over a `DeltaCache` serves; fixed when it is compiled.

    Attributes:
      spec: how requests are compressed.
      chunk: the chunk is one of a compressed request (one segment); else all of its requests are dense.
      dense, compressed: kinds of the requests that decode.
      top: bound on the history tokens that one of them reads.
    """

    spec: StoreSpec
    chunk: bool = False
    dense: bool = True
    compressed: bool = False
    top: int = 0


def delta_prefill_part(
    cache: DeltaCache,
    batch: PrefillBatch,
    *,
    params: Any,
    config: ModelConfig,
    options: StoreOptions,
    implementation: Implementation | None,
) -> tuple[DeltaCache, Part]:
    """A packed chunk: of dense requests, or of one that is compressed. See `prefill_part`."""
    if options.chunk:
        return _compressing_chunk(cache, batch, params, config, options.spec, implementation)
    full, part = prefill_part(cache.full, batch, config=config, implementation=implementation)
    near, sparse = prefill_part(cache.near, batch, config=config, implementation=implementation)
    cache = replace(cache, full=full, near=near)
    ok = part.ok & sparse.ok
    tokens = part.tokens
    # A dense row holds all of its text, in order.
    near_tokens = NearTokens(jnp.where(ok, tokens.rows, 0), tokens.positions, jnp.zeros_like(tokens.rows, bool))
    return cache, replace(
        part,
        tokens=replace(tokens, rows=jnp.where(ok, tokens.rows, 0), near=near_tokens),
        lanes=replace(part.lanes, live=part.lanes.live & ok),
        attend=_attend_by_layer(part, sparse),
        ok=ok,
    )


def _compressing_chunk(
    cache: DeltaCache,
    batch: PrefillBatch,
    params: Any,
    config: ModelConfig,
    spec: StoreSpec,
    implementation: Implementation | None,
) -> tuple[DeltaCache, Part]:
    geometry, layout = spec.geometry, cache.layout
    num_tokens = batch.tokens.shape[0]
    starts = jnp.asarray(batch.starts)
    row, start = jnp.asarray(batch.rows)[0], jnp.asarray(batch.positions)[0]
    stop = start + starts[1]
    full, part = prefill_part(cache.full, batch, config=config, implementation=implementation)
    cache, ok = allocate_delta(
        replace(cache, full=full),
        row[None],
        near=(geometry.centers(stop) - geometry.centers(start))[None],
        ring=jnp.where(start > 0, 0, geometry.ring)[None],
        latent=(geometry.latents(stop) - geometry.latents(start))[None],
        max_count=Entries(num_tokens, num_tokens + geometry.ring, num_tokens + geometry.ring),
    )
    ok &= part.ok
    owner = jnp.where(ok, row, 0)

    def attend(layer, q, k, v, k_pre_rope, carry, mapping):
        if layout.is_full(layer):
            return _on_full(part, layer, q, k, v, k_pre_rope, carry, mapping)
        at = SparseLayer(carry.cache, layer, spec, params["compressor"][f"layers_{layer}"], implementation)
        out = at.attend_chunk(q, k, v, owner, start, starts)
        cache, out = written_after(carry.cache, out, implementation=implementation)
        cache = compress_chunk(replace(at, cache=cache), owner, start, stop, k_pre_rope, v)
        return out, carry._replace(cache=cache)

    nowhere = jnp.zeros(num_tokens, jnp.int32)
    tokens = replace(
        part.tokens,
        rows=jnp.where(ok, part.tokens.rows, 0),
        near=NearTokens(nowhere, nowhere, nowhere > 0),
    )
    lanes = replace(part.lanes, live=part.lanes.live & ok)
    return cache, replace(part, tokens=tokens, lanes=lanes, attend=attend, ok=ok)


def delta_decode_part(
    cache: DeltaCache,
    state: DecodeState,
    rows: jax.Array,
    forced: jax.Array | None = None,
    *,
    params: Any,
    options: StoreOptions,
    implementation: Implementation | None,
) -> tuple[DeltaCache, Part]:
    """The newest token of each row, of dense and of compressed requests. See `decode_part`."""
    assert state.store is not None, "a DeltaCache goes with a state that knows which rows are compressed"
    layout, spec = cache.layout, options.spec
    store: StoreState = jax.tree.map(lambda x: x[rows], state.store)  # [B]
    compressed = jnp.asarray(store.compressed)
    position = state.position[rows]
    full, part = decode_part(cache.full, state, rows, forced, implementation=implementation)
    cache = replace(cache, full=full)
    ok, sparse = part.ok, None
    if options.dense:
        near, sparse = decode_part(cache.near, state, jnp.where(compressed, 0, rows), implementation=implementation)
        cache, ok = replace(cache, near=near), ok & sparse.ok
    if options.compressed:
        is_sink = compressed & (position < spec.geometry.sinks)
        cache, fitted = allocate_delta(
            cache, jnp.where(is_sink, rows, 0), near=is_sink.astype(jnp.int32), max_count=Entries(1, 1, 1)
        )
        ok &= fitted
    waits = compressed & (position >= spec.geometry.sinks)
    near_rows = jnp.where(waits, layout.ring_row(rows), rows)
    near_tokens = NearTokens(
        jnp.where(ok, near_rows, 0), jnp.where(waits, position % spec.geometry.ring, position), compressed
    )
    # Dense lanes have no candidates, and read nothing through the view.
    length = jnp.where(compressed & ok, position + 1, 0)
    history = jnp.where(compressed, spec.geometry.history_at_query(position + 1), 0)
    owners = jnp.where(length > 0, rows, 0)

    def sparse_layer(cache: DeltaCache, layer: int) -> SparseLayer:
        return SparseLayer(cache, layer, spec, params["compressor"][f"layers_{layer}"], implementation)

    def observe(layer, q, carry):
        full = carry.cache.full
        first = jnp.minimum(spec.geometry.sinks, history)
        out, rank = attend_then_rank(
            q,
            full.pool.k,
            full.pool.v,
            full.table.pages,
            full.table.length,
            rows,
            first,
            history,
            address=full.layout.address(layout.index(layer)),
            num_kv_heads=full.layout.num_kv_heads,
            scale=q.shape[-1] ** -0.5,
            implementation=implementation,
        )
        followers = [sparse_layer(carry.cache, each) for each in layout.followers(layer)]

        def choose() -> DeltaView:
            ranked = rank()
            selected = select_top(
                ranked,
                first,
                history,
                store.wanted(history - first),
                k=min(options.top, ranked.shape[1]),
                probabilities=True,
                implementation=implementation,
            )
            return make_view(selected, owners, history, length, layers=followers, head_dim=q.shape[-1])

        view = beside(choose)  # which the next layer is the first to read
        cache = carry.cache
        if options.chunk:  # which writes to the pools that the view was looked up in
            cache, view = written_after(cache, view, implementation=implementation)
        return out, carry._replace(cache=cache, view=view)

    def attend(layer, q, k, v, k_pre_rope, carry, mapping):
        if layout.is_full(layer):
            if options.compressed and layout.observes(layer):
                return observe(layer, q, carry)
            return _on_full(part, layer, q, k, v, k_pre_rope, carry, mapping)
        out = None
        if sparse is not None:
            out, carry = _on_near(sparse, layer, q, k, v, k_pre_rope, carry, mapping)
        if options.compressed:
            read = sparse_layer(carry.cache, layer).attend_view(q, owners, history, carry.view)
            out = read if out is None else jnp.where(compressed[:, None, None], read, out)
        assert out is not None, "a step that decodes serves some kind of request"
        return out, carry

    tokens = replace(part.tokens, rows=jnp.where(ok, part.tokens.rows, 0), near=near_tokens)
    lanes = replace(part.lanes, live=part.lanes.live & ok)
    return cache, replace(part, tokens=tokens, lanes=lanes, attend=attend, ok=ok, reads_new_kv=True)


def _on_full(part: Part, layer, q, k, v, k_pre_rope, carry: Carry, mapping: DeltaMapping) -> tuple[jax.Array, Carry]:
    """A part's attention over the full layers' cache, in a layer of the model."""
    cache = carry.cache
    out, inner = part.attend(
        cache.layout.index(layer), q, k, v, k_pre_rope, carry._replace(cache=cache.full), mapping.full
    )
    return out, inner._replace(cache=replace(cache, full=inner.cache))


def _on_near(part: Part, layer, q, k, v, k_pre_rope, carry: Carry, mapping: DeltaMapping) -> tuple[jax.Array, Carry]:
    """A part's attention over the sparse layers' near cache, in a layer of the model."""
    cache = carry.cache
    out, inner = part.attend(
        cache.layout.index(layer), q, k, v, k_pre_rope, carry._replace(cache=cache.near), mapping.near
    )
    return out, inner._replace(cache=replace(cache, near=inner.cache))


def _attend_by_layer(full: Part, sparse: Part):
    """Attention of dense requests: by one part in the full layers, by the other in the sparse ones."""

    def attend(layer, q, k, v, k_pre_rope, carry, mapping):
        if carry.cache.layout.is_full(layer):
            return _on_full(full, layer, q, k, v, k_pre_rope, carry, mapping)
        return _on_near(sparse, layer, q, k, v, k_pre_rope, carry, mapping)

    return attend
