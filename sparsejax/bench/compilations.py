"""Which programs XLA compiles, how long that takes, and what JAX's compilation cache on disk spares."""

from __future__ import annotations

import contextlib
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
      programs: (name of the jitted function, seconds) of each program compiled, or taken from the cache on disk.
      cache_hits: how many of them came from there.
    """

    programs: list[tuple[str, float]] = field(default_factory=list)
    cache_hits: int = 0

    @property
    def seconds(self) -> float:
        """Of all programs together."""
        return sum(seconds for _, seconds in self.programs)

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
    seen = Compilations()

    def timed(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILE_EVENT:
            seen.programs.append((str(kwargs.get("fun_name", "?")), duration_secs))

    def happened(event: str, **kwargs: Any) -> None:
        del kwargs
        seen.cache_hits += event == _HIT_EVENT

    jax.monitoring.register_event_duration_secs_listener(timed)
    jax.monitoring.register_event_listener(happened)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(timed)
        jax.monitoring.unregister_event_listener(happened)
