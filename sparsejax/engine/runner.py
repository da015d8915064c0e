"""Runs the compiled steps: packs what the scheduler planned into padded arrays, dispatches, and never waits.

The runner owns the device side of an engine (parameters, cache, state). Its methods return device values that are still
being computed; the engine reads them a step later.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import (
    CacheLayout,
    DeltaCache,
    DeltaCacheLayout,
    KVCache,
    fork,
    init_cache,
    init_delta_cache,
    release,
    release_delta,
)
from sparsejax.engine import buckets
from sparsejax.engine.compression import CompressOutput, EvictOutput, Measured, compress_rows, evict_rows, measure
from sparsejax.engine.compression_params import CompressionParams
from sparsejax.engine.delta_compress import StoreOutput, compress_full_rings
from sparsejax.engine.delta_ops import StoreSpec
from sparsejax.engine.delta_parts import StoreOptions
from sparsejax.engine.eviction_batches import (
    EvictionShapes,
    Members,
    compress_calls,
    evict_calls,
    idle_compress_calls,
    idle_evict_calls,
)
from sparsejax.engine.packing import pack
from sparsejax.engine.plan import Chunk, Compress, Evict, Fork, FullRing
from sparsejax.engine.reconstruction import Reconstruction, reconstruct
from sparsejax.engine.recording import (
    CHUNK_RECORDS,
    RecordState,
    idle_record,
    recording_for,
    watched,
)
from sparsejax.engine.request import Request
from sparsejax.engine.selection import Selecting
from sparsejax.engine.selection_plan import Selections
from sparsejax.engine.state import DecodeState, PrefillBatch, StepOutput, init_state
from sparsejax.engine.steps import StepOptions, decode_step, mixed_step, options_for, prefill_step
from sparsejax.engine.store_limits import cell_size
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import DeltaKV, KVzip
from sparsejax.models import Decoder

# Rematerialisation counts a donated pool twice, and so spends compile time on saving memory that is not short.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
RELEASE_ROWS = 8  # rows one release call takes; more are released by more calls
FORK_ROWS = 8  # likewise, forks of one call
SMALLEST_TOP = 256  # bound on the tokens that a decode selects; larger ones are powers of two
RING_ROWS = (1, 8)  # rows whose rings one call may compress
NONE_FORCED: Mapping[Request, int] = {}


@dataclass(frozen=True)
class CompiledSteps:
    """The jitted steps of one decoder. Each is compiled once for every combination of shapes and options.

    Attributes:
      prefill, decode, mixed: (params, cache, state, work, options) -> (cache, state, output), cache and state donated;
        work is the batch, the rows, or (batch, rows).
      release: (cache, rows) -> cache; cache donated.
      fork: (cache, hole, source, target, count, implementation) -> (cache, hole, ok); cache and hole donated.
      compress: (params, cache, record, batch, spec) -> (cache, output); cache donated.
      reconstruct: (params, cache, batch, implementation) -> cache; cache donated.
      evict: (cache, record, batch, spec) -> (cache, record, output); cache and record donated.
      measure: (cache, hole) -> output.
      compress_rings: (params, cache, (rows, lengths), spec, implementation) -> (cache, output); cache donated.
      compilations: how often each was traced, by name. While serving after a warm-up these stay constant.
    """

    prefill: Callable[..., tuple[KVCache, DecodeState, StepOutput]]
    decode: Callable[..., tuple[KVCache, DecodeState, StepOutput]]
    mixed: Callable[..., tuple[KVCache, DecodeState, StepOutput]]
    release: Callable[[KVCache, jax.Array], KVCache]
    fork: Callable[..., tuple[KVCache, jax.Array | None, jax.Array]]
    compress: Callable[..., tuple[KVCache, CompressOutput]]
    reconstruct: Callable[..., KVCache]
    evict: Callable[..., tuple[KVCache, RecordState, EvictOutput]]
    measure: Callable[..., Measured]
    compress_rings: Callable[..., tuple[DeltaCache, StoreOutput]]
    compilations: Counter[str]


@functools.lru_cache(maxsize=16)
def compiled_steps(decoder: Decoder) -> CompiledSteps:
    """The steps of a decoder; engines of equal decoders share them, and so what has been compiled."""
    compilations: Counter[str] = Counter()

    def counted(name: str, function: Callable, **options: Any) -> Callable:
        def run(*args):
            compilations[name] += 1  # runs when traced, and is no part of what is compiled
            return function(*args)

        run.__name__ = name  # what profiles and compile times are listed by
        return jax.jit(run, **options)

    def model_step(name: str, step: Callable) -> Callable:
        def run(params, cache, state, work, options):
            work = work if isinstance(work, tuple) else (work,)
            return step(params, cache, state, *work, decoder=decoder, options=options)

        return counted(name, run, static_argnums=4, donate_argnums=(1, 2), compiler_options=COMPILER_OPTIONS)

    def run_fork(cache, hole, source, target, count, implementation):
        cache, ok = fork(cache, source, target, count, implementation=implementation)
        # Whoever had the target row before may have left a dead slot to fill.
        return cache, None if hole is None else hole.at[:, target].set(-1), ok

    def run_compress(params, cache, record, batch, spec):
        return compress_rows(params, cache, record, batch, decoder=decoder, spec=spec)

    def run_reconstruct(params, cache, batch, implementation):
        return reconstruct(params, cache, batch, decoder=decoder, implementation=implementation)

    def run_evict(cache, record, batch, spec):
        return evict_rows(cache, record, batch, spec=spec)

    def run_release(cache, rows):
        return release_delta(cache, rows) if isinstance(cache, DeltaCache) else release(cache, rows)

    def run_rings(params, cache, work, spec, implementation):
        return compress_full_rings(params, cache, *work, spec=spec, implementation=implementation)

    return CompiledSteps(
        prefill=model_step("prefill", prefill_step),
        decode=model_step("decode", decode_step),
        mixed=model_step("mixed", mixed_step),
        release=counted("release", run_release, donate_argnums=0),
        fork=counted("fork", run_fork, static_argnums=5, donate_argnums=(0, 1)),
        compress=counted("compress", run_compress, static_argnums=4, donate_argnums=1),
        reconstruct=counted(
            "reconstruct", run_reconstruct, static_argnums=3, donate_argnums=1, compiler_options=COMPILER_OPTIONS
        ),
        evict=counted("evict", run_evict, static_argnums=3, donate_argnums=(0, 1)),
        measure=counted("measure", measure),
        compress_rings=counted(
            "compress_rings",
            run_rings,
            static_argnums=(3, 4),
            donate_argnums=1,
            compiler_options=COMPILER_OPTIONS,
        ),
        compilations=compilations,
    )


class Runner:
    """The device side of an engine: one model's steps over one cache.

    Args:
      records: what methods may have recorded (`Method.records`).
      may_evict_per_step: some method evicts at every decode step.
      selecting: methods that select what decoding reads, which requests may use.
      instructions: token ids that ask for the first part of a text, and for the others, in reconstruction passes.
      store: how requests are stored compressed; given with the layout of a `DeltaCache`, and params that have the
        compressor's.
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
        self.may_watch = "decode" in records or may_evict_per_step
        self.selecting = tuple(selecting)
        self.selections: Selections | None = None
        if selecting and isinstance(layout, CacheLayout):
            slots = layout.max_entries_per_row * layout.page_size
            self.selections = Selections(decoder.config, max_slots=slots, page_size=layout.page_size)
        self._eviction_shapes = EvictionShapes(
            layout=layout.full if isinstance(layout, DeltaCacheLayout) else layout,
            num_query_heads=decoder.config.num_heads,
            compress_rows=max_prefill_seqs,
            evict_rows=self.decode_buckets,
            implementation=implementation,
        )
        self._reconstruction = Reconstruction(*instructions, longest=self._eviction_shapes.slots[-1])
        self.cache: Any  # KVCache or DeltaCache
        self.state: DecodeState
        self.reset()
        self._steps = compiled_steps(decoder)  # pyright: ignore[reportArgumentType]
        self._decode_rows: tuple[tuple[int, ...], jax.Array] = ((), jnp.zeros(1, jnp.int32))
        self._unforced: dict[int, jax.Array] = {}

    def reset(self) -> None:
        """An empty cache and an idle state, whatever became of those before."""
        self.close()  # first, for there is no room for two
        layout, record = self.layout, None
        if isinstance(layout, DeltaCacheLayout):
            self.cache = init_delta_cache(layout)
        else:
            self.cache = init_cache(layout)
            record = idle_record(layout, self.decoder.config, self.records, self.max_prefill_seqs)
        self.state = init_state(
            layout.num_rows,
            self.decoder.config.vocab_size,
            record,
            selects=self.selections is not None,
            stores=self.store is not None,
        )
        self._moment_slots: dict[str, int] = {}  # of requests whose prompt is being computed

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
        return Counter(self._steps.compilations)

    def check(self, compression: CompressionParams) -> None:
        """Raises unless the model's layers are what a request asks for.

        Raises:
          InvalidArgumentError: they are not, or the engine was not built for methods that select.
        """
        own = compression.policy
        if isinstance(own, DeltaKV) and isinstance(self.layout, DeltaCacheLayout):
            layers = self.layout.full_layers
            if own.full_attention_layers not in (None, layers):
                raise InvalidArgumentError(
                    f"full_attention_layers is {own.full_attention_layers}; the engine was built with {layers}, which "
                    "decide how its pools are laid out."
                )
        if not compression.selects:
            return
        if self.selections is None:
            raise InvalidArgumentError(
                f"method {compression.method!r} selects, and the engine was built without: name it in methods."
            )
        self.selections.roles_of(compression)

    def read_tokens(self, request: Request) -> float | None:
        """Tokens that a decode step of a request has read, mean over layers and steps.

        None if it took no such step, or if it evicts: the tokens that it keeps are what it reads.
        """
        prompt = len(request.prompt_token_ids)
        lengths = np.arange(
            request.compression.prefilled(prompt) + 1, prompt + len(request.output_token_ids), dtype=np.int32
        )
        if not lengths.size or request.compression.evicts:
            return None
        if self.selections is not None and request.compression.selects:
            lengths = self.selections.read_tokens(request.compression, lengths)
        elif self.store is not None and isinstance(request.compression.policy, DeltaKV):
            lengths = self._tokens_read(request.compression.policy, lengths)
        return float(lengths.mean())

    def _tokens_read(self, method: DeltaKV, lengths: np.ndarray) -> np.ndarray:
        """f64 like lengths: tokens that a decode of a compressed request reads, mean over the layers."""
        assert self.store is not None
        assert isinstance(self.layout, DeltaCacheLayout)
        history = np.asarray(self.store.geometry.history_at_query(lengths))
        sinks = np.minimum(history, self.store.geometry.sinks)
        sparse = lengths - history + sinks + [method.wanted(int(each)) for each in history - sinks]
        whole = len(self.layout.full_layers) / self.layout.num_layers
        return whole * lengths + (1 - whole) * sparse

    def prefill(self, chunks: Sequence[Chunk]) -> StepOutput:
        """Dispatches a prefill step; lane i of the output belongs to chunks[i], prompt lanes follow the packing."""
        batch = self._pack(chunks)
        options = self._options(chunks, ())
        self.cache, self.state, output = self._steps.prefill(self.params, self.cache, self.state, batch, options)
        return output

    def decode(self, requests: Sequence[Request], forced: Mapping[Request, int] = NONE_FORCED) -> StepOutput:
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
        options = self._options((), requests)
        self.cache, self.state, output = self._steps.decode(self.params, self.cache, self.state, work, options)
        return output

    def mixed_shape(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> tuple[int, int] | None:
        """(packed tokens, decode lanes) of the one step that does both, or None where two steps are as good."""
        if not chunks or not requests:
            return None
        return buckets.mixed_shape(sum(chunk.count for chunk in chunks), len(requests), self.mixed_shapes)

    def mixed(
        self, chunks: Sequence[Chunk], requests: Sequence[Request], forced: Mapping[Request, int] = NONE_FORCED
    ) -> StepOutput:
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
        options = self._options(chunks, requests)
        work = (self._pack(chunks, size=size), rows)
        if self.can_force:
            work = (*work, self._forced(requests, forced, lanes))
        self.cache, self.state, output = self._steps.mixed(self.params, self.cache, self.state, work, options)
        return output

    def compress(self, entries: Sequence[Compress]) -> list[tuple[Members, CompressOutput]]:
        """Dispatches the compression of rows; lane i of an output belongs to entry i of its members."""
        for entry in entries:
            if "reconstruction" in entry.request.compression.policy.records:
                for work in self._reconstruction.batches(entry):
                    self.cache = self._steps.reconstruct(self.params, self.cache, work, self.implementation)
        outputs = []
        for members, spec, batch in compress_calls(
            entries,
            self._eviction_shapes,
            moment_slots=self._moment_slots,
        ):
            assert self.state.record is not None, "only caches that can evict are given rows to compress"
            self.cache, output = self._steps.compress(self.params, self.cache, self.state.record, batch, spec)
            outputs.append((members, output))
        for entry in entries:
            self._moment_slots.pop(entry.request.request_id, None)
        return outputs

    def evict(self, entries: Sequence[Evict]) -> list[tuple[Sequence[Evict], EvictOutput]]:
        """Dispatches per-step evictions; lane i of an output belongs to entry i of its members."""
        outputs = []
        for members, spec, batch in evict_calls(entries, self._eviction_shapes):
            assert self.state.record is not None, "only caches that can evict are given rows to evict from"
            self.cache, record, output = self._steps.evict(self.cache, self.state.record, batch, spec)
            self.state = replace(self.state, record=record)
            outputs.append((members, output))
        return outputs

    def compress_rings(self, entries: Sequence[FullRing]) -> list[tuple[Sequence[FullRing], StoreOutput]]:
        """Dispatches the compression of full rings."""
        outputs = []
        for first in range(0, len(entries), RING_ROWS[-1]):
            some = entries[first : first + RING_ROWS[-1]]
            work = np.zeros((2, buckets.bucket(len(some), RING_ROWS)), np.int32)
            work[:, : len(some)] = np.transpose([(each.request.row or 0, each.text_length) for each in some])
            outputs.append((some, self._compress_rings(work)))
        return outputs

    def _compress_rings(self, work: np.ndarray) -> StoreOutput:
        steps = self._steps
        self.cache, output = steps.compress_rings(
            self.params, self.cache, (work[0], work[1]), self.store, self.implementation
        )
        return output

    def measure(self) -> Measured:
        """Dispatches a count of what is free and what every row holds."""
        return self._steps.measure(self.cache, self.state.record.hole if self.state.record else None)

    def release(self, rows: Sequence[int]) -> None:
        """Gives the rows' pages back."""
        for first in range(0, len(rows), RELEASE_ROWS):
            some = list(rows[first : first + RELEASE_ROWS])
            some += [0] * (RELEASE_ROWS - len(some))
            self.cache = self._steps.release(self.cache, jnp.asarray(np.asarray(some, np.int32)))

    def fork(self, forks: Sequence[Fork]) -> list[jax.Array]:
        """Gives rows the first tokens of others. Returns bool[] values that are all true if nothing went wrong."""
        succeeded = []
        for first in range(0, len(forks), FORK_ROWS):
            some = list(forks[first : first + FORK_ROWS])
            lanes = np.zeros((3, FORK_ROWS), np.int32)
            lanes[:, : len(some)] = np.transpose([(each.source, each.target, each.count) for each in some])
            record = self.state.record
            hole = None if record is None else record.hole
            self.cache, hole, ok = self._steps.fork(self.cache, hole, *lanes, self.implementation)
            if record is not None and hole is not None:
                self.state = replace(self.state, record=replace(record, hole=hole))
            succeeded.append(ok)
        return succeeded

    def warm_up(
        self,
        *,
        greedy_only: bool = False,
        forks: bool = False,
        compression: CompressionParams | None = None,
        uniform: bool = False,
        texts: tuple[int, int] | None = None,
        progress: Callable[[Sequence], Iterable] = lambda steps: steps,
    ) -> None:
        """Compiles and runs every step variant on the null row, which leaves no trace.

        Args:
          greedy_only: only the variants of requests that take the likeliest token and ask for nothing else.
          forks: rows will be forked.
          compression: what requests will ask for, if it is known; the programs of others are compiled when needed.
          uniform: all of them will, so that mixtures with others are left out.
          texts: tokens of the shortest and the longest text that will be compressed; None: any.
          progress: wraps the list of variants, for a progress bar.
        """
        variants = [
            (step, work, options)
            for step, work in self._shapes()
            for options in self._variants(
                with_chunk=step is not self._steps.decode,
                with_decode=step is not self._steps.prefill,
                asked=compression or CompressionParams(),
                uniform=uniform,
            )
            if options.plain or not greedy_only
        ]
        for step, work, options in progress(variants):
            self.cache, self.state, _ = step(self.params, self.cache, self.state, work, options)
        self.release([0])
        if forks:
            self.fork([Fork(0, 0, 0)])
        if self.store is not None:
            self.warm_up_rings()
        if compression is not None and compression.evicts:
            self._warm_up_eviction(compression, texts)
        jax.block_until_ready(jax.tree.leaves(self.cache)[-1])

    def warm_up_rings(self) -> None:
        """Compiles the compression of full rings, on the null row; only where requests are stored compressed."""
        for rows in RING_ROWS:
            self._compress_rings(np.zeros((2, rows), np.int32))

    def _shapes(self) -> list[tuple[Callable, Any]]:
        """Every model step with an idle batch of every size."""
        steps = self._steps

        def decodes(lanes: int) -> tuple:
            rows = np.zeros(lanes, np.int32)
            return (rows, self._forced((), {}, lanes)) if self.can_force else (rows,)

        return [
            *((steps.prefill, self._pack([], size=size)) for size in self.prefill_buckets),
            *((steps.decode, decodes(lanes)) for lanes in self.decode_buckets),
            *((steps.mixed, (self._pack([], size=size), *decodes(lanes))) for size, lanes in self.mixed_shapes),
        ]

    def _warm_up_eviction(self, compression: CompressionParams, texts: tuple[int, int] | None) -> None:
        """Compiles the programs that evict as a request with these parameters asks, for all sizes."""
        record = self.state.record
        assert record is not None, "the engine is built for the method"
        for spec, batch in idle_evict_calls(compression, self._eviction_shapes, texts=texts):
            self.cache, record, _ = self._steps.evict(self.cache, record, batch, spec)
            self.state = replace(self.state, record=record)
        for spec, batch in idle_compress_calls(compression, self._eviction_shapes, texts=texts):
            self.cache, _ = self._steps.compress(self.params, self.cache, record, batch, spec)
        if isinstance(compression.policy, KVzip):
            for work in self._reconstruction.idle_batches(compression.policy):
                self.cache = self._steps.reconstruct(self.params, self.cache, work, self.implementation)
        self.measure()

    def _pack(self, chunks: Sequence[Chunk], *, size: int | None = None) -> PrefillBatch:
        if size is None:
            size = buckets.bucket(sum(chunk.count for chunk in chunks), self.prefill_buckets)
        if self.can_evict:
            self._take_moment_slots(chunks)
        return pack(
            chunks,
            size=size,
            segments=self.max_prefill_seqs,
            eos_token_ids=self.eos_token_ids,
            moment_slots=self._moment_slots if self.can_evict else None,
            stores=self.store is not None,
            selections=self.selections,
        )

    def _take_moment_slots(self, chunks: Sequence[Chunk]) -> None:
        """Gives requests that begin a slot for their queries' moments, until they are compressed."""
        beginning = [
            chunk.request for chunk in chunks if chunk.start == 0 and recording_for(chunk.request.compression).moments
        ]
        if not beginning:
            return
        # Requests that were preempted or cancelled in between never come to be compressed.
        alive = {chunk.request.request_id for chunk in chunks}
        self._moment_slots = {name: slot for name, slot in self._moment_slots.items() if name in alive}
        free = set(range(1, self.max_prefill_seqs + 1)) - set(self._moment_slots.values())
        for request in beginning:
            self._moment_slots[request.request_id] = free.pop()

    def _forced(self, requests: Sequence[Request], forced: Mapping[Request, int], lanes: int) -> jax.Array:
        """i32[lanes]: the tokens that requests go on with, -1 elsewhere."""
        if not forced:
            if lanes not in self._unforced:
                self._unforced[lanes] = jnp.full(lanes, -1, jnp.int32)
            return self._unforced[lanes]
        tokens = np.full(lanes, -1, np.int32)
        tokens[: len(requests)] = [forced.get(request, -1) for request in requests]
        return jax.device_put(tokens)

    def _options(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> StepOptions:
        """The cheapest step variant for chunks and decodes."""
        recording = self.can_evict and any(recording_for(chunk.request.compression).any_of_chunk for chunk in chunks)
        return options_for(
            [each.params for each in (*(chunk.request for chunk in chunks), *requests)],
            implementation=self.implementation,
            prompt_logprobs=_prompt_logprobs(chunks),
            # One variant for all that methods may ask for: lanes that do not ask cost next to nothing.
            records=self.records if recording else frozenset(),
            watch=self.can_evict and any(watched(request.compression) for request in requests),
            store=self._store_options([chunk.request.compression for chunk in chunks], requests),
            select=None if self.selections is None else self.selections.step_options(requests, mixed=bool(chunks)),
        )

    def _store_options(self, chunks: Sequence[CompressionParams], requests: Sequence[Request]) -> StoreOptions | None:
        """Whom a step serves. chunks: what the requests of its chunk ask for."""
        if self.store is None:
            return None
        decodes = [request.compression for request in requests]
        return StoreOptions(
            spec=self.store,
            chunk=any(each.compresses for each in chunks),
            dense=not decodes or not all(each.compresses for each in decodes),
            compressed=any(each.compresses for each in decodes),
            top=max((self._top(each) for each in decodes if each.compresses), default=0),
        )

    def _top(self, compression: CompressionParams) -> int:
        """Bound on the history tokens that a decode reads, whatever its text: one of few."""
        method = compression.policy
        assert isinstance(method, DeltaKV)
        assert isinstance(self.layout, DeltaCacheLayout)
        most = max(method.wanted(self.layout.full.max_slots), SMALLEST_TOP)
        return 1 << (most - 1).bit_length()

    def _variants(
        self, *, with_chunk: bool, with_decode: bool, asked: CompressionParams, uniform: bool
    ) -> list[StepOptions]:
        """Options of steps.

        Args:
          asked: what requests ask for.
          uniform: all of them do; else some may ask for anything.
        """
        details: list[dict[str, Any]] = [{"plain": True}, {"plain": False}, {"plain": False, "logprobs": True}]
        if with_chunk:
            details.append({"plain": False, "logprobs": True, "prompt_logprobs": True})
        records = [frozenset(), self.records] if with_chunk and self.records else [frozenset()]
        watch = [False, True] if with_decode and self.may_watch else [False]
        if uniform:
            records = records[-1:] if recording_for(asked).any_of_chunk else records[:1]
            watch = watch[-1:] if watched(asked) else watch[:1]
        select = self._select_variants(with_chunk, asked, uniform) if with_decode else [None]
        return [
            StepOptions(implementation=self.implementation, **detail, records=r, watch=w, select=s, store=kind)
            for detail in details
            for r in records
            for w in watch
            for s in select
            for kind in self._store_variants(with_chunk, with_decode, asked, uniform)
        ]

    def _select_variants(self, mixed: bool, asked: CompressionParams, uniform: bool) -> list[Selecting | None]:
        """How the decodes of steps may select, with these parameters or with the defaults of the other methods."""
        if self.selections is None or (uniform and not asked.selects):
            return [None]
        names = [] if uniform else [name for name in self.selecting if name != asked.method]
        wanted = [*([asked] if asked.selects else []), *self.selections.defaults(names)]
        variants = self.selections.warm_options(wanted, mixed=mixed, uniform=uniform)
        return variants if uniform else [None, *variants]

    def _store_variants(
        self, with_chunk: bool, with_decode: bool, asked: CompressionParams, uniform: bool
    ) -> list[StoreOptions | None]:
        """Whom steps over a `DeltaCache` may serve; see `_variants`."""
        if self.store is None:
            return [None]
        store = asked if asked.compresses else CompressionParams(method="deltakv")
        kinds = [(True, False), (False, True), (True, True)] if with_decode else [(True, False)]
        chunks = [False, True] if with_chunk else [False]
        if uniform:
            kinds = [(not asked.compresses, asked.compresses)] if with_decode else kinds
            chunks = [asked.compresses] if with_chunk else chunks
        return [
            StoreOptions(self.store, chunk, dense, compressed, self._top(store) if compressed else 0)
            for chunk in chunks
            for dense, compressed in kinds
        ]


def _prompt_logprobs(chunks: Sequence[Chunk]) -> bool:
    """Whether a step with these chunks returns log-probabilities of their tokens."""
    return any(chunk.request.params.prompt_logprobs is not None for chunk in chunks)
