"""A trace through the whole engine: latencies as users would see them, rates, memory, and what had to be compiled.

Requests are added when they arrive, whether or not the engine is ready for them, and every latency counts from that
arrival. A token's time is when the host had read it; all tokens of a step share one reading of the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sparsejax.bench.compilations import watch_compilations
from sparsejax.bench.traces import Trace
from sparsejax.engine.execution.garbage import quiet_collector
from sparsejax.engine.execution.warm_up import warm_up
from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.engine.requests.request import Request
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.requests.submission import Submission
from sparsejax.engine.scheduling.limits import check_limits, most_tokens
from sparsejax.errors import InvalidArgumentError


@dataclass(frozen=True)
class Distribution:
    """Seconds, over requests or tokens."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Distribution | None:
        """None if there are no values."""
        if not len(values):
            return None
        return cls(float(np.mean(values)), float(np.median(values)), float(np.percentile(values, 99)))


@dataclass(frozen=True)
class Record:
    """One request. Times are seconds from its arrival; the trace's clock starts with the trace.

    Attributes:
      arrival: on the trace's clock.
      input_tokens, output_tokens: as served.
      ttft: until the first token.
      tpot: mean between tokens after the first; None for a single token.
      e2e: until the last token.
      preemptions: how often it lost its cache and was recomputed.
      cached_tokens: of the prompt, taken from the prefix cache instead of being computed.
    """

    arrival: float
    input_tokens: int
    output_tokens: int
    ttft: float
    tpot: float | None
    e2e: float
    preemptions: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timeline:
    """The engine after each step: seconds on the trace's clock, requests that hold a row, waiting ones, pages used."""

    seconds: list[float]
    running: list[int]
    waiting: list[int]
    pages: list[int]


@dataclass(frozen=True)
class Throughput:
    """A served trace.

    Attributes:
      trace: its name.
      requests, input_tokens, output_tokens: served.
      wall_seconds: from the start of the trace to the last token.
      output_rate, total_rate: tokens per second of answers, and of prompts and answers.
      cached_tokens: of all prompts, taken from the prefix cache instead of being computed.
      ttft, tpot, itl, e2e: time to first token, time per output token (a request's mean), between successive tokens
        (of all requests), from arrival to the last token; None where there is nothing to measure.
      ttft_hit: of the times to first token, those of prompts that were found in the prefix cache, in part or whole.
      itl_prefill, itl_decode: of those times between tokens, the ones that ended while some other request was between
        its arrival and its first token, and the rest: what a prefill costs those that decode.
      host_seconds: of the wall time not spent waiting for the device or for arrivals.
      steps: of the engine.
      max_running: most requests that held a row at once.
      max_pages, pool_pages: most physical pages in use, and how many there are.
      preemptions: of all requests.
      compilations: of the engine's steps while serving, by name.
      programs_compiled: of any program while serving, those above included.
      peak_bytes: most device memory in use so far, as the allocator reports; 0 where it does not.
      method, compression: of all requests, by name and in full; "full" is dense.
      compressions: of all rows that were brought down to their budgets at once, and of chunks and full rings of rows
        that are stored compressed; single tokens evicted while decoding do not count.
      compression_seconds: that the host waited for them, all together.
      kv_bytes_before, kv_bytes_after: whole pages that all requests held before and after the last of those.
      records: by arrival.
      timeline: by step.
      itls: every time between successive tokens, for plots.
      interrupted: by Ctrl-C; all of this is about the requests that had ended, then.
    """

    trace: str
    requests: int
    input_tokens: int
    output_tokens: int
    wall_seconds: float
    output_rate: float
    total_rate: float
    cached_tokens: int
    ttft: Distribution | None
    ttft_hit: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    itl_prefill: Distribution | None
    itl_decode: Distribution | None
    e2e: Distribution | None
    host_seconds: float
    steps: int
    max_running: int
    max_pages: int
    pool_pages: int
    preemptions: int
    compilations: dict[str, int]
    programs_compiled: int
    peak_bytes: int
    method: str
    compression: str
    compressions: int
    compression_seconds: float
    kv_bytes_before: int
    kv_bytes_after: int
    records: list[Record]
    timeline: Timeline
    itls: list[float]
    interrupted: bool = False


