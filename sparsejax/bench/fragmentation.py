"""How much of the pages that requests hold is empty when every decode step evicts, by memory strategy (SpvLLM).

Conversations of mixed lengths are served all at once, dense and with a method that evicts at every step (H2O, or random
victims), for several budgets and all four strategies of `sparsejax.engine.programs.eviction`. After every step, over
all requests that decode:

    internal fragmentation = 1 - live tokens / (pages * page size)

both as the step attended to them: before it evicts what its own token was too many. "live" and "pages" are summed over
layers and KV heads. A row that evicts is reported by the device a step late, and counts with its latest report.

Lengths follow the experiment of SpvLLM (ShareGPT's first turns): prompts of 225 tokens in the mean, answers of 209,
both log-normal; prompts of 4 to 1,024 tokens, 2,048 with their answers. Tokens are random, and answers go on past end
tokens. With random weights H2O's victims lie side by side, for attention is nearly uniform and so the oldest tokens
have most of it; those of a trained model, and of "random", are scattered.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import jax
import numpy as np

from sparsejax.bench.throughput import Distribution, Throughput, prepare, serve
from sparsejax.bench.traces import Trace, TraceRequest, uniform
from sparsejax.engine.llm import LLM
from sparsejax.engine.programs.eviction import EvictReport, Strategy
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.submission import Submission
from sparsejax.engine.scheduling.plan import Evict
from sparsejax.errors import InvalidArgumentError

STRATEGIES: tuple[str, ...] = get_args(Strategy)
DENSE = "dense"
SIGMA = 1.0  # of the logarithm of lengths


@dataclass(frozen=True)
class Workload:
    """Lengths of conversations, in tokens.

    Attributes:
      mean_input, mean_output: of prompts and answers.
      shortest: of both.
      longest_input, longest: of a prompt, and of a prompt with its answer.
    """

    mean_input: int = 225
    mean_output: int = 209
    shortest: int = 4
    longest_input: int = 1024
    longest: int = 2048

    def trace(self, requests: int, seed: int = 0) -> Trace:
        """So many conversations, all at once; the same for the same seed."""
        rng = np.random.default_rng(seed)
        inputs = _lengths(rng, requests, self.mean_input, self.shortest, self.longest_input)
        outputs = np.minimum(
            _lengths(rng, requests, self.mean_output, self.shortest, self.longest), self.longest - inputs
        )
        drawn = zip(inputs.tolist(), outputs.tolist(), strict=True)
        return Trace(
            f"conversations-{requests}",
            tuple(TraceRequest(0.0, length, answer, seed=(seed << 32) + i) for i, (length, answer) in enumerate(drawn)),
        )


def _lengths(rng: np.random.Generator, count: int, mean: int, low: int, high: int) -> np.ndarray:
    """Log-normal lengths, cut off at both ends, whose mean is as close to `mean` as their median can be chosen for."""
    shape = np.exp(SIGMA * rng.standard_normal(count))

    def clipped(median: float) -> np.ndarray:
        return np.clip(median * shape, low, high).astype(np.int64)

    medians = np.linspace(1, 2 * mean, 4096)
    best = bisect.bisect_left(range(len(medians)), mean, key=lambda i: clipped(medians[i]).mean())
    return clipped(medians[min(best, len(medians) - 1)])


@dataclass(frozen=True)
class Fragmentation:
    """One strategy at one budget.

    Attributes:
      strategy: of `STRATEGIES`, or "dense".
      budget: tokens that each layer and KV head keeps; None for dense.
      mean, p99: internal fragmentation over the decode steps.
      requests_rate: requests a second. output_rate: tokens of answers a second.
      ttft_p99, tpot_p99, itl_p99: seconds; None where there is nothing to measure.
      preemptions: of all requests.
      max_running: most requests at once.
      copied_bytes: keys, values, scores and positions that evicting has copied.
      evict_seconds: that the host waited for evictions behind the model's steps; copying is part of it.
      steps: of the engine.
      programs_compiled: while serving; what they took is part of all times.
      seconds, fragmentation: the time series, one value a step in which requests decode.
    """

    strategy: str
    budget: int | None
    mean: float
    p99: float
    requests_rate: float
    output_rate: float
    ttft_p99: float | None
    tpot_p99: float | None
    itl_p99: float | None
    preemptions: int
    max_running: int
    copied_bytes: float
    evict_seconds: float
    steps: int
    programs_compiled: int
    seconds: list[float]
    fragmentation: list[float]


@dataclass(frozen=True)
class Steady:
    """One token in, one out: equal requests whose prompts fill the budget, after all have begun to evict.

    Attributes:
      strategy, budget: as in `Fragmentation`.
      mean, p99: internal fragmentation over the steps.
      steps: how many.
      copied_bytes: in these steps.
    """

    strategy: str
    budget: int
    mean: float
    p99: float
    steps: int
    copied_bytes: float


class _Watch:
    """Follows the pages and live tokens of everything that decodes. `close` ends it."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        self._tables = llm.engine.scheduler.config.entries_per_page_column
        self._page_size = llm.engine.runner.layout.page_size
        self._reports: dict[tuple[str, int], tuple[int, int]] = {}
        self._evict_seconds = llm.engine.eviction_seconds
        self.copied: list[float] = [0.0]  # bytes, up to each observation
        self.values: list[float | None] = []  # fragmentation; None where nothing decodes
        self.evicting: list[bool] = []  # all that decode do so
        llm.engine.eviction_observer = self._take

    @property
    def evict_seconds(self) -> float:
        return self._engine.eviction_seconds - self._evict_seconds

    def close(self) -> None:
        self._engine.eviction_observer = None

    def _take(self, entries: Sequence[Evict], report: EvictReport) -> None:
        self.copied[-1] += float(report.copied_bytes)
        for entry, active, pages in zip(entries, report.active_before, report.pages_before, strict=False):
            # A request that was preempted starts anew.
            self._reports[entry.request.request_id, entry.request.num_preemptions] = (int(active), int(pages))

    def observe(self, submissions: Sequence[Submission]) -> None:
        """To be called after every step."""
        active = pages = 0
        evicting = True
        for request in (answer.request for each in submissions for answer in each.answers):
            if request.row is None or not request.output_token_ids:
                continue
            report = self._reports.get((request.request_id, request.num_preemptions))
            if not request.is_evicting:
                evicting = False
                # Nothing of it was evicted: its tables are as long as its text.
                active += request.num_held * self._tables
                pages += self._engine.scheduler.entries_for(request.num_held)
            elif report is not None:
                active, pages = active + report[0], pages + report[1]
            else:
                evicting = False
        self.copied.append(self.copied[-1])
        self.values.append(1 - active / (pages * self._page_size) if pages else None)
        self.evicting.append(evicting and pages > 0)


