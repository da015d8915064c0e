"""Where the device's time goes: busy and idle shares of a stretch of work, and seconds by kernel.

The figures come from the trace that `jax.profiler` writes. XLA runs its command buffers (CUDA graphs) kernel by kernel
while a profiler listens, which is slower, unless `XLA_FLAGS` had `KEEP_COMMAND_BUFFERS` when the process started JAX.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sparsejax.errors import InvalidArgumentError

KEEP_COMMAND_BUFFERS = "--xla_enable_command_buffers_during_profiling=true"
HOST_GAP = 10e-6  # seconds; kernels that are queued follow one another within a few microseconds


@dataclass(frozen=True)
class KernelTime:
    """One kernel, its numbered copies taken together.

    Attributes:
      name: the GPU kernel, without the number XLA appends.
      launch: grid and block, which tell the matrix products of a layer apart; "" for copies.
      seconds: in it, a call.
      launches: of it, a call.
    """

    name: str
    launch: str
    seconds: float
    launches: float


@dataclass(frozen=True)
class Profile:
    """A profiled stretch of work.

    Attributes:
      calls: how many were profiled; all other figures are for one of them.
      wall_seconds: by the host's clock, the profiler listening.
      span_seconds: from the start of the first kernel to the end of the last.
      busy_seconds: of the span, with a kernel running.
      gap_seconds: of the span, in gaps of `HOST_GAP` or more: the device waits for the host.
      kernels: by time, largest first. Empty where there is no GPU.
    """

    calls: int
    wall_seconds: float
    span_seconds: float
    busy_seconds: float
    gap_seconds: float
    kernels: tuple[KernelTime, ...]

    @property
    def idle_share(self) -> float | None:
        """Share of the span in which no kernel ran; None without a GPU."""
        return 1 - self.busy_seconds / self.span_seconds if self.span_seconds else None

    @property
    def waiting_share(self) -> float | None:
        """Share of the span in which the device waited for the host; None without a GPU."""
        return self.gap_seconds / self.span_seconds if self.span_seconds else None


def keep_command_buffers() -> None:
    """Lets profiled steps run as unprofiled ones do. Has an effect only before the process first uses a device."""
    flags = os.environ.get("XLA_FLAGS", "")
    if KEEP_COMMAND_BUFFERS.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {KEEP_COMMAND_BUFFERS}".strip()


def profile(call: Callable[[], Any], *, calls: int, folder: Path | None = None) -> Profile:
    """Runs `call` several times under the profiler, everything dispatched before having ended.

    Args:
      call: dispatches work; what the last call returns is waited for (earlier results may be donated by then).
      calls: how often, at least 1.
      folder: keeps the trace, for Perfetto or XProf; None: nowhere.

    Raises:
      InvalidArgumentError: this JAX cannot read traces, or calls is not positive.
    """
    if calls < 1:
        raise InvalidArgumentError(f"calls must be at least 1, got {calls}.")
    if not hasattr(jax.profiler, "ProfileData"):
        raise InvalidArgumentError(f"profiling needs jax.profiler.ProfileData, which jax {jax.__version__} has not.")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down, and with it what is measured
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(folder or temporary)
        known = set(target.rglob("*.xplane.pb"))
        with jax.profiler.trace(target, profiler_options=options):
            start = time.perf_counter()
            for _ in range(calls - 1):
                call()
            jax.block_until_ready(call())
            wall = time.perf_counter() - start
        traces = sorted(set(target.rglob("*.xplane.pb")) - known)
        data = [jax.profiler.ProfileData.from_file(str(path)) for path in traces]
        return summarize(data, calls=calls, wall_seconds=wall)


def summarize(data: Iterable[Any], *, calls: int, wall_seconds: float) -> Profile:
    """A `Profile` of traces that are already read (`jax.profiler.ProfileData`). Several GPUs count on average."""
    planes = [plane for each in data for plane in each.planes if plane.name.startswith("/device:GPU")]
    spans, busy, gaps = [], [], []
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    launches: dict[tuple[str, str], int] = defaultdict(int)
    for plane in planes:
        events = [event for line in plane.lines if line.name.startswith("Stream") for event in line.events]
        if not events:
            continue
        intervals = [(event.start_ns, event.start_ns + event.duration_ns) for event in events]
        span, union, waiting = _cover(intervals)
        spans.append(span)
        busy.append(union)
        gaps.append(waiting)
        for event in events:
            key = (re.sub(r"([._]\d+)+$", "", event.name), _launch(event))
            seconds[key] += event.duration_ns * 1e-9
            launches[key] += 1
    share = 1 / (calls * max(len(spans), 1))
    return Profile(
        calls=calls,
        wall_seconds=wall_seconds / calls,
        span_seconds=sum(spans) * share,
        busy_seconds=sum(busy) * share,
        gap_seconds=sum(gaps) * share,
        kernels=tuple(
            KernelTime(name, launch, seconds[name, launch] * share, launches[name, launch] * share)
            for name, launch in sorted(seconds, key=lambda key: -seconds[key])
        ),
    )


def _cover(intervals: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(first start to last end, covered by at least one interval, in uncovered gaps >= HOST_GAP): ns -> seconds."""
    intervals.sort()
    covered = waiting = 0.0
    first, end = intervals[0]
    start = first
    for left, right in intervals:
        if left > end:
            covered += end - start
            waiting += left - end if left - end >= HOST_GAP * 1e9 else 0.0
            start, end = left, right
        end = max(end, right)
    covered += end - start
    return (end - first) * 1e-9, covered * 1e-9, waiting * 1e-9


def _launch(event: Any) -> str:
    """The launch shape that CUPTI reports among a kernel's details: "grid:8,1,1 block:128,1,1"."""
    for key, value in event.stats:
        if key == "kernel_details":
            return " ".join(re.findall(r"(?:grid|block):[\d,]+", str(value)))
    return ""


def format_profile(result: Profile, *, top: int = 20) -> str:
    """The shares in a line, then a table of the kernels that take longest."""
    if not result.kernels:
        return "the profiler saw no GPU kernels here"
    lines = [
        f"a call: {1e3 * result.wall_seconds:.3f} ms wall, {1e3 * result.span_seconds:.3f} ms from first "
        f"to last kernel, busy {1e3 * result.busy_seconds:.3f} ms; idle {result.idle_share:.1%}, of it waiting for the "
        f"host {result.waiting_share:.1%}",
        f"{'us a call':>10} {'share':>6} {'launches':>8} {'us each':>8}  kernel",
    ]
    total = sum(kernel.seconds for kernel in result.kernels)
    for kernel in result.kernels[:top]:
        lines.append(
            f"{1e6 * kernel.seconds:10.1f} {kernel.seconds / total:6.1%} {kernel.launches:8.1f} "
            f"{1e6 * kernel.seconds / kernel.launches:8.2f}  {kernel.name:.70}  {kernel.launch}".rstrip()
        )
    rest = result.kernels[top:]
    if rest:
        seconds, launches = sum(k.seconds for k in rest), sum(k.launches for k in rest)
        lines.append(
            f"{1e6 * seconds:10.1f} {seconds / total:6.1%} {launches:8.1f} {'':8}  {len(rest)} more kinds of kernel"
        )
    return "\n".join(lines)
