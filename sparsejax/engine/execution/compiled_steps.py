"""The jitted steps of a decoder, and how often each was traced."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from sparsejax.cache import DeltaCache, KVCache, fork, release, release_delta
from sparsejax.engine.programs.compression import (
    CompressOutput,
    EvictOutput,
    Measured,
    compress_rows,
    evict_rows,
    measure,
)
from sparsejax.engine.programs.delta_compress import StoreOutput, compress_full_rings
from sparsejax.engine.programs.readback import Readback
from sparsejax.engine.programs.reconstruction import reconstruct
from sparsejax.engine.programs.recording import RecordState
from sparsejax.engine.programs.state import DecodeState, StepOutput
from sparsejax.engine.programs.steps import decode_step, mixed_step, prefill_step
from sparsejax.models import Decoder


def compiler_options() -> dict[str, str]:
    """XLA's options for steps on this backend."""
    # Rematerialisation counts a donated pool twice, and so spends compile time on saving memory that is not short.
    passes = ["rematerialization"]
    if jax.default_backend() == "cpu":
        passes.append("cse_barrier_expander")  # would drop the barriers of `in_order`: pools read late would be copied
    return {
        "xla_disable_hlo_passes": ",".join(passes),
        # Kernels of a graph wait for those whose buffers they use, not for all before them: what an observation layer
        # chooses is computed beside the products that follow it.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    }


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

    prefill: Callable[..., tuple[KVCache, DecodeState, Readback[StepOutput]]]
    decode: Callable[..., tuple[KVCache, DecodeState, Readback[StepOutput]]]
    mixed: Callable[..., tuple[KVCache, DecodeState, Readback[StepOutput]]]
    release: Callable[[KVCache, jax.Array], KVCache]
    fork: Callable[..., tuple[KVCache, jax.Array | None, jax.Array]]
    compress: Callable[..., tuple[KVCache, Readback[CompressOutput]]]
    reconstruct: Callable[..., KVCache]
    evict: Callable[..., tuple[KVCache, RecordState, Readback[EvictOutput]]]
    measure: Callable[..., Readback[Measured]]
    compress_rings: Callable[..., tuple[DeltaCache, Readback[StoreOutput]]]
    compilations: Counter[str]


@functools.lru_cache(maxsize=16)
def compiled_steps(decoder: Decoder) -> CompiledSteps:
    """The steps of a decoder; engines of equal decoders share them, and so what has been compiled."""
    compilations: Counter[str] = Counter()
    xla_options = compiler_options()

    def counted(name: str, function: Callable, **jit_options: Any) -> Callable:
        def run(*args):
            compilations[name] += 1  # runs when traced, and is no part of what is compiled
            return function(*args)

        run.__name__ = name  # what profiles and compile times are listed by
        return jax.jit(run, **jit_options)

    def model_step(name: str, step: Callable) -> Callable:
        def run(params, cache, state, work, options):
            work = work if isinstance(work, tuple) else (work,)
            cache, state, output = step(params, cache, state, *work, decoder=decoder, options=options)
            return cache, state, Readback.of(output)

        return counted(name, run, static_argnums=4, donate_argnums=(1, 2), compiler_options=xla_options)

    def run_fork(cache, hole, source, target, count, implementation):
        cache, ok = fork(cache, source, target, count, implementation=implementation)
        # Whoever had the target row before may have left a dead slot to fill.
        return cache, None if hole is None else hole.at[:, target].set(-1), ok

    def run_compress(params, cache, record, batch, spec):
        cache, output = compress_rows(params, cache, record, batch, decoder=decoder, spec=spec)
        return cache, Readback.of(output)

    def run_reconstruct(params, cache, batch, implementation):
        return reconstruct(params, cache, batch, decoder=decoder, implementation=implementation)

    def run_evict(cache, record, batch, spec):
        cache, record, output = evict_rows(cache, record, batch, spec=spec)
        return cache, record, Readback.of(output)

    def run_release(cache, rows):
        return release_delta(cache, rows) if isinstance(cache, DeltaCache) else release(cache, rows)

    def run_rings(params, cache, work, spec, implementation):
        cache, output = compress_full_rings(params, cache, *work, spec=spec, implementation=implementation)
        return cache, Readback.of(output)

    def run_measure(cache, hole):
        return Readback.of(measure(cache, hole))

    return CompiledSteps(
        prefill=model_step("prefill", prefill_step),
        decode=model_step("decode", decode_step),
        mixed=model_step("mixed", mixed_step),
        release=counted("release", run_release, donate_argnums=0),
        fork=counted("fork", run_fork, static_argnums=5, donate_argnums=(0, 1)),
        compress=counted("compress", run_compress, static_argnums=4, donate_argnums=1),
        reconstruct=counted(
            "reconstruct", run_reconstruct, static_argnums=3, donate_argnums=1, compiler_options=xla_options
        ),
        evict=counted("evict", run_evict, static_argnums=3, donate_argnums=(0, 1)),
        measure=counted("measure", run_measure),
        compress_rings=counted(
            "compress_rings",
            run_rings,
            static_argnums=(3, 4),
            donate_argnums=1,
            compiler_options=xla_options,
        ),
        compilations=compilations,
    )