def params_for(method: str, strategy: str, budget: int) -> CompressionParams:
    """A method that evicts at every step, one token at a time, with a memory strategy."""
    return CompressionParams(method=method, budget_tokens=budget, strategy=strategy)


def run(
    llm: LLM,
    trace: Trace,
    strategy: str,
    budget: int | None = None,
    *,
    method: str = "h2o",
    warm: bool = True,
    use_tqdm: bool = True,
) -> Fragmentation:
    """Serves the trace.

    Args:
      llm: built for the method, with prefix caching off, so that what requests hold is their own.
      strategy: of `STRATEGIES`, or "dense".
      budget: tokens to keep; None if dense.
      method: what evicts.
      warm: compile everything before.

    Raises:
      InvalidArgumentError: an unknown strategy, or a budget where there is none to be (or none where there must be).
    """
    if strategy not in (*STRATEGIES, DENSE):
        raise InvalidArgumentError(f"strategy must be one of {', '.join((*STRATEGIES, DENSE))}; got {strategy!r}.")
    if (budget is None) != (strategy == DENSE):
        raise InvalidArgumentError(
            f"budget must be given exactly if tokens are evicted; got {budget} for {strategy!r}."
        )
    compression = None if budget is None else params_for(method, strategy, budget)
    if warm:
        prepare(llm, [trace], compression)
    result, watch = _watched(llm, trace, compression, use_tqdm=use_tqdm)
    series = [
        (second, value)
        for second, value in zip(result.timeline.seconds, watch.values, strict=True)
        if value is not None
    ]
    values = [value for _, value in series]
    return Fragmentation(
        strategy=strategy,
        budget=budget,
        mean=float(np.mean(values)),
        p99=float(np.percentile(values, 99)),
        requests_rate=result.requests / result.wall_seconds,
        output_rate=result.output_rate,
        ttft_p99=_p99(result.ttft),
        tpot_p99=_p99(result.tpot),
        itl_p99=_p99(result.itl),
        preemptions=result.preemptions,
        max_running=result.max_running,
        copied_bytes=watch.copied[-1],
        evict_seconds=watch.evict_seconds,
        steps=result.steps,
        programs_compiled=result.programs_compiled,
        seconds=[second for second, _ in series],
        fragmentation=values,
    )