def check(llm: LLM, trace: Trace, compression: CompressionParams | None = None) -> None:
    """Refuses what `serve` would refuse, before anything is compiled for it.

    Raises:
      InvalidArgumentError: a request that the engine can never serve in full.
    """
    _checked(llm, trace, compression or CompressionParams())


def _checked(llm: LLM, trace: Trace, compression: CompressionParams) -> list[tuple[TokenizedPrompt, SamplingParams]]:
    """What the engine is given of each request, all of which it can serve."""
    engine, limits = llm.engine, llm.engine.scheduler.config
    work = [
        (
            TokenizedPrompt(None, request.prompt(llm.model_config.vocab_size)),
            SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True),
        )
        for request in trace.requests
    ]
    for i, (request, (prompt, params)) in enumerate(zip(trace.requests, work, strict=True)):
        name = f"request {i} of trace {trace.name!r}"
        engine.check(prompt, params, compression, name=name)
        probe = Request("", prompt.token_ids, params, compression)
        most = most_tokens(probe, check_limits(probe, limits, name=name), limits)
        if most < request.output_tokens:
            raise InvalidArgumentError(
                f"{name} has {request.input_tokens} tokens and asks for {request.output_tokens} more; max_model_len "
                f"and the cache allow {request.input_tokens + most} together."
            )
    return work


def prepare(
    llm: LLM,
    traces: Sequence[Trace],
    compression: CompressionParams | None = None,
    *,
    progress: Callable[[Sequence], Iterable] = lambda steps: steps,
) -> None:
    """Compiles what `serve` needs of an idle engine. Programs that earlier traces needed too are found ready.

    Args:
      compression: of all requests; None: dense.
      progress: wraps the list of programs, for a progress bar.
    """
    compression = compression or CompressionParams()
    prompts = [request.input_tokens for trace in traces for request in trace.requests]
    longest = max(prompts) if compression.once else max(trace.longest for trace in traces)
    warm_up(
        llm.engine.runner,
        greedy_only=True,
        compression=compression,
        uniform=True,
        forks=llm.engine.scheduler.config.max_resident_rows > 0,
        texts=(min(prompts), longest),
        progress=progress,
    )


def serve(
    llm: LLM,
    trace: Trace,
    compression: CompressionParams | None = None,
    *,
    observe: Callable[[Sequence[Submission]], None] | None = None,
    use_tqdm: bool = True,
) -> Throughput:
    """Runs the trace. What the engine has cached of earlier prompts is dropped: those of traces may begin alike.

    Args:
      llm: built for the method; its max_model_len must reach `trace.longest`. `prepare` it before, or compilations
        will be part of what is measured.
      compression: of all requests; None: dense.
      observe: called after every step with the unfinished requests.

    Returns:
      What was measured. After Ctrl-C that is about the requests that had ended, and says so.

    Raises:
      InvalidArgumentError: a request that the engine can never serve in full.
      KeyboardInterrupt: before any request had ended.
    """
    engine, runner = llm.engine, llm.engine.runner
    compression = compression or CompressionParams()
    work = _checked(llm, trace, compression)
    engine.reset_prefix_cache()
    before, waited, preempted = runner.compilations, engine.wait_seconds, engine.scheduler.num_preemptions
    served = _Server(llm, trace, work, compression, observe)
    try:
        with watch_compilations() as watched:
            served.run(use_tqdm)
        # Of what was served: not of the steps that only clear away behind it.
        compilations, programs_compiled = dict(runner.compilations - before), len(watched.programs)
        waited, preempted = engine.wait_seconds - waited, engine.scheduler.num_preemptions - preempted
    finally:
        served.clear_away()
    if not served.ended:
        raise KeyboardInterrupt
    seconds = served.seconds
    records = [_record(trace.requests[i].arrival, served.submissions[i], served.times[i]) for i in served.ended]
    itls = np.concatenate([np.diff(served.times[i]) for i in served.ended])
    arrivals = (request.arrival for request in trace.requests)
    windows = [(at, times[0] if times else math.inf) for at, times in zip(arrivals, served.times, strict=False)]
    beside = np.concatenate([_in_prefill(served.times[i][1:], windows) for i in served.ended])
    input_tokens = sum(record.input_tokens for record in records)
    output_tokens = sum(record.output_tokens for record in records)
    stats = jax.devices()[0].memory_stats() or {}
    compressed = [answer.compression for i in served.ended for answer in served.submissions[i].answers]
    return Throughput(
        trace=trace.name,
        requests=len(records),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        wall_seconds=seconds,
        output_rate=output_tokens / seconds,
        total_rate=(input_tokens + output_tokens) / seconds,
        cached_tokens=sum(record.cached_tokens for record in records),
        ttft=Distribution.of([record.ttft for record in records]),
        ttft_hit=Distribution.of([record.ttft for record in records if record.cached_tokens]),
        tpot=Distribution.of([record.tpot for record in records if record.tpot is not None]),
        itl=Distribution.of(itls),
        itl_prefill=Distribution.of(itls[beside]),
        itl_decode=Distribution.of(itls[~beside]),
        e2e=Distribution.of([record.e2e for record in records]),
        host_seconds=seconds - waited - served.slept,
        steps=len(served.timeline.seconds),
        max_running=max(served.timeline.running),
        max_pages=max(served.timeline.pages),
        pool_pages=runner.layout.pages_of(engine.scheduler.pool_entries),
        preemptions=preempted,
        compilations=compilations,
        programs_compiled=programs_compiled,
        peak_bytes=stats.get("peak_bytes_in_use", 0),
        method=compression.method,
        compression=str(compression),
        compressions=sum(each.count for each in compressed),
        compression_seconds=sum(each.seconds for each in compressed),
        kv_bytes_before=sum(each.bytes_before for each in compressed),
        kv_bytes_after=sum(each.bytes_after for each in compressed),
        records=records,
        timeline=served.timeline,
        itls=itls.tolist(),
        interrupted=served.interrupted,
    )


