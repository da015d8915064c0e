"""Runs the compiled steps: packs what the scheduler planned into padded arrays, dispatches, and never waits.

The runner owns the device side of an engine (parameters, cache, state). Its methods return device values that are still
being computed; the engine reads them a step later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import CacheLayout, DeltaCacheLayout, init_cache, init_delta_cache
from sparsejax.engine.execution.compiled_steps import compiled_steps
from sparsejax.engine.execution.eviction_batches import (
    EvictionShapes,
    Members,
    compress_calls,
    evict_calls,
)
from sparsejax.engine.execution.memory import explain_out_of_memory
from sparsejax.engine.execution.moment_slots import MomentSlots
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.execution.read_tokens import read_tokens
from sparsejax.engine.execution.selection_plan import Selections
from sparsejax.engine.execution.variants import StepVariants
from sparsejax.engine.programs.compression import CompressOutput, EvictOutput, Measured
from sparsejax.engine.programs.delta_compress import StoreOutput
from sparsejax.engine.programs.delta_ops import StoreSpec
from sparsejax.engine.programs.readback import Readback
from sparsejax.engine.programs.reconstruction import Reconstruction
from sparsejax.engine.programs.recording import CHUNK_RECORDS, idle_record
from sparsejax.engine.programs.state import DecodeState, PrefillBatch, StepOutput, init_state
from sparsejax.engine.requests.blame import blaming
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling import buckets
from sparsejax.engine.scheduling.plan import Chunk, Compress, Evict, Fork, FullRing
from sparsejax.engine.scheduling.store_limits import cell_size
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import DeltaKV
from sparsejax.models import Decoder

RELEASE_ROWS = 8  # rows one release call takes; more are released by more calls
FORK_ROWS = 8  # likewise, forks of one call
RING_ROWS = (1, 8)  # rows whose rings one call may compress
NONE_FORCED: Mapping[Request, int] = {}


class Runner:
    """The device side of an engine: one model's steps over one cache.

    Args:
      records: what methods may have recorded (`Method.records`).
      may_evict_per_step: some method evicts at every decode step.
      selecting: methods that select what decoding reads, which requests may use.
      instructions: token ids that ask for the first part of a text, and for the others, in reconstruction passes.
      store: how requests are stored compressed; given with the layout of a `DeltaCache`, and params that have the
        compressor's.
      allocate: take the cache's memory at once; else `reset` does it, before anything runs.
    """

    def __init__(
        self,
        decoder: Decoder,
        params,
        layout: CacheLayout | DeltaCacheLayout,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_tokens: int,
        max_prefill_seqs: int,
        eos_token_ids: tuple[int, ...] = (),
        implementation: Implementation | None = None,
        records: frozenset[str] = frozenset(),
        may_evict_per_step: bool = False,
        selecting: Sequence[str] = (),
        instructions: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        store: StoreSpec | None = None,
        allocate: bool = True,
    ) -> None:
        self.decoder = decoder
        self.params = params
        self.layout = layout
        self.max_prefill_seqs = max_prefill_seqs
        self.eos_token_ids = eos_token_ids
        self.implementation: Implementation | None = implementation
        self.decode_buckets = buckets.decode_buckets(max_num_seqs)
        # Prompts that are stored compressed are computed in cells.
        cell = None if store is None else cell_size(max_mixed_tokens)
        self.prefill_buckets = buckets.prefill_buckets(max_num_batched_tokens, also=cell)
        self.mixed_shapes = buckets.mixed_shapes(max_mixed_tokens, max_num_seqs)
        self.store = store
        self.can_evict = layout.with_score
        self.records = records & CHUNK_RECORDS
        self.selections: Selections | None = None
        if selecting and isinstance(layout, CacheLayout):
            slots = layout.max_entries_per_row * layout.page_size
            self.selections = Selections(decoder.config, max_slots=slots, page_size=layout.page_size)
        self.variants = StepVariants(
            max_slots=(layout.full if isinstance(layout, DeltaCacheLayout) else layout).max_slots,
            implementation=implementation,
            can_evict=self.can_evict,
            records=self.records,
            may_watch="decode" in records or may_evict_per_step,
            selecting=tuple(selecting),
            selections=self.selections,
            store=store,
        )
        self.eviction_shapes = EvictionShapes(
            layout=layout.full if isinstance(layout, DeltaCacheLayout) else layout,
            num_query_heads=decoder.config.num_heads,
            compress_rows=max_prefill_seqs,
            evict_rows=self.decode_buckets,
            implementation=implementation,
        )
        self.reconstruction = Reconstruction(*instructions, longest=self.eviction_shapes.slots[-1])
        self.cache: Any  # KVCache or DeltaCache
        self.state: DecodeState
        self._moment_slots = MomentSlots(max_prefill_seqs)
        if allocate:
            self.reset()
        self.steps = compiled_steps(decoder)  # pyright: ignore[reportArgumentType]
        self._decode_rows: tuple[tuple[int, ...], jax.Array] = ((), jnp.zeros(1, jnp.int32))
        self._unforced: dict[int, jax.Array] = {}

    def reset(self) -> None:
        """An empty cache and an idle state, whatever became of those before."""
        self.close()  # first, for there is no room for two
        with explain_out_of_memory(f"allocating a KV cache of {self.layout.bytes() / 2**30:.1f} GiB"):
            # Bound to the device, as what comes out of a step may be: for arguments that are not, steps are compiled
            # again.
            self.cache, self.state = jax.device_put(self._init(), self._device)
            jax.block_until_ready(self.cache)  # or memory that is not there is missed by what runs first
        self._moment_slots = MomentSlots(self.max_prefill_seqs)

    def shapes(self) -> tuple[Any, DecodeState]:
        """The cache and the state as shapes, for which steps can be compiled."""
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type),
            jax.eval_shape(self._init),
        )

    def _init(self) -> tuple[Any, DecodeState]:
        layout, record = self.layout, None
        if isinstance(layout, DeltaCacheLayout):
            cache = init_delta_cache(layout)
        else:
            cache = init_cache(layout)
            record = idle_record(layout, self.decoder.config, self.records, self.max_prefill_seqs)
        state = init_state(
            layout.num_rows,
            self.decoder.config.vocab_size,
            record,
            selects=self.selections is not None,
            stores=self.store is not None,
        )
        return cache, state

    @property
    def _device(self) -> Any:
        return next(iter(self.params["embed"].devices()))

    def close(self) -> None:
        """Drops cache and state."""
        self.__dict__.pop("cache", None)
        self.__dict__.pop("state", None)

    @property
    def can_force(self) -> bool:
        """Whether decodes may be told what they yield: replays of requests whose K and V depend on how they decoded."""
        return self.can_evict or self.selections is not None or self.store is not None

    @property
    def compilations(self) -> Counter[str]:
        """How often each step was compiled so far, by name (a copy)."""
        return Counter(self.steps.compilations)

    def check(self, compression: CompressionParams) -> None:
        """Raises unless the model's layers are what a request asks for.

        Raises:
          InvalidArgumentError: they are not, the engine was not built for methods that select, or has too many choices.
        """
        own = compression.policy
        if isinstance(own, DeltaKV) and isinstance(self.layout, DeltaCacheLayout):
            layers = self.layout.full_layers
            if own.full_attention_layers not in (None, layers):
                raise InvalidArgumentError(
                    f"full_attention_layers is {own.full_attention_layers}; the engine was built with {layers}, which "
                    "decide how its pools are laid out."
                )
        if compression.evicts:
            compression.rule.check_layers(self.decoder.config.num_layers)
        if not compression.selects:
            return
        if self.selections is None:
            raise InvalidArgumentError(
                f"method {compression.method!r} selects, and the engine was built without: name it in methods."
            )
        self.selections.check(compression)

    def check_together(self, several: Iterable[CompressionParams]) -> None:
        """Raises unless requests that ask for these can be taken together.

        Raises:
          InvalidArgumentError: they have too many choices.
        """
        if self.selections is not None:
            self.selections.check(*(compression for compression in several if compression.selects))

    def take(self, compression: CompressionParams) -> None:
        """Tells that a request with these parameters will come."""
        if compression.selects and self.selections is not None:
            self.selections.take(compression)

    def read_tokens(self, request: Request) -> float | None:
        """Tokens that a decode step of a request has read: see `read_tokens.read_tokens`."""
        return read_tokens(request, self.layout, selections=self.selections, store=self.store)

    def prefill(self, chunks: Sequence[Chunk]) -> Readback[StepOutput]:
        """Dispatches a prefill step; lane i of the output belongs to chunks[i], prompt lanes follow the packing."""
        batch = self._pack(chunks)
        options = self.variants.needed(chunks, ())
        self.cache, self.state, output = self.steps.prefill(self.params, self.cache, self.state, batch, options)
        return output

    def decode(self, requests: Sequence[Request], forced: Mapping[Request, int] = NONE_FORCED) -> Readback[StepOutput]:
        """Dispatches one decode step; lane i of the output belongs to requests[i].

        Args:
          forced: tokens that requests go on with instead of a sample; only if `can_force`.
        """
        rows = [request.row or 0 for request in requests]
        rows += [0] * (buckets.bucket(len(rows), self.decode_buckets) - len(rows))
        if tuple(rows) != self._decode_rows[0]:  # most steps decode the same rows: no transfer then
            self._decode_rows = (tuple(rows), jax.device_put(np.asarray(rows, np.int32)))
        work = (self._decode_rows[1],)
        if self.can_force:
            work = (*work, self._forced(requests, forced, len(rows)))
        options = self.variants.needed((), requests)
        self.cache, self.state, output = self.steps.decode(self.params, self.cache, self.state, work, options)
        return output

    def mixed_shape(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> tuple[int, int] | None:
        """(packed tokens, decode lanes) of the one step that does both, or None where two steps are as good."""
        if not chunks or not requests:
            return None
        return buckets.mixed_shape(
            sum(chunk.count for chunk in chunks), len(requests), self.mixed_shapes, self.prefill_buckets
        )

    def mixed(
        self, chunks: Sequence[Chunk], requests: Sequence[Request], forced: Mapping[Request, int] = NONE_FORCED
    ) -> Readback[StepOutput]:
        """Dispatches a step that does what `decode(requests, forced)` and then `prefill(chunks)` do.

        Lane i of the output belongs to chunks[i], lane max_prefill_seqs + i to requests[i].

        Raises:
          ValueError: there is no such step, as `mixed_shape` tells.
        """
        shape = self.mixed_shape(chunks, requests)
        if shape is None:
            raise ValueError(f"{len(chunks)} chunks and {len(requests)} decodes are no mixed step: see mixed_shape.")
        size, lanes = shape
        rows = np.zeros(lanes, np.int32)
        rows[: len(requests)] = [request.row or 0 for request in requests]
        options = self.variants.needed(chunks, requests)
        work = (self._pack(chunks, size=size), rows)
        if self.can_force:
            work = (*work, self._forced(requests, forced, lanes))
        self.cache, self.state, output = self.steps.mixed(self.params, self.cache, self.state, work, options)
        return output

    def compress(self, entries: Sequence[Compress]) -> list[tuple[Members, Readback[CompressOutput]]]:
        """Dispatches the compression of rows; lane i of an output belongs to entry i of its members."""
        for entry in entries:
            if "reconstruction" in entry.request.compression.policy.records:
                with blaming([entry.request]):
                    for work in self.reconstruction.batches(entry):
                        self.cache = self.steps.reconstruct(self.params, self.cache, work, self.implementation)
        outputs = []
        for members, spec, batch in compress_calls(
            entries,
            self.eviction_shapes,
            moment_slots=self._moment_slots,
        ):
            assert self.state.record is not None, "only caches that can evict are given rows to compress"
            with blaming(entry.request for entry in members):
                self.cache, output = self.steps.compress(self.params, self.cache, self.state.record, batch, spec)
            outputs.append((members, output))
        for entry in entries:
            self._moment_slots.take_back(entry.request.request_id)
        return outputs

    def evict(self, entries: Sequence[Evict]) -> list[tuple[Sequence[Evict], Readback[EvictOutput]]]:
        """Dispatches per-step evictions; lane i of an output belongs to entry i of its members."""
        outputs = []
        for members, spec, batch in evict_calls(entries, self.eviction_shapes):
            assert self.state.record is not None, "only caches that can evict are given rows to evict from"
            with blaming(entry.request for entry in members):
                self.cache, record, output = self.steps.evict(self.cache, self.state.record, batch, spec)
            self.state = replace(self.state, record=record)
            outputs.append((members, output))
        return outputs

    def compress_rings(self, entries: Sequence[FullRing]) -> list[tuple[Sequence[FullRing], Readback[StoreOutput]]]:
        """Dispatches the compression of full rings."""
        outputs = []
        for first in range(0, len(entries), RING_ROWS[-1]):
            some = entries[first : first + RING_ROWS[-1]]
            work = np.zeros((2, buckets.bucket(len(some), RING_ROWS)), np.int32)
            work[:, : len(some)] = np.transpose([(each.request.row or 0, each.text_length) for each in some])
            outputs.append((some, self._compress_rings((work[0], work[1]))))
        return outputs

    def _compress_rings(self, work: tuple[np.ndarray, np.ndarray]) -> Readback[StoreOutput]:
        steps = self.steps
        self.cache, output = steps.compress_rings(self.params, self.cache, work, self.store, self.implementation)
        return output

    def measure(self) -> Readback[Measured]:
        """Dispatches a count of what is free and what every row holds."""
        return self.steps.measure(self.cache, self.state.record.hole if self.state.record else None)

    def release(self, rows: Sequence[int]) -> None:
        """Gives the rows' pages back."""
        for first in range(0, len(rows), RELEASE_ROWS):
            some = list(rows[first : first + RELEASE_ROWS])
            some += [0] * (RELEASE_ROWS - len(some))
            self.cache = self.steps.release(self.cache, jnp.asarray(np.asarray(some, np.int32)))

    def fork(self, forks: Sequence[Fork]) -> list[jax.Array]:
        """Gives rows the first tokens of others. Returns bool[] values that are all true if nothing went wrong."""
        succeeded = []
        for first in range(0, len(forks), FORK_ROWS):
            some = list(forks[first : first + FORK_ROWS])
            lanes = np.zeros((3, FORK_ROWS), np.int32)
            lanes[:, : len(some)] = np.transpose([(each.source, each.target, each.count) for each in some])
            record = self.state.record
            hole = None if record is None else record.hole
            self.cache, hole, ok = self.steps.fork(self.cache, hole, *lanes, self.implementation)
            if record is not None and hole is not None:
                self.state = replace(self.state, record=replace(record, hole=hole))
            succeeded.append(ok)
        return succeeded

    def idle_rings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, lengths) of every size of `compress_rings`; none unless requests are stored compressed."""
        sizes = [] if self.store is None else RING_ROWS
        return [(np.zeros(size, np.int32), np.zeros(size, np.int32)) for size in sizes]

    def warm_up_rings(self) -> None:
        """Compiles the compression of full rings, on the null row."""
        for work in self.idle_rings():
            self._compress_rings(work)

    def idle_steps(self) -> list[tuple[Callable, Any]]:
        """(step, work) of every model step and every size, with work that names the null row only."""
        steps = self.steps

        def decodes(lanes: int) -> tuple:
            rows = np.zeros(lanes, np.int32)
            return (rows, self._forced((), {}, lanes)) if self.can_force else (rows,)

        return [
            *((steps.prefill, self._pack([], size=size)) for size in self.prefill_buckets),
            *((steps.decode, decodes(lanes)) for lanes in self.decode_buckets),
            *((steps.mixed, (self._pack([], size=size), *decodes(lanes))) for size, lanes in self.mixed_shapes),
        ]

    def _pack(self, chunks: Sequence[Chunk], *, size: int | None = None) -> PrefillBatch:
        if size is None:
            size = buckets.bucket(sum(chunk.count for chunk in chunks), self.prefill_buckets)
        if self.can_evict:
            self._moment_slots.give(chunks)
        return pack(
            chunks,
            size=size,
            segments=self.max_prefill_seqs,
            eos_token_ids=self.eos_token_ids,
            moment_slots=self._moment_slots if self.can_evict else None,
            stores=self.store is not None,
            selections=self.selections,
        )

    def _forced(self, requests: Sequence[Request], forced: Mapping[Request, int], lanes: int) -> jax.Array:
        """i32[lanes]: the tokens that requests go on with, -1 elsewhere."""
        if not forced:
            if lanes not in self._unforced:
                self._unforced[lanes] = jnp.full(lanes, -1, jnp.int32)
            return self._unforced[lanes]
        tokens = np.full(lanes, -1, np.int32)
        tokens[: len(requests)] = [forced.get(request, -1) for request in requests]
        return jax.device_put(tokens)
