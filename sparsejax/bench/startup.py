"""Starting an engine on weights that are in memory: the time it takes, what is compiled, and what is left for pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from sparsejax.bench.compilations import watch_compilations
from sparsejax.engine.execution.compile_ahead import compiler_threads
from sparsejax.engine.execution.memory import tree_bytes
from sparsejax.engine.execution.warm_up import warm_up
from sparsejax.engine.llm import LLM
from sparsejax.models import ModelConfig


@dataclass(frozen=True)
class Startup:
    """One start.

    Attributes:
      seconds: until the engine is ready to serve without compiling anything more.
      build_seconds: of these, before the warm-up: sizing the pool (which compiles the largest steps) and allocating.
      compile_seconds: of all, while XLA compiled or read its cache; tracing goes on meanwhile.
      compile_seconds_summed: of all programs together, which are compiled several at a time.
      compile_threads: how many at a time.
      programs: (how many, seconds) of each jitted function, slowest first.
      cache_hits: programs that came from the compilation cache on disk.
      steps: the engine's steps that were compiled, by name.
      weight_bytes, pool_bytes: device memory of the parameters, and of the pages of K and V.
      peak_bytes: most device memory in use so far, as the allocator reports; 0 where it does not report.
      card_bytes: memory of the card, as far as the allocator's share tells; 0 likewise.
      pool_share: of the card, less weights and what the steps took beside weights, cache and state, that are pages;
        None where the allocator does not report.
    """

    seconds: float
    build_seconds: float
    compile_seconds: float
    compile_seconds_summed: float
    compile_threads: int
    programs: dict[str, tuple[int, float]]
    cache_hits: int
    steps: dict[str, int]
    weight_bytes: int
    pool_bytes: int
    peak_bytes: int
    card_bytes: int
    pool_share: float | None


def use_compilation_cache(folder: Path) -> None:
    """Keeps every compiled program in `folder`, and takes from it what a process before has left there."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def measure(
    config: ModelConfig,
    params: Any,
    *,
    greedy_only: bool,
    utilization: float,
    progress: Callable[[Sequence], Iterable] = lambda steps: steps,
    **engine: Any,
) -> Startup:
    """Builds an engine and warms it up.

    Args:
      params: on the device.
      greedy_only: warm up only the variants of greedy requests that ask for nothing else.
      utilization: the share of the card that was reserved for the process.
      progress: wraps the list of programs, for a progress bar.
      engine: options of `LLM`.
    """
    jax.block_until_ready(params)
    with watch_compilations() as compiled:
        start = time.perf_counter()
        llm = LLM.from_params(config, params, **engine)
        runner = llm.engine.runner
        jax.block_until_ready(runner.cache)
        built = time.perf_counter()
        forks = llm.engine.scheduler.config.max_resident_rows > 0
        warm_up(runner, greedy_only=greedy_only, forks=forks, progress=progress)
        jax.block_until_ready(runner.cache)
        ready = time.perf_counter()
    weights, pool = tree_bytes([params]), tree_bytes([runner.cache.pool])
    stats = jax.devices()[0].memory_stats() or {}
    peak, limit = stats.get("peak_bytes_in_use", 0), stats.get("bytes_limit", 0)
    card = int(limit / utilization)
    steps_took = max(peak - weights - tree_bytes([runner.cache, runner.state]), 0)
    return Startup(
        seconds=ready - start,
        build_seconds=built - start,
        compile_seconds=compiled.wall_seconds,
        compile_seconds_summed=compiled.seconds,
        compile_threads=compiler_threads(),
        programs=compiled.by_name(),
        cache_hits=compiled.cache_hits,
        steps=dict(runner.compilations),
        weight_bytes=weights,
        pool_bytes=pool,
        peak_bytes=peak,
        card_bytes=card,
        pool_share=pool / (card - weights - steps_took) if card else None,
    )


def format_report(result: Startup) -> str:
    """What a person wants to know."""
    steps = ", ".join(f"{name} {count}" for name, count in sorted(result.steps.items()))
    share = "" if result.pool_share is None else f", {result.pool_share:.3f} of the card less weights and temporaries"
    lines = [
        f"ready in {result.seconds:.1f} s, {result.build_seconds:.1f} s of it before the warm-up; "
        f"compiler at work for {result.compile_seconds:.1f} s on {result.compile_seconds_summed:.1f} s of programs, up "
        f"to {result.compile_threads} at a time",
        f"pages {result.pool_bytes / 2**30:.1f} GiB{share}; weights {result.weight_bytes / 2**30:.1f} GiB, "
        f"peak {result.peak_bytes / 2**30:.1f} GiB",
        f"steps compiled: {steps}",
        f"programs: {sum(count for count, _ in result.programs.values())}, {result.cache_hits} of them from the cache",
    ]
    lines += [f"  {seconds:8.2f} s  {count:4d}  {name}" for name, (count, seconds) in result.programs.items()]
    return "\n".join(lines)


def as_dict(result: Startup, *, model: str) -> dict[str, Any]:
    """For JSON."""
    return {"kind": "startup", "model": model, "jax": jax.__version__, **asdict(result)}