class _Server:
    """Drives an engine by the clock.

    Attributes:
      seconds: from the start to the last token.
      slept: of these, waiting for arrivals with nothing to do.
      submissions, times: of each request of the trace, and the seconds at which its tokens were there.
      ended: requests that have ended, by number.
      interrupted: by Ctrl-C.
    """

    def __init__(
        self,
        llm: LLM,
        trace: Trace,
        work: list[tuple[TokenizedPrompt, SamplingParams]],
        compression: CompressionParams,
        observe: Callable[[Sequence[Submission]], None] | None,
    ) -> None:
        self.engine = llm.engine
        self.requests = trace.requests
        self.work = work
        self.compression = compression
        self.observe = observe
        self.submissions: list[Submission] = []
        self.times: list[list[float]] = []
        self.timeline = Timeline([], [], [], [])
        self.seconds = 0.0
        self.slept = 0.0
        self.ended: list[int] = []
        self.interrupted = False
        self._active: list[int] = []

    def run(self, use_tqdm: bool) -> None:
        start = time.perf_counter()
        total = len(self.requests)
        try:
            with quiet_collector(), tqdm(total=total, desc="serving", unit="request", disable=not use_tqdm) as bar:
                while self._active or len(self.submissions) < total:
                    self._add_arrived(time.perf_counter() - start)
                    if not self._active:
                        self._sleep(start)
                        continue
                    self.engine.step()
                    self.seconds = time.perf_counter() - start
                    ended = self._look(self.seconds)
                    if self.observe is not None:
                        self.observe([self.submissions[i] for i in self._active])
                    if ended:
                        tokens = sum(map(len, self.times))
                        bar.set_postfix_str(f"{tokens / self.seconds:.0f} tok/s", refresh=False)
                        bar.update(ended)
        except KeyboardInterrupt:
            self.interrupted = True
        # Before any is cancelled. An interrupted step may have ended one whose last token has not been looked at.
        tokens = (len(each.answers[0].request.output_token_ids) for each in self.submissions)
        seen = [count == len(times) > 0 for count, times in zip(tokens, self.times, strict=True)]
        self.ended = [i for i, each in enumerate(self.submissions) if each.finished and seen[i]]

    def clear_away(self) -> None:
        """Leaves an idle engine behind, whatever happened."""
        for submission in self.submissions:
            self.engine.cancel(submission)
        while self.engine.has_unfinished:
            self.engine.step()
        self.engine.step()  # releases the last rows

    def _add_arrived(self, now: float) -> None:
        while len(self.submissions) < len(self.requests):
            i = len(self.submissions)
            if self.requests[i].arrival > now:
                return
            self._active.append(i)
            self.times.append([])
            self.submissions.append(self.engine.add(f"trace-{i}", *self.work[i], self.compression))

    def _sleep(self, start: float) -> None:
        before = time.perf_counter()
        time.sleep(max(0.0, start + self.requests[len(self.submissions)].arrival - before))
        self.slept += time.perf_counter() - before

    def _look(self, now: float) -> int:
        """Notes what a step has changed. Returns how many requests have ended with it."""
        ended = 0
        for i in self._active:
            request, times = self.submissions[i].answers[0].request, self.times[i]
            if len(request.output_token_ids) > len(times):
                times.extend([now] * (len(request.output_token_ids) - len(times)))
                ended += request.finished
        if ended:
            self._active = [i for i in self._active if not self.submissions[i].finished]
        scheduler = self.engine.scheduler
        pages_of = self.engine.runner.layout.pages_of
        self.timeline.seconds.append(now)
        self.timeline.running.append(scheduler.num_running)
        self.timeline.waiting.append(scheduler.num_waiting)
        self.timeline.pages.append(pages_of(scheduler.pool_entries) - pages_of(scheduler.available_entries))
        return ended


