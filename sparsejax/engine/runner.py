"""Runs the compiled steps: packs what the scheduler planned into padded arrays, dispatches, and never waits.

The runner owns the device side of an engine (parameters, cache, state). Its methods return device values that are still
being computed; the engine reads them a step later.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import CacheLayout, KVCache, fork, init_cache, release
from sparsejax.engine import buckets
from sparsejax.engine.packing import pack
from sparsejax.engine.plan import Chunk, Fork
from sparsejax.engine.request import Request
from sparsejax.engine.state import DecodeState, PrefillBatch, StepOutput, init_state
from sparsejax.engine.steps import StepOptions, decode_step, mixed_step, options_for, prefill_step
from sparsejax.models import Decoder

# Rematerialisation counts a donated pool twice, and so spends compile time on saving memory that is not short.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
RELEASE_ROWS = 8  # rows one release call takes; more are released by more calls
FORK_ROWS = 8  # likewise, forks of one call


@dataclass(frozen=True)
class CompiledSteps:
    """The jitted steps of one decoder. Each is compiled once for every combination of shapes and options.

    Attributes:
      prefill, decode, mixed: (params, cache, state, work, options) -> (cache, state, output), cache and state donated;
        work is the batch, the rows, or (batch, rows).
      release: (cache, rows) -> cache; cache donated.
      fork: (cache, source, target, count, implementation) -> (cache, ok); cache donated.
      compilations: how often each was traced, by name. While serving after a warm-up these stay constant.
    """

    prefill: Callable[..., tuple[KVCache, DecodeState, StepOutput]]
    decode: Callable[..., tuple[KVCache, DecodeState, StepOutput]]
    mixed: Callable[..., tuple[KVCache, DecodeState, StepOutput]]
    release: Callable[[KVCache, jax.Array], KVCache]
    fork: Callable[..., tuple[KVCache, jax.Array]]
    compilations: Counter[str]


@functools.lru_cache(maxsize=16)
def compiled_steps(decoder: Decoder) -> CompiledSteps:
    """The steps of a decoder; engines of equal decoders share them, and so what has been compiled."""
    compilations: Counter[str] = Counter()

    def compiled(name: str, step: Callable) -> Callable:
        def run(params, cache, state, work, options):
            compilations[name] += 1  # runs when traced, and is no part of what is compiled
            work = work if isinstance(work, tuple) else (work,)
            return step(params, cache, state, *work, decoder=decoder, options=options)

        return jax.jit(run, static_argnums=4, donate_argnums=(1, 2), compiler_options=COMPILER_OPTIONS)

    def run_release(cache, rows):
        compilations["release"] += 1
        return release(cache, rows)

    def run_fork(cache, source, target, count, implementation):
        compilations["fork"] += 1
        return fork(cache, source, target, count, implementation=implementation)

    return CompiledSteps(
        prefill=compiled("prefill", prefill_step),
        decode=compiled("decode", decode_step),
        mixed=compiled("mixed", mixed_step),
        release=jax.jit(run_release, donate_argnums=0),
        fork=jax.jit(run_fork, static_argnums=4, donate_argnums=0),
        compilations=compilations,
    )


class Runner:
    """The device side of an engine: one model's steps over one cache."""

    def __init__(
        self,
        decoder: Decoder,
        params,
        layout: CacheLayout,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_tokens: int,
        max_prefill_seqs: int,
        eos_token_ids: tuple[int, ...] = (),
        implementation: Implementation | None = None,
    ) -> None:
        self.decoder = decoder
        self.params = params
        self.layout = layout
        self.max_prefill_seqs = max_prefill_seqs
        self.eos_token_ids = eos_token_ids
        self.implementation: Implementation | None = implementation
        self.decode_buckets = buckets.decode_buckets(max_num_seqs)
        self.prefill_buckets = buckets.prefill_buckets(max_num_batched_tokens)
        self.mixed_shapes = buckets.mixed_shapes(max_mixed_tokens, max_num_seqs)
        self.cache: KVCache
        self.state: DecodeState
        self.reset()
        self._steps = compiled_steps(decoder)  # pyright: ignore[reportArgumentType]
        self._decode_rows: tuple[tuple[int, ...], jax.Array] = ((), jnp.zeros(1, jnp.int32))

    def reset(self) -> None:
        """An empty cache and an idle state, whatever became of those before."""
        self.__dict__.pop("cache", None)  # first, for there is no room for two
        self.__dict__.pop("state", None)
        self.cache = init_cache(self.layout)
        self.state = init_state(self.layout.max_rows + 1, self.decoder.config.vocab_size)

    @property
    def compilations(self) -> Counter[str]:
        """How often each step was compiled so far, by name (a copy)."""
        return Counter(self._steps.compilations)

    def prefill(self, chunks: Sequence[Chunk]) -> StepOutput:
        """Dispatches a prefill step; lane i of the output belongs to chunks[i], prompt lanes follow the packing."""
        batch = self._pack(chunks)
        options = options_for(
            [chunk.request.params for chunk in chunks],
            implementation=self.implementation,
            prompt_logprobs=_prompt_logprobs(chunks),
        )
        self.cache, self.state, output = self._steps.prefill(self.params, self.cache, self.state, batch, options)
        return output

    def decode(self, requests: Sequence[Request]) -> StepOutput:
        """Dispatches one decode step; lane i of the output belongs to requests[i]."""
        rows = [request.row or 0 for request in requests]
        rows += [0] * (buckets.bucket(len(rows), self.decode_buckets) - len(rows))
        if tuple(rows) != self._decode_rows[0]:  # most steps decode the same rows: no transfer then
            self._decode_rows = (tuple(rows), jnp.asarray(np.asarray(rows, np.int32)))
        options = options_for([request.params for request in requests], implementation=self.implementation)
        self.cache, self.state, output = self._steps.decode(
            self.params, self.cache, self.state, self._decode_rows[1], options
        )
        return output

    def mixed_shape(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> tuple[int, int] | None:
        """(packed tokens, decode lanes) of the one step that does both, or None where two steps are as good."""
        if not chunks or not requests:
            return None
        return buckets.mixed_shape(sum(chunk.count for chunk in chunks), len(requests), self.mixed_shapes)

    def mixed(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> StepOutput:
        """Dispatches a step that does what `decode(requests)` and then `prefill(chunks)` do.

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
        options = options_for(
            [each.params for each in (*(chunk.request for chunk in chunks), *requests)],
            implementation=self.implementation,
            prompt_logprobs=_prompt_logprobs(chunks),
        )
        work = (self._pack(chunks, size=size), rows)
        self.cache, self.state, output = self._steps.mixed(self.params, self.cache, self.state, work, options)
        return output

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
            self.cache, ok = self._steps.fork(self.cache, *lanes, self.implementation)
            succeeded.append(ok)
        return succeeded

    def warm_up(
        self,
        *,
        greedy_only: bool = False,
        forks: bool = False,
        progress: Callable[[Sequence], Iterable] = lambda steps: steps,
    ) -> None:
        """Compiles and runs every step variant on the null row, which leaves no trace.

        Args:
          greedy_only: only the variants of requests that take the likeliest token and ask for nothing else.
          forks: rows will be forked.
          progress: wraps the list of variants, for a progress bar.
        """
        steps = self._steps
        work = [(steps.prefill, self._pack([], size=size)) for size in self.prefill_buckets]
        work += [(steps.decode, jnp.zeros(size, jnp.int32)) for size in self.decode_buckets]
        work += [(steps.mixed, (self._pack([], size=size), np.zeros(n, np.int32))) for size, n in self.mixed_shapes]
        variants = [
            (step, batch, options)
            for step, batch in work
            for options in self._variants(with_chunk=step is not steps.decode)
            if options.plain or not greedy_only
        ]
        for step, batch, options in progress(variants):
            self.cache, self.state, _ = step(self.params, self.cache, self.state, batch, options)
        self.release([0])
        if forks:
            self.fork([Fork(0, 0, 0)])
        jax.block_until_ready(self.cache.free.count)

    def _pack(self, chunks: Sequence[Chunk], *, size: int | None = None) -> PrefillBatch:
        if size is None:
            size = buckets.bucket(sum(chunk.count for chunk in chunks), self.prefill_buckets)
        return pack(chunks, size=size, segments=self.max_prefill_seqs, eos_token_ids=self.eos_token_ids)

    def _variants(self, *, with_chunk: bool) -> list[StepOptions]:
        details = [{"plain": True}, {"plain": False}, {"plain": False, "logprobs": True}]
        if with_chunk:
            details.append({"plain": False, "logprobs": True, "prompt_logprobs": True})
        return [StepOptions(implementation=self.implementation, **detail) for detail in details]


def _prompt_logprobs(chunks: Sequence[Chunk]) -> bool:
    """Whether a step with these chunks returns log-probabilities of their tokens."""
    return any(chunk.request.params.prompt_logprobs is not None for chunk in chunks)
