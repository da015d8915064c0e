"""A plan on its way through the device: dispatched at once in the plan's order, read one step later."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import jax
import numpy as np

from sparsejax.cache import RowUsage
from sparsejax.engine.execution.runner import Runner
from sparsejax.engine.programs.compression import CompressOutput, EvictOutput, Measured
from sparsejax.engine.programs.delta_compress import StoreOutput
from sparsejax.engine.programs.readback import Output, Readback
from sparsejax.engine.programs.state import StepOutput
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk, Compress, Evict, Fork, FullRing, Plan, Release
from sparsejax.engine.scheduling.usage import Balance


@dataclass(frozen=True)
class ModelStep(Generic[Output]):
    """A dispatched run of the model.

    Attributes:
      sampling: (lane of the output, request) of each token it samples.
      chunks: what was prefilled, in packing order; empty for a decode step.
      output: packed on the device, or read.
    """

    sampling: list[tuple[int, Request]]
    chunks: Sequence[Chunk]
    output: Output


@dataclass(frozen=True)
class Compressed:
    """What became of one row.

    Attributes:
      entry: what was asked for.
      kept: i32[L, H], tokens of each layer and head.
      entries_before, entries_after: table entries of the row.
      seconds: the host's wait from the end of the model's run to the end of the compression, shared out evenly over
        the rows of the plan; less than the compression took if the host came late to read.
    """

    entry: Compress
    kept: np.ndarray
    entries_before: int
    entries_after: int
    seconds: float


@dataclass(frozen=True)
class Results:
    """A plan's results on the host.

    Attributes:
      steps: the model's, in order.
      compressed: rows that were brought down to their budgets.
      rings: rows whose full rings were compressed.
      evictions: what per-step evictions report, call by call.
      seconds: the host's wait from the end of the model's run to the end of what was evicted and compressed.
      ok: nothing ran short on the device.
      measured: what was free and held after the whole plan.
    """

    steps: list[ModelStep[StepOutput]]
    compressed: list[Compressed]
    rings: list[FullRing]
    evictions: list[tuple[Sequence[Evict], Any]]
    seconds: float
    ok: bool
    measured: Measured


@dataclass(frozen=True)
class InFlight:
    """A dispatched plan whose results have not been read.

    Attributes:
      steps: the model's runs, in order.
      evictions, compressions: (entries, output) of each call, in the order of dispatch.
      rows: of the requests that are compressed, by request id: by the time this is read they may have lost them.
      rings: (entries, output) of each compression of full rings.
      forked: bool[] values that must be true.
      measured: counts after the whole plan, if its last program gives none.
      balance: what the scheduler counted then.
    """

    steps: Sequence[ModelStep[Readback[StepOutput]]]
    evictions: Sequence[tuple[Sequence[Evict], Readback[EvictOutput]]]
    compressions: Sequence[tuple[Sequence[Compress], Readback[CompressOutput]]]
    rows: Mapping[str, int]
    rings: Sequence[tuple[Sequence[FullRing], Readback[StoreOutput]]]
    forked: list[jax.Array]
    measured: Readback[Measured] | None
    balance: Balance

    def read(self) -> Results:
        """Waits for the device and fetches everything."""
        steps = [ModelStep(each.sampling, each.chunks, each.output.get()) for each in self.steps]
        start = time.perf_counter()
        evictions = [(entries, output.get()) for entries, output in self.evictions]
        compressions = [(entries, output.get()) for entries, output in self.compressions]
        rings = [(entries, output.get()) for entries, output in self.rings]
        seconds = time.perf_counter() - start
        forked = jax.device_get(self.forked)
        measured = None if self.measured is None else self.measured.get()
        outputs = [*(step.output for step in steps), *(output for _, output in (*evictions, *compressions, *rings))]
        last = measured if measured is not None else outputs[-1]
        before = steps[-1].output.usage

        def held(usage: RowUsage | None, entry: Compress) -> int:
            assert usage is not None, "caches that evict tell what rows hold"
            return int(usage.held[self.rows[entry.request.request_id]])

        bulk = [(entries, output) for entries, output in evictions if any(entry.bulk for entry in entries)]
        rows = sum(len(entries) for entries, _ in (*bulk, *compressions))
        return Results(
            steps=steps,
            compressed=[
                Compressed(
                    entry=entry,
                    kept=np.array(output.kept[:, lane]),  # a copy, or it holds on to what all rows keep
                    entries_before=held(before, entry),
                    entries_after=held(output.usage, entry),
                    seconds=seconds / rows,
                )
                for entries, output in (*bulk, *compressions)
                for lane, entry in enumerate(entries)
            ],
            rings=[entry for entries, _ in rings for entry in entries],
            evictions=[(entries, output.report) for entries, output in evictions],
            seconds=seconds,
            ok=all(bool(output.ok) for output in outputs) and all(forked),
            measured=Measured(free_entries=last.free_entries, usage=last.usage),
        )


def dispatch(runner: Runner, plan: Plan) -> InFlight | None:
    """Dispatches a plan; None if it runs nothing that could be read."""
    forked = _change_table(runner, plan)
    steps = _run_model(runner, plan)
    if not steps:
        return None
    # A copy waits for all that was dispatched before it: these are not to wait for evictions.
    _start_copies([step.output for step in steps])
    evictions = runner.evict(plan.evict)
    compressions = runner.compress(plan.compress)
    rings = runner.compress_rings(plan.rings)
    forked += runner.fork(plan.snapshots)
    measured = runner.measure() if plan.snapshots else None
    _start_copies(([output for _, output in (*evictions, *compressions, *rings)], forked, measured))
    rows = {each.request.request_id: each.request.row or 0 for each in (*plan.compress, *plan.evict)}
    return InFlight(steps, evictions, compressions, rows, rings, forked, measured, plan.balance)


def _start_copies(values: Any) -> None:
    """Starts copying device values to the host."""
    jax.tree.map(lambda x: x.copy_to_host_async(), values)


def _run_model(runner: Runner, plan: Plan) -> list[ModelStep[Readback[StepOutput]]]:
    """A plan's decodes and chunks: as one step if there is one for both, else in this order."""
    firsts = [
        (lane, chunk.request)
        for lane, chunk in enumerate(plan.prefill)
        if chunk.is_last and not chunk.request.is_replay
    ]

    def following(first_lane: int) -> list[tuple[int, Request]]:
        lanes = enumerate(plan.decode, start=first_lane)
        return [(lane, request) for lane, request in lanes if request not in plan.forced]

    if runner.mixed_shape(plan.prefill, plan.decode) is not None:
        output = runner.mixed(plan.prefill, plan.decode, plan.forced)
        return [ModelStep(following(runner.max_prefill_seqs) + firsts, plan.prefill, output)]
    steps = []
    if plan.decode:
        steps.append(ModelStep(following(0), (), runner.decode(plan.decode, plan.forced)))
    if plan.prefill:
        steps.append(ModelStep(firsts, plan.prefill, runner.prefill(plan.prefill)))
    return steps


def _change_table(runner: Runner, plan: Plan) -> list[jax.Array]:
    """Dispatches the plan's changes in order, neighbours of a kind together; returns what `Runner.fork` does."""
    forked = []
    for kind, changes in itertools.groupby(plan.changes, type):
        if kind is Fork:
            forked += runner.fork([change for change in changes if isinstance(change, Fork)])
        else:
            runner.release([change.row for change in changes if isinstance(change, Release)])
    return forked