def steady(
    llm: LLM, strategy: str, budget: int, *, rows: int, steps: int, method: str = "h2o", use_tqdm: bool = True
) -> Steady:
    """One-in-one-out: `rows` prompts as long as the budget decode `steps` tokens each."""
    trace = uniform(rows, budget, steps, name=f"steady-{budget}")
    _, watch = _watched(llm, trace, params_for(method, strategy, budget), use_tqdm=use_tqdm)
    chosen = [i for i, evicting in enumerate(watch.evicting) if evicting]
    if not chosen:
        raise InvalidArgumentError(f"steps must be enough for all rows to evict at once, got {steps}.")
    values = [value for i in chosen if (value := watch.values[i]) is not None]
    return Steady(
        strategy=strategy,
        budget=budget,
        mean=float(np.mean(values)),
        p99=float(np.percentile(values, 99)),
        steps=len(chosen),
        copied_bytes=watch.copied[-1] - watch.copied[chosen[0]],
    )


def _watched(
    llm: LLM, trace: Trace, compression: CompressionParams | None, *, use_tqdm: bool
) -> tuple[Throughput, _Watch]:
    watch = _Watch(llm)
    try:
        served = serve(llm, trace, compression, observe=watch.observe, use_tqdm=use_tqdm)
    finally:
        watch.close()
    if served.interrupted:  # a part of a trace fragments otherwise than the whole
        raise KeyboardInterrupt
    return served, watch


def _p99(distribution: Distribution | None) -> float | None:
    return None if distribution is None else distribution.p99


def measure(
    llm: LLM,
    trace: Trace,
    *,
    budgets: Sequence[int],
    strategies: Sequence[str] = STRATEGIES,
    method: str = "h2o",
    steady_rows: int = 16,
    steady_steps: int = 128,
    warm: bool = True,
    report: Callable[[str], None] = print,
    keep: Callable[[list[Fragmentation], list[Steady]], None] = lambda rows, lines: None,
) -> tuple[list[Fragmentation], list[Steady]]:
    """The dense baseline, then every strategy at every budget; each line is reported as soon as it is known.

    Args:
      steady_rows, steady_steps: see `steady`; 0 rows: leave it out.
      keep: called with all that is known, whenever that is more.
    """
    rows, lines = [], []
    report(HEADER)
    rows.append(run(llm, trace, DENSE, warm=warm))
    report(format_row(rows[-1]))
    keep(rows, lines)
    for budget in budgets:
        for strategy in strategies:
            rows.append(run(llm, trace, strategy, budget, method=method, warm=warm))
            report(format_row(rows[-1]))
            keep(rows, lines)
            if steady_rows:
                lines.append(steady(llm, strategy, budget, rows=steady_rows, steps=steady_steps, method=method))
                report(format_steady(lines[-1]))
                keep(rows, lines)
    return rows, lines


HEADER = (
    "strategy     budget  mean  p99 %  req/s  out tok/s  ttft p99  tpot p99 ms  itl p99 ms  preempt  running"
    "  copied GiB  evict s  compiled"
)


def format_row(row: Fragmentation) -> str:
    """One line under HEADER."""

    def number(value: float | None, scale: float, digits: int) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    return (
        f"{row.strategy:11}  {row.budget or '-':>6}  {100 * row.mean:4.1f}  {100 * row.p99:5.1f}"
        f"  {row.requests_rate:5.1f}  {row.output_rate:9.0f}  {number(row.ttft_p99, 1, 2):>8}"
        f"  {number(row.tpot_p99, 1e3, 1):>11}  {number(row.itl_p99, 1e3, 1):>10}  {row.preemptions:7d}"
        f"  {row.max_running:7d}  {row.copied_bytes / 2**30:10.3f}  {row.evict_seconds:7.2f}"
        f"  {row.programs_compiled:8d}"
    )


def format_steady(row: Steady) -> str:
    """One line, in words."""
    return (
        f"{row.strategy:11}  {row.budget:>6}  one in, one out: mean {100 * row.mean:.2f} %, p99 {100 * row.p99:.2f} %, "
        f"{row.copied_bytes:.0f} bytes copied in {row.steps} steps"
    )


def as_dict(
    rows: Sequence[Fragmentation], steady: Sequence[Steady], *, model: str, method: str, page_size: int
) -> dict[str, Any]:
    """For JSON, and for `sparsejax.bench.compare`."""
    return {
        "kind": "fragmentation",
        "model": model,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "method": method,
        "page_size": page_size,
        "rows": [asdict(row) for row in rows],
        "steady": [asdict(row) for row in steady],
    }
