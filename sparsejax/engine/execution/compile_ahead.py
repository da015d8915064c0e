"""Compiles many programs at once: XLA needs no Python, so it works in threads while the next program is traced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from sparsejax.engine.execution.garbage import no_collection

MOST_THREADS = 8  # XLA has threads of its own for every program


def compiler_threads() -> int:
    """How many programs are compiled at a time."""
    return min(MOST_THREADS, os.cpu_count() or 1)


def compile_ahead(
    programs: Sequence[tuple[Any, tuple]], *, progress: Callable[[Sequence], Iterable] = lambda programs: programs
) -> list[Any]:
    """Compiles jitted functions for arguments that they will be called with. A call then finds its program ready.

    Everything is traced in the calling thread, whose contexts (meshes, default precisions) decide what is traced. `jit`
    keeps what `lower` traced and what `compile` made of it, so that a call neither traces nor compiles again, unless
    the types, shardings or static arguments of the call are others.

    Args:
      programs: (jitted function, arguments) of each; nothing is run and nothing donated.
      progress: wraps the list, for a progress bar; an item is done when it has been compiled.

    Returns:
      The `jax.stages.Compiled` of each program, which may be dropped.
    """
    ticks = iter(progress(programs))
    next(ticks, None)  # a bar counts an item when it is asked for the next
    running: set[Future] = set()
    futures: list[Future] = []
    pool = ThreadPoolExecutor(compiler_threads(), thread_name_prefix="compile")
    try:
        with no_collection():
            for function, arguments in programs:
                futures.append(pool.submit(function.lower(*arguments).compile))
                running.add(futures[-1])
                running = _count_finished(running, ticks, timeout=0)
        while running:
            running = _count_finished(running, ticks, timeout=None)
    finally:
        pool.shutdown(cancel_futures=True)  # of an error, which ends the start
    return [future.result() for future in futures]


def _count_finished(running: set[Future], ticks: Any, timeout: float | None) -> set[Future]:
    """Advances the bar for those that have finished, and returns the others.

    Raises:
      What compiling one of them raised.
    """
    finished, others = wait(running, timeout=timeout, return_when=FIRST_COMPLETED)
    for future in finished:
        future.result()
        next(ticks, None)
    return others
