"""Which programs XLA compiles, how long that takes, and what JAX's compilation cache on disk spares."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"


@dataclass
class Compilations:
    """What has been compiled so far.

    Attributes:
      programs: (name of the jitted function, seconds) of each program compiled, or taken from the cache on disk. Of
        those that were compiled at a time, each counts its own seconds.
      spans: (start, end) of each, as `time.perf_counter` counts.
      cache_hits: how many of them came from there.
    """

    programs: list[tuple[str, float]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    cache_hits: int = 0

    @property
    def seconds(self) -> float:
        """Of all programs together, as if they had been compiled one after another."""
        return sum(seconds for _, seconds in self.programs)

    @property
    def wall_seconds(self) -> float:
        """While at least one program was being compiled."""
        total, reached = 0.0, float("-inf")
        for start, end in sorted(self.spans):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total

    def by_name(self) -> dict[str, tuple[int, float]]:
        """(programs, seconds) of each function, those that took longest first."""
        totals: dict[str, tuple[int, float]] = {}
        for name, seconds in self.programs:
            count, before = totals.get(name, (0, 0.0))
            totals[name] = (count + 1, before + seconds)
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


@contextlib.contextmanager
def watch_compilations() -> Iterator[Compilations]:
    """Yields what fills while the context lasts."""
    seen, lock = Compilations(), threading.Lock()

    def timed(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILE_EVENT:
            now = time.perf_counter()
            with lock:
                seen.programs.append((str(kwargs.get("fun_name", "?")), duration_secs))
                seen.spans.append((now - duration_secs, now))

    def happened(event: str, **kwargs: Any) -> None:
        del kwargs
        with lock:
            seen.cache_hits += event == _HIT_EVENT

    jax.monitoring.register_event_duration_secs_listener(timed)
    jax.monitoring.register_event_listener(happened)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(timed)
        jax.monitoring.unregister_event_listener(happened)
