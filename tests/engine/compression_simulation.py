"""A simulated device whose tables differ in length under the scheduler, and requests that compress. Not a test itself.

What is evicted, and what is generated, follows from what the tables hold alone: so answers show whether a request was
treated the same, whatever ran beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import scheduler_simulation as dense
from scheduler_simulation import FakeClock, config

from sparsejax.engine.requests.request import Request, Status, derive_seed
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.scheduling.plan import ALL, Fork
from sparsejax.engine.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class Policy:
    between_chunks: bool = False
    chunk_alignment: int = 1
    uses_seed: bool = False


@dataclass(frozen=True)
class Rule:
    pooled: bool = True  # tables share a budget
    whole_pages: bool = False  # of whole pages, which may all be full

    @property
    def equal_heads(self):
        return not self.pooled

    def most_kept(self, budget, *, page_size):
        return -(-budget // page_size) * page_size if self.whole_pages else budget

    def max_entries(self, budget, text_length, *, num_layers, num_kv_heads, page_size):
        tables = num_layers * num_kv_heads
        whole = tables * -(-min(budget, text_length) // page_size)
        spread = (tables * budget + tables * (page_size - 1)) // page_size
        spread = whole if self.whole_pages else spread
        return min(spread, tables * -(-text_length // page_size)) if self.pooled else whole


def keeps_whole_pages(rule) -> bool:
    return rule.most_kept(1, page_size=2) > 1


@dataclass(frozen=True)
class Params:
    """What the scheduler reads of `CompressionParams`."""

    budget_tokens: int | None = None
    keep_fraction: float | None = None
    once: bool = True
    per_step: bool = False
    interval: int | None = None
    evict_strategy: str = "reuse"
    evict_count: int = 1
    context_tokens: int | None = None
    policy: Policy = field(default_factory=Policy)
    rule: Rule = field(default_factory=Rule)
    method: str = "simulated"
    evicts: bool = True
    decodes_again: bool = False
    compresses: bool = False

    def prefilled(self, prompt_length: int) -> int:
        return prompt_length

    def budget(self, text_length: int) -> int:
        if self.budget_tokens is not None:
            return self.budget_tokens
        return max(math.ceil(self.keep_fraction * text_length), 1)

    def most_evicted(self, text_length: int) -> int:
        return self.budget(text_length)


def request(name, prompt, max_tokens=4, *, shared=0, family=0, compression=None, **params) -> Request:
    """As `scheduler_simulation.request`."""
    each = dense.request(name, prompt, max_tokens, shared=shared, family=family, **params)
    if compression is not None:
        each.compression = compression
    return each


class Page(list):
    """(position, token) in the order of slots; an evicted slot is None. Compared by identity."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Device:
    """Tables of pages by row. It never holds more than `num_entries` pages, not even for a moment."""

    def __init__(self, *, page_size: int, tables: int, num_entries: int) -> None:
        self.page_size, self.tables, self.num_entries = page_size, tables, num_entries
        self.rows: dict[int, list[list[Page]]] = {}
        self.holes: dict[int, list[int]] = {}

    def held(self, *more: Page) -> int:
        pages = {id(page) for row in self.rows.values() for table in row for page in table} | {id(p) for p in more}
        return len(pages)

    def check(self, *more: Page) -> None:
        assert self.held(*more) <= self.num_entries, "the device never runs out"

    def references(self, page: Page) -> int:
        return sum(other is page for row in self.rows.values() for table in row for other in table)

    def live(self, row: int) -> list[list[tuple[int, int]]]:
        return [[slot for page in table for slot in page if slot] for table in self.rows[row]]

    def state(self, row: int) -> tuple:
        return tuple(tuple(sorted(table)) for table in self.live(row))

    def append(self, row: int, position: int, tokens: list[int]) -> None:
        tables = self.rows.setdefault(row, [[] for _ in range(self.tables)])
        holes = self.holes.setdefault(row, [-1] * self.tables)
        for at, token in enumerate(tokens, start=position):
            for number, table in enumerate(tables):
                if holes[number] >= 0:
                    page, slot = table[holes[number] // self.page_size], holes[number] % self.page_size
                    assert page[slot] is None
                    assert self.references(page) == 1
                    page[slot] = (at, token)
                    holes[number] = -1
                    continue
                if not table or len(table[-1]) == self.page_size:
                    table.append(Page())
                assert self.references(table[-1]) == 1, "shared pages are full"
                table[-1].append((at, token))
        self.check()

    def best(self, row: int, counts: list[int]) -> list[list[tuple[int, int]]]:
        """The `counts` best slots of each table, by a score that follows from the slot alone."""
        return [
            sorted(table, key=lambda slot, number=number: derive_seed(slot[1], 1 + slot[0] * 7 + number))[:count]
            for number, (table, count) in enumerate(zip(self.live(row), counts, strict=True))
        ]

    def compress(self, row: int, budget: int, *, pooled: bool, whole_pages: bool = False) -> None:
        if whole_pages:  # as many pages as the budget takes, full ones, in each table or given by one to another
            pages = self.page_size
            budget = -(-budget // pages)
        else:
            pages = 1
        counts = [budget] * self.tables
        if pooled:  # the first half of the tables gives to the second, by an amount that depends on the text
            for number in range(self.tables // 2):
                given = derive_seed(len(self.live(row)[0]), 1 + number) % (budget + 1)
                counts[number] -= given
                counts[-1 - number] += given
        kept = self.best(row, [count * pages for count in counts])
        assert sum(map(len, kept)) <= budget * pages * self.tables
        for table, slots in zip(self.rows[row], kept, strict=True):
            self._compact(table, slots)

    def _compact(self, table: list[Page], slots: list) -> None:
        del table[-(-len(slots) // self.page_size) :]
        for number, page in enumerate(table):
            assert self.references(page) == 1, "rows that share are not compressed"
            page[:] = slots[number * self.page_size : (number + 1) * self.page_size]

    def evict(self, lanes) -> None:
        """lanes: (row, budget, count, strategy, bulk)."""
        fresh = []
        for row, budget, count, strategy, bulk in lanes:
            self.holes[row] = [-1] * self.tables
            sizes = [len(table) for table in self.live(row)]
            assert bulk or max(sizes) <= budget + 1, "only what is marked so is far over budget"
            wanted = [budget - count + 1 if size > budget else size for size in sizes]
            kept = self.best(row, wanted)
            for number, table in enumerate(self.rows[row]):
                slots = set(kept[number])
                if len(slots) < sizes[number] and (strategy == "sparse_copy" or (strategy == "reuse" and bulk)):
                    if strategy == "sparse_copy":
                        order = sorted(slots)
                        parts = range(0, len(order), self.page_size)
                        copies = [Page(order[at : at + self.page_size]) for at in parts]
                        fresh.append((table, copies))
                    else:
                        self._compact(table, sorted(slots))
                    continue
                for page in table:
                    page[:] = [slot if slot in slots else None for slot in page]
                if strategy in ("reuse", "free_block"):
                    table[:] = [page for page in table if any(page)]
                if strategy == "reuse":
                    flat = [slot for page in table for slot in page]
                    self.holes[row][number] = flat.index(None) if None in flat else -1
        self.check(*(page for _, copies in fresh for page in copies))
        for table, copies in fresh:
            table[:] = copies

    def fork(self, source: int, target: int, count: int) -> None:
        assert target not in self.rows, "forked into an empty row"
        tables = []
        for table in self.rows[source]:
            length = sum(map(len, table))
            whole, rest = divmod(min(count, length), self.page_size)
            tables.append(table[:whole] + ([Page(table[whole][:rest])] if rest else []))
        self.rows[target], self.holes[target] = tables, [-1] * self.tables
        self.check()

    def release(self, row: int) -> None:
        del self.rows[row]
        self.holes.pop(row, None)

    def usage(self):
        """What `row_usage` gives, for all rows."""
        size = 1 + max(self.rows, default=0)
        counts = SimpleNamespace(held=[0] * size, next_growth=[0] * size, second_growth=[0] * size)
        for row, tables in self.rows.items():
            for table, hole in zip(tables, self.holes.get(row, [-1] * self.tables), strict=True):
                length = sum(map(len, table))
                after = length + (hole < 0)
                counts.held[row] += len(table)
                counts.next_growth[row] += hole < 0 and length % self.page_size == 0
                counts.second_growth[row] += after % self.page_size == 0
        return counts


@dataclass
class Engine(dense.Serving):
    """Runs plans on the simulated device, reads the results `lag` steps late, and checks every promise."""

    scheduler: Scheduler
    clock: FakeClock
    lag: int = 1
    device: Device = field(init=False)
    newest: dict[int, int] = field(default_factory=dict)
    in_flight: list = field(default_factory=list)
    alive: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    compressed: dict[str, list[int]] = field(default_factory=dict)  # text lengths, since the last admission
    forced: int = 0
    snapshots: int = 0
    prefilled: int = 0
    reads: int = 0  # times that everything had to be read first
    steps: int = 0

    def __post_init__(self) -> None:
        limits = self.scheduler.config
        self.device = Device(
            page_size=limits.page_size, tables=limits.entries_per_page_column, num_entries=limits.num_free_entries
        )

    def step(self):
        self.clock.now += 1
        self.steps += 1
        if self.scheduler.must_preempt():
            self.reads += 1
            self.read_all()
        plan = self.scheduler.schedule()
        for change in plan.changes:
            self._change(change)
        self._check_prefill(plan)
        results = []
        for each in plan.decode:
            token = self._decode(each, plan.forced.get(each))
            if each not in plan.forced:
                results.append((each, token))
        for chunk in plan.prefill:
            if chunk.is_first:
                self.compressed[chunk.request.request_id] = []
            token = self._prefill(chunk)
            if token is not None:
                results.append((chunk.request, token))
        self._compress(plan)
        for each in plan.snapshots:
            self.snapshots += 1
            self._change(each)
        self._check_counts(plan)
        self.in_flight.append((results, plan, self.device.usage(), self._free()))
        while self.in_flight and (len(self.in_flight) > self.lag or not plan.has_work):
            self.read()
        return plan

    def _free(self) -> int:
        return self.device.num_entries - self.device.held()

    def _change(self, change) -> None:
        if isinstance(change, Fork):
            self.device.fork(change.source, change.target, change.count)
        else:
            self.device.release(change.row)

    def _check_prefill(self, plan) -> None:
        limits = self.scheduler.config
        room = limits.max_num_batched_tokens
        if plan.decode:
            room = max(limits.max_mixed_tokens - len(plan.decode), (limits.max_mixed_tokens + 1) // 2)
        assert sum(chunk.count for chunk in plan.prefill) <= room
        assert all(chunk.count > 0 for chunk in plan.prefill)
        for chunk in plan.prefill:
            if chunk.request.footprint is None:
                continue
            schedule, stop = chunk.request.footprint.schedule, chunk.start + chunk.count
            places = schedule.places
            assert not any(chunk.start < place < stop for place in places), "a chunk crosses no compression"
            if stop not in places and not chunk.is_last and chunk.compressed_at is not None:
                assert chunk.count % schedule.params.policy.chunk_alignment == 0
        assert sum(not chunk.is_last for chunk in plan.prefill) <= 1

    def _prefill(self, chunk) -> int | None:
        each = chunk.request
        self.device.append(each.row, chunk.start, each.tokens[chunk.start : chunk.start + chunk.count])
        self.prefilled += chunk.count
        if not chunk.is_last:
            return None
        sampled = None if each.is_replay else self._sample(each.row)
        self.newest[each.row] = each.output_token_ids[each.num_prefilled_outputs - 1] if sampled is None else sampled
        return sampled

    def _decode(self, each: Request, known: int | None) -> int:
        self.device.append(each.row, each.num_computed - 1, [self.newest[each.row]])
        sampled = self._sample(each.row)
        if known is not None:
            self.forced += 1
            assert known == sampled, "a replay sees what was seen the first time"
        self.newest[each.row] = sampled
        return sampled

    def _sample(self, row: int) -> int:
        return hash(self.device.state(row)) % 25

    def _compress(self, plan) -> None:
        assert not {each.request for each in plan.compress} & {each.request for each in plan.evict}
        for each in plan.compress:
            assert each.text_length == each.request.num_computed
            if each.request.compression.rule.equal_heads:
                sizes = map(len, self.device.live(each.request.row))
                assert min(sizes) > each.budget, "what is within its budget is left alone"
            rule = each.request.compression.rule
            self.device.compress(
                each.request.row, each.budget, pooled=not rule.equal_heads, whole_pages=keeps_whole_pages(rule)
            )
            self.compressed.setdefault(each.request.request_id, []).append(each.text_length)
        lanes = []
        for each in plan.evict:
            assert each.text_length == each.request.num_computed
            params = each.request.compression
            lanes.append((each.request.row, each.budget, params.evict_count, params.evict_strategy, each.bulk))
        self.device.evict(lanes)
        for each in (*plan.decode, *(chunk.request for chunk in plan.prefill if chunk.is_last)):
            if each.compression.evicts and each.compression.per_step:
                most = max(map(len, self.device.live(each.row)))
                assert most <= each.compression.budget(each.num_computed), "what evicts per step is never over budget"

    def _check_counts(self, plan) -> None:
        scheduler = self.scheduler
        assert 0 <= scheduler.free_entries <= self._free(), "the host never counts more than there is"
        if not plan.balance.rows:
            assert scheduler.free_entries == self._free()
        assert scheduler.free_entries <= scheduler.available_entries
        owners = [each.row for each in self.alive if each.row is not None]
        assert len(set(owners)) == len(owners) == scheduler.num_running
        residents = scheduler.prefix_cache_stats.resident_rows
        assert residents == len(self.device.rows) - len(owners)
        for each in self.alive:
            if each.row is None:
                continue
            live = self.device.live(each.row)
            if each.footprint is None:
                assert all(len(table) == each.num_computed for table in live)
            else:
                spare = self.device.page_size - 1 if keeps_whole_pages(each.compression.rule) else 0
                assert sum(map(len, live)) <= (each.num_held + spare) * self.device.tables
        admitted = [each.order for each in self.alive if each.row is not None]
        waiting = [each.order for each in self.alive if each.row is None]
        assert max(admitted, default=-1) < min(waiting, default=10**9), "nobody is overtaken"

    def read(self) -> None:
        results, plan, usage, free = self.in_flight.pop(0)
        if plan.has_work:
            assert self.scheduler.settle(plan.balance, usage) == free, "the device's count follows from its figures"
        for each, token in results:
            if each.record(token) and (reason := dense.ends(each, each.output_token_ids)):
                self.scheduler.finish(each, reason)
                self._end(each)

    def run(self, limit: int = 5000) -> None:
        while self.scheduler.has_unfinished:
            self.step()
            assert self.steps < limit, "no progress"
        self.read_all()
        for _ in range(2):
            for change in self.scheduler.schedule().changes:
                self._change(change)
            self.scheduler.reset_prefix_cache()
        assert not self.device.rows
        assert self.scheduler.free_entries == self.scheduler.config.num_free_entries


def engine(lag: int = 1, **changes) -> Engine:
    clock = FakeClock()
    return Engine(Scheduler(config(**changes), clock), clock, lag)


def alone(each: Request, **limits) -> tuple[list[int], list[int]]:
    """What the request generates with the engine to itself, and the text lengths at which it is compressed."""
    run = engine(0, **{**limits, "max_resident_rows": 0})
    twin = Request(
        each.request_id,
        each.prompt_token_ids,
        SamplingParams(max_tokens=each.params.max_tokens, ignore_eos=each.params.ignore_eos),
        compression=each.compression,
    )
    run.add(twin)
    run.run()
    assert twin.status is Status.FINISHED
    assert not twin.num_preemptions
    return twin.output_token_ids, run.compressed[each.request_id]


__all__ = ["ALL", "Device", "Engine", "Params", "Policy", "Rule", "alone", "engine", "request"]