def _record(arrival: float, submission: Submission, times: list[float]) -> Record:
    request = submission.answers[0].request
    return Record(
        arrival=arrival,
        input_tokens=len(request.prompt_token_ids),
        output_tokens=len(times),
        ttft=times[0] - arrival,
        tpot=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        e2e=times[-1] - arrival,
        preemptions=request.num_preemptions,
        cached_tokens=request.num_cached_tokens,
    )


def _in_prefill(times: Sequence[float], windows: Sequence[tuple[float, float]]) -> np.ndarray:
    """bool[N]: whether each time is in a window (after, up to): from a request's arrival to its first token.

    A request's own later tokens come after its first, so they are never beside its own prefill.
    """
    at = np.asarray(times, np.float64)
    inside = np.zeros(len(at), bool)
    for after, up_to in windows:
        inside |= (after < at) & (at <= up_to)
    return inside


def format_report(result: Throughput) -> str:
    """What a person wants to know."""
    compiled = ", ".join(f"{name} {count}" for name, count in result.compilations.items()) or "none"
    lines = [
        *(["interrupted; of the requests that had ended:"] if result.interrupted else []),
        f"{result.trace}: {result.requests} requests, {result.input_tokens} tokens in, {result.output_tokens} out, "
        f"{result.wall_seconds:.2f} s",
        f"output {result.output_rate:.0f} tok/s, total {result.total_rate:.0f} tok/s",
        f"{'seconds':11} {'mean':>9} {'median':>9} {'p99':>9}",
    ]
    for name in ("ttft", "ttft_hit", "tpot", "itl", "itl_prefill", "itl_decode", "e2e"):
        value: Distribution | None = getattr(result, name)
        if value is not None:
            lines.append(f"{name:11} {value.mean:9.4f} {value.median:9.4f} {value.p99:9.4f}")
    lines += [
        *([f"from the prefix cache {result.cached_tokens} tokens"] if result.cached_tokens else []),
        f"steps {result.steps}, at most {result.max_running} requests at once, host {result.host_seconds:.2f} s",
        f"pages {result.max_pages} of {result.pool_pages} at most, preemptions {result.preemptions}, "
        f"peak memory {result.peak_bytes / 2**30:.1f} GiB",
        *_compression_lines(result),
        f"compiled while serving: steps {compiled}; programs in all {result.programs_compiled}",
    ]
    return "\n".join(lines)


def _compression_lines(result: Throughput) -> list[str]:
    if result.method == "full":
        return []
    line = f"{result.method}: {result.compressions} compressions"
    if result.compressions:
        line += f" in {result.compression_seconds:.2f} s"
    if result.kv_bytes_before:
        line += (
            f"; the last of each request left {result.kv_bytes_after / 2**30:.2f} of "
            f"{result.kv_bytes_before / 2**30:.2f} GiB"
        )
    return [line]


def as_dict(result: Throughput, *, model: str) -> dict[str, Any]:
    """For JSON, and for `sparsejax.bench.compare`. Single token times are left out."""
    report = {"kind": "throughput", "model": model, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    report |= asdict(result)
    del report["itls"]
    return report
