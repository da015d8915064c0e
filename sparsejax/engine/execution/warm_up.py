"""Makes an engine ready: compiles every program that serving may need, and runs each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax

from sparsejax.engine.execution.compile_ahead import compile_ahead
from sparsejax.engine.execution.eviction_batches import idle_compress_calls, idle_evict_calls
from sparsejax.engine.execution.runner import Runner
from sparsejax.engine.programs.state import DecodeState
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.scheduling.plan import Fork
from sparsejax.methods import KVzip


def warm_up(
    runner: Runner,
    *,
    greedy_only: bool = False,
    forks: bool = False,
    compression: CompressionParams | None = None,
    uniform: bool = False,
    texts: tuple[int, int] | None = None,
    progress: Callable[[Sequence], Iterable] = lambda steps: steps,
) -> None:
    """Compiles every step variant, many at a time, and runs each on the null row, which leaves no trace.

    They are run because the first run of a program is what loads it onto the device. The cache is given up while they
    are compiled, and made anew: XLA tries candidates of its kernels on the device, and needs memory for that.

    Args:
      runner: of an engine that has no requests, and nothing resident.
      greedy_only: only the variants of requests that take the likeliest token and ask for nothing else.
      forks: rows will be forked.
      compression: what requests will ask for, if it is known; the programs of others are compiled when needed.
      uniform: all of them will, so that mixtures with others are left out.
      texts: tokens of the shortest and the longest text that will be compressed; None: any.
      progress: wraps the list of programs, for a progress bar.
    """
    steps = runner.steps
    calls = [
        (step, work, options)
        for step, work in runner.idle_steps()
        for options in runner.variants.every(
            with_chunk=step is not steps.decode,
            with_decode=step is not steps.prefill,
            asked=compression or CompressionParams(),
            uniform=uniform,
        )
        if options.plain or not greedy_only
    ]
    eviction = None
    if compression is not None and compression.evicts:
        eviction = _Eviction(runner, compression, texts)
    runner.close()
    cache, state = runner.shapes()
    programs = [
        *((step, (runner.params, cache, state, work, options)) for step, work, options in calls),
        *(
            (steps.compress_rings, (runner.params, cache, work, runner.store, runner.implementation))
            for work in runner.idle_rings()
        ),
        *(eviction.programs(cache, state) if eviction else []),
    ]
    compile_ahead(programs, progress=progress)
    runner.reset()
    for step, work, options in calls:
        runner.cache, runner.state, _ = step(runner.params, runner.cache, runner.state, work, options)
    runner.release([0])
    if forks:
        runner.fork([Fork(0, 0, 0)])
    runner.warm_up_rings()
    if eviction:
        eviction.run()
    jax.block_until_ready(jax.tree.leaves(runner.cache)[-1])


class _Eviction:
    """The programs that evict as a request with these parameters asks, for all sizes."""

    def __init__(self, runner: Runner, compression: CompressionParams, texts: tuple[int, int] | None) -> None:
        self._runner = runner
        self._evict = list(idle_evict_calls(compression, runner.eviction_shapes, texts=texts))
        self._compress = list(idle_compress_calls(compression, runner.eviction_shapes, texts=texts))
        self._reconstruct = []
        if isinstance(compression.policy, KVzip):
            self._reconstruct = list(runner.reconstruction.idle_batches(compression.policy))

    def programs(self, cache: Any, state: DecodeState) -> list[tuple[Any, tuple]]:
        """For `compile_ahead`; cache and state may be shapes."""
        runner, steps, record = self._runner, self._runner.steps, state.record
        return [
            *((steps.reconstruct, (runner.params, cache, work, runner.implementation)) for work in self._reconstruct),
            *((steps.compress, (runner.params, cache, record, batch, spec)) for spec, batch in self._compress),
            *((steps.evict, (cache, record, batch, spec)) for spec, batch in self._evict),
        ]

    def run(self) -> None:
        """Runs each."""
        runner, steps, record = self._runner, self._runner.steps, self._runner.state.record
        assert record is not None, "the engine is built for the method"
        for spec, batch in self._evict:
            runner.cache, record, _ = steps.evict(runner.cache, record, batch, spec)
            runner.state = replace(runner.state, record=record)
        for spec, batch in self._compress:
            runner.cache, _ = steps.compress(runner.params, runner.cache, record, batch, spec)
        for work in self._reconstruct:
            runner.cache = steps.reconstruct(runner.params, runner.cache, work, runner.implementation)
        runner.measure()
