"""Timing that means something: warm, repeated, finished before the clock stops; the median and its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
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
