"""A simulated device under the scheduler, which checks every promise of every plan. Not a test itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sparsejax.engine.requests.request import Request, Status, derive_seed
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.scheduling.plan import Fork
from sparsejax.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from sparsejax.errors import InvalidArgumentError

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
    base |= changes
    return SchedulerConfig(**{"max_mixed_tokens": base["max_num_batched_tokens"], **base})


def request(name: str, prompt: int, max_tokens: int = 4, *, shared: int = 0, family: int = 0, **params) -> Request:
    """A request with `prompt` tokens, the first `shared` of which are those of its family."""
    ids = [1 + (derive_seed(1000 + family if i < shared else prompt, i + 1) % 40) for i in range(prompt)]
    return Request(name, ids, SamplingParams(max_tokens=max_tokens, **({"ignore_eos": True} | params)))


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


class Device:
    """Rows of pages of tokens, shared by identity: what the device's cache is to the scheduler's counts."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.rows: dict[int, list[list[int]]] = {}

    def text(self, row: int) -> list[int]:
        return [token for page in self.rows.get(row, []) for token in page]

    def append(self, row: int, tokens: list[int]) -> None:
        pages = self.rows.setdefault(row, [])
        for token in tokens:
            if not pages or len(pages[-1]) == self.page_size:
                pages.append([])
            assert sum(page is pages[-1] for each in self.rows.values() for page in each) == 1, "shared pages are full"
            pages[-1].append(token)

    def fork(self, source: int, target: int, count: int) -> None:
        assert target not in self.rows, "forked into an empty row"
        assert 0 < count <= len(self.text(source)), "only what is there can be taken over"
        whole, rest = divmod(count, self.page_size)
        self.rows[target] = self.rows[source][:whole]
        if rest:
            self.rows[target].append(self.rows[source][whole][:rest])

    def num_pages(self, rows) -> int:
        return len({id(page) for row in rows for page in self.rows[row]})


class Serving:
    """What simulated engines do alike."""

    def add(self, each: Request) -> None:
        self.scheduler.add(each)
        self.alive.append(each)

    def cancel(self, request_id: str) -> None:
        each = self.scheduler.cancel(request_id)
        if each is not None:
            self._end(each)

    def serve(self, jobs: Iterable[tuple[Request, int, int | None]], refused: Callable) -> list[Request]:
        """Runs jobs to their ends: (request, step at which it arrives, cancelled so many steps later or None).

        Args:
          refused: told of each request that is refused, and of the error.

        Returns:
          Those that were taken, by arrival.
        """
        accepted: list[Request] = []
        cancels: list[tuple[int, str]] = []

        def step() -> None:
            self.step()
            for when, name in cancels:
                if when == self.steps:
                    self.cancel(name)

        for each, arrival, cancel in jobs:
            while self.steps < arrival and self.scheduler.has_unfinished:
                step()
            try:
                self.add(each)
            except InvalidArgumentError as error:
                refused(each, error)
                continue
            accepted.append(each)
            if cancel == 0:
                self.cancel(each.request_id)
            elif cancel is not None:
                cancels.append((self.steps + cancel, each.request_id))
        while self.scheduler.has_unfinished:
            step()
            assert self.steps < 5000, "no progress"
        self.run()
        assert sorted(self.ended, key=lambda each: each.order) == accepted, "every request ends exactly once"
        return accepted

    def read_all(self) -> None:
        while self.in_flight:
            self.read()

    def _end(self, each: Request) -> None:
        self.alive.remove(each)
        self.ended.append(each)

    def run_to_end_of(self, each: Request) -> None:
        while not each.finished:
            self.step()


