"""Timing that means something: warm, repeated, finished before the clock stops; the median and its spread."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the repeats, and the range of the middle half."""

    median: float
    low: float
    high: float
    repeats: int

    @property
    def spread(self) -> float:
        """Width of the middle half, as a fraction of the median."""
        return (self.high - self.low) / self.median


def summary(seconds: list[float]) -> Timing:
    """Median and quartiles of measured seconds."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


def time_calls(call: Callable[[int], Any], *, repeats: int = 7, calls: int = 8, warmup: int = 2) -> Timing:
    """Seconds of one call on the device, the gaps between dispatches hidden by running `calls` of them in a row.

    Args:
      call: given the number of the call, dispatches it and returns its result. Rotating among inputs by that number
        keeps them out of the cache.
    """
    for i in range(warmup):
        jax.block_until_ready(call(i))
    seconds = []
    for repeat in range(repeats):
        start = time.perf_counter()
        result = None
        for i in range(calls):
            result = call(repeat * calls + i)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / calls)
    return summary(seconds)


def device_seconds(call: Callable[[int], Any], *, calls: int = 3) -> dict[str, float]:
    """Seconds that one call spends in each GPU kernel, by the kernel's name, as the profiler sees it.

    The gaps between kernels do not count, so the sum is less than the call takes. Empty where there is no GPU.
    """
    jax.block_until_ready(call(0))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call(i + 1) for i in range(calls)][-1])
        spent: dict[str, float] = defaultdict(float)
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            spent[re.sub(r"[._]\d+$", "", event.name)] += event.duration_ns * 1e-9 / calls
    return dict(sorted(spent.items(), key=lambda item: -item[1]))
