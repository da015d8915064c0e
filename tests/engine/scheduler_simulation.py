"""A simulated device under the scheduler, which checks every promise of every plan. Not a test itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sparsejax.engine.request import Request, Status, derive_seed
from sparsejax.engine.sampling_params import SamplingParams
from sparsejax.engine.scheduler import Scheduler, SchedulerConfig

EOS = 0


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def config(**changes) -> SchedulerConfig:
    base = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_prefill_seqs": 4,
        "page_size": 4,
        "num_free_entries": 64,
        "entries_per_page_column": 1,
        "max_model_len": 128,
    }
    return SchedulerConfig(**{**base, **changes})


def request(name: str, prompt: int, max_tokens: int = 4, *, ignore_eos: bool = True) -> Request:
    ids = [1 + (derive_seed(prompt, i + 1) % 40) for i in range(prompt)]
    return Request(name, ids, SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos))


def ends(each: Request, answer: list[int]) -> str | None:
    """Why the answer is complete, or None."""
    if answer and answer[-1] == EOS and not each.params.ignore_eos:
        return "stop"
    return "length" if len(answer) == each.max_tokens else None


def next_token(text: list[int]) -> int:
    """The simulated model: a function of every token it can see, now and then the end token."""
    return hash(tuple(text)) % 25


def answer_alone(each: Request) -> list[int]:
    """What the request generates with the device to itself."""
    text, answer = list(each.prompt_token_ids), []
    while ends(each, answer) is None:
        answer.append(next_token(text + answer))
    return answer


@dataclass
class Engine:
    """Runs plans on a simulated device whose results the host reads `lag` steps late, checking every promise."""

    scheduler: Scheduler
    clock: FakeClock
    lag: int = 1
    rows: dict[int, list[int]] = field(default_factory=dict)  # K/V of each row, as the tokens they stand for
    newest: dict[int, int] = field(default_factory=dict)
    in_flight: deque = field(default_factory=deque)
    alive: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    came_back: dict[int, int] = field(default_factory=dict)  # step in which a replay began, by order
    steps: int = 0

    def add(self, each: Request) -> None:
        self.scheduler.add(each)
        self.alive.append(each)

    def cancel(self, request_id: str) -> None:
        each = self.scheduler.cancel(request_id)
        if each is not None:
            self._end(each)

    def step(self):
        self.clock.now += 1
        self.steps += 1
        preempts = self.scheduler.must_preempt()
        if preempts:
            self.read_all()
            preempts = self.scheduler.must_preempt()  # reading may have ended requests
        before = {each.request_id: each.status for each in self.alive}
        plan = self.scheduler.schedule()
        assert bool(plan.preempted) == preempts
        for row in plan.release:
            del self.rows[row]  # each row is released exactly once
        for each in plan.preempted:
            assert (each.status, each.row, each.num_computed, each.num_unread) == (Status.WAITING, None, 0, 0)
            assert before[each.request_id] is not Status.PREFILLING, "a begun prefill is never preempted"
            pause = self.steps - self.came_back.get(each.order, -100)
            assert pause > self.scheduler.config.page_size, "a replay is not begun only to be preempted at once"
        for chunk in plan.prefill:
            if chunk.request.num_preemptions and chunk.start == 0:
                self.came_back[chunk.request.order] = self.steps
        self._check_prefill(plan, before)
        assert all(before[each.request_id] is Status.RUNNING for each in plan.decode)
        assert len(plan.decode) <= self.scheduler.config.max_num_seqs
        results = [(each, self._decode(each)) for each in plan.decode]
        results += [(chunk.request, token) for chunk in plan.prefill if (token := self._prefill(chunk)) is not None]
        self._check_counts()
        self.in_flight.append(results)
        while self.in_flight and (len(self.in_flight) > self.lag or not plan.has_work):
            self.read()
        return plan

    def _check_prefill(self, plan, before) -> None:
        limits = self.scheduler.config
        counts = [chunk.count for chunk in plan.prefill]
        assert sum(counts) <= limits.max_num_batched_tokens
        assert len(counts) <= limits.max_prefill_seqs
        assert all(counts)
        budget = limits.max_num_batched_tokens
        for chunk in plan.prefill:
            rest = chunk.request.prefill_target - chunk.start
            assert chunk.count == min(rest, budget), "a chunk is as long as the budget allows"
            assert chunk.is_last == (chunk.count == rest)
            budget -= chunk.count
        served = {id(chunk.request) for chunk in plan.prefill}
        assert all(id(each) in served for each in self.alive if before[each.request_id] is Status.PREFILLING)

    def _prefill(self, chunk) -> int | None:
        each = chunk.request
        row = self.rows.setdefault(each.row, [])
        assert len(row) == chunk.start, "chunks cover the text in order, from an empty row"
        row += each.tokens[chunk.start : chunk.start + chunk.count]
        if not chunk.is_last:
            return None
        sampled = None if each.is_replay else next_token(row)
        self.newest[each.row] = each.output_token_ids[-1] if sampled is None else sampled
        return sampled

    def _decode(self, each: Request) -> int:
        row = self.rows[each.row]
        row.append(self.newest[each.row])
        self.newest[each.row] = next_token(row)
        return self.newest[each.row]

    def _check_counts(self) -> None:
        scheduler = self.scheduler
        held = sum(scheduler.entries_for(len(row)) for row in self.rows.values())
        assert held + scheduler.free_entries == scheduler.config.num_free_entries
        owners = [each.row for each in self.alive if each.row is not None]
        assert len(set(owners)) == len(owners) == scheduler.num_running
        assert set(owners) == set(self.rows) <= set(range(1, scheduler.config.max_num_seqs + 1))
        for each in self.alive:
            if each.row is not None:
                assert each.num_computed == len(self.rows[each.row])
            if each.status is Status.RUNNING:
                assert each.num_computed == len(each.prompt_token_ids) + each.num_dispatched_outputs - 1
            assert each.num_dispatched_outputs <= each.max_tokens
        admitted = [each.order for each in self.alive if each.row is not None]
        waiting = [each.order for each in self.alive if each.row is None]
        assert max(admitted, default=-1) < min(waiting, default=10**9), "nobody is overtaken"

    def read(self) -> None:
        for each, token in self.in_flight.popleft():
            if each.record(token) and (reason := ends(each, each.output_token_ids)):
                self.scheduler.finish(each, reason)
                self._end(each)

    def read_all(self) -> None:
        while self.in_flight:
            self.read()

    def _end(self, each: Request) -> None:
        self.alive.remove(each)
        self.ended.append(each)

    def run(self, limit: int = 5000) -> None:
        while self.scheduler.has_unfinished:
            self.step()
            assert self.steps < limit, "no progress"
        self.read_all()
        for row in self.scheduler.schedule().release:
            del self.rows[row]
        assert not self.rows
        assert self.scheduler.free_entries == self.scheduler.config.num_free_entries


def engine(lag: int = 1, **changes) -> Engine:
    clock = FakeClock()
    return Engine(Scheduler(config(**changes), clock), clock, lag)