@dataclass
class Engine(Serving):
    """Runs plans on a simulated device whose results the host reads `lag` steps late, checking every promise."""

    scheduler: Scheduler
    clock: FakeClock
    lag: int = 1
    device: Device = field(init=False)
    newest: dict[int, int] = field(default_factory=dict)
    in_flight: deque = field(default_factory=deque)
    alive: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    came_back: dict[int, int] = field(default_factory=dict)  # step in which a replay began, by order
    steps: int = 0
    prefilled: int = 0  # tokens that prefill steps have computed

    def __post_init__(self) -> None:
        self.device = Device(self.scheduler.config.page_size)

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
        self._change_table(plan)
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

    def _change_table(self, plan) -> None:
        for change in plan.changes:
            if isinstance(change, Fork):
                self.device.fork(change.source, change.target, change.count)
            else:
                del self.device.rows[change.row]  # each row is released exactly once

    def _check_prefill(self, plan, before) -> None:
        limits = self.scheduler.config
        counts = [chunk.count for chunk in plan.prefill]
        budget = limits.max_num_batched_tokens
        if plan.decode:
            budget = max(limits.max_mixed_tokens - len(plan.decode), (limits.max_mixed_tokens + 1) // 2)
        assert sum(counts) <= budget
        assert len(counts) <= limits.max_prefill_seqs
        assert all(counts)
        for chunk in plan.prefill:
            rest = chunk.request.prefill_target - chunk.start
            began = before[chunk.request.request_id] is Status.WAITING or chunk.request in plan.preempted
            assert chunk.is_first == began
            if chunk.count < min(rest, budget):
                assert chunk is plan.prefill[-1], "a chunk is as long as the budget allows, or the last, and trimmed"
                size = sum(counts) + len(plan.decode)
                assert size in limits.buckets(len(plan.decode))
            assert chunk.is_last == (chunk.count == rest)
            budget -= chunk.count
        served = {id(chunk.request) for chunk in plan.prefill}
        assert all(id(each) in served for each in self.alive if before[each.request_id] is Status.PREFILLING)

    def _prefill(self, chunk) -> int | None:
        each = chunk.request
        assert len(self.device.text(each.row)) == chunk.start, "chunks cover the text in order, from an empty row"
        self.device.append(each.row, each.tokens[chunk.start : chunk.start + chunk.count])
        self.prefilled += chunk.count
        row = self.device.text(each.row)
        assert row == each.tokens[: len(row)], "a forked prefix is the request's own"
        if not chunk.is_last:
            return None
        sampled = None if each.is_replay else next_token(row)
        self.newest[each.row] = each.output_token_ids[-1] if sampled is None else sampled
        return sampled

    def _decode(self, each: Request) -> int:
        self.device.append(each.row, [self.newest[each.row]])
        self.newest[each.row] = next_token(self.device.text(each.row))
        return self.newest[each.row]

    def _check_counts(self) -> None:
        scheduler, rows, limits = self.scheduler, self.device.rows, self.scheduler.config
        held = self.device.num_pages(rows) * limits.entries_per_page_column
        assert held + scheduler.free_entries == limits.num_free_entries
        owners = [each.row for each in self.alive if each.row is not None]
        assert len(set(owners)) == len(owners) == scheduler.num_running
        assert set(owners) <= set(rows) <= set(range(1, limits.max_num_seqs + limits.max_resident_rows + 1))
        stats = scheduler.prefix_cache_stats
        assert stats.resident_rows == len(rows) - len(owners)
        resident_pages = self.device.num_pages(rows) - self.device.num_pages(owners)
        assert stats.resident_entries == resident_pages * limits.entries_per_page_column
        assert limits.max_resident_rows or not stats.resident_rows
        assert scheduler.available_entries == scheduler.free_entries + stats.resident_entries
        for each in self.alive:
            if each.row is not None:
                assert each.num_computed == len(self.device.text(each.row))
            if each.status is Status.RUNNING:
                assert each.num_computed == len(each.prompt_token_ids) + each.num_dispatched_outputs - 1
            assert each.num_dispatched_outputs <= each.max_tokens
        for row, text in scheduler.cached_texts().items():
            assert self.device.text(row)[: len(text)] == list(text), "what can be taken over is there"
        admitted = [each.order for each in self.alive if each.row is not None]
        waiting = [each.order for each in self.alive if each.row is None]
        assert max(admitted, default=-1) < min(waiting, default=10**9), "nobody is overtaken"

    def read(self) -> None:
        for each, token in self.in_flight.popleft():
            if each.record(token) and (reason := ends(each, each.output_token_ids)):
                self.scheduler.finish(each, reason)
                self._end(each)

    def run(self, limit: int = 5000) -> None:
        while self.scheduler.has_unfinished:
            self.step()
            assert self.steps < limit, "no progress"
        self.read_all()
        self._change_table(self.scheduler.schedule())
        self.scheduler.reset_prefix_cache()
        self._change_table(self.scheduler.schedule())
        assert not self.device.rows
        assert self.scheduler.free_entries == self.scheduler.config.num_free_entries


def engine(lag: int = 1, **changes) -> Engine:
    clock = FakeClock()
    return Engine(Scheduler(config(**changes), clock), clock, lag)
