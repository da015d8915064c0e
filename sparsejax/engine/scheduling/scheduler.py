"""Decides what the next step computes. Pure host logic over counts: no arrays, no page ids, and the clock is injected.

The caller's protocol, once a step:

    if scheduler.must_preempt():
        ...                          # read every result in flight: record tokens, finish() what has ended
    plan = scheduler.schedule()      # the counters already include this plan: dispatch it before any other call
    ...                              # on the device: plan.changes in order, then plan.decode, then plan.prefill, then
                                     # plan.evict and plan.compress, then plan.snapshots
    ...                              # read the results of the step BEFORE this one: settle() the balance of its plan,
                                     # record tokens, finish() what ended

`finish` and `cancel` may come while a token of the request is in flight. Its row and entries are then free at once on
the host; on the device they become free by the next plan's changes, which run behind the step that still uses them.
The surplus token is discarded (`Request.record` returns False).

An empty plan with unfinished requests means: results in flight must be read before anything can go on.

The rules:

* First come, first served: the oldest waiting request is never overtaken, so every running request is older than every
  waiting one, and a preempted request is at the front of the queue by itself.
* A request is admitted with its first chunk, and only if the pool holds its whole prompt, the decodes of all running
  requests while that prompt is computed, and one token more for everyone. Once begun, a prefill is never stalled.
* Decodes come first in a step, and take what they need; prompts get the rest of its tokens, at least half of them, or
  fewer where that saves padding (`buckets.trim`).
* Pages, too, go to decodes first; if they do not fit, the latest arrival gives its entries back and later replays its
  prompt and outputs. The oldest request is never preempted, so something always finishes.
* A preempted request comes back only when everyone has a page more to grow, or it would soon be preempted again.

Requests that compress (`compression_schedule.py` says when) are admitted by what they hold at most (`footprint.py`):

* What a compressed row holds is known one step late and counted too high until then. Where that leaves too little room,
  `must_preempt` has the caller read first; only if room is still short is anybody preempted.
* A chunk ends where its request is compressed, and nobody is admitted behind a prefill that did not end.
* One that evicts while it decodes replays its outputs by decoding them: `Plan.forced` holds what they are.

With `max_resident_rows`, the row of a request that ends stays resident for its tokens to be reused (`prefix_cache.py`):

* An admitted request is given the longest cached prefix of its text by a fork, and prefills the rest.
* Resident rows never make a request wait or be preempted: every rule above counts the entries that no running row
  holds, and resident rows are evicted, least recently used first, when what is taken is not free. A row is evicted
  whole; blocks that others share with it stay, so of a tree of texts the leaves go first.
* A request that shares more with one whose prefill is under way waits for it, if that saves a good part of its own
  prefill. Prefills once begun are never stalled, so this ends.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sparsejax.engine.requests.footprint import Footprint
from sparsejax.engine.requests.request import CompressionRecord, Request, Status
from sparsejax.engine.scheduling.buckets import most_trims, trim
from sparsejax.engine.scheduling.compression_due import due_now, full_rings
from sparsejax.engine.scheduling.contexts import context_key
from sparsejax.engine.scheduling.limits import check_limits, most_tokens
from sparsejax.engine.scheduling.plan import Chunk, Evict, Plan
from sparsejax.engine.scheduling.prefix_cache import Hit, PrefixCacheStats
from sparsejax.engine.scheduling.rows import Rows
from sparsejax.engine.scheduling.scheduler_config import SchedulerConfig
from sparsejax.engine.scheduling.store_rows import StoreRows
from sparsejax.engine.scheduling.usage import Balance, RowCounts
from sparsejax.errors import DuplicateRequestError, InvalidArgumentError, SchedulingError

__all__ = ["FINISH_REASONS", "Scheduler", "SchedulerConfig"]

FINISH_REASONS = ("stop", "length", "abort")
EntryCount = Any  # an int; of a `DeltaCache` `Entries`
WORTH_WAITING = 0.25  # wait for another's prefill if it saves this fraction of the tokens still to compute


class Scheduler:
    """Continuous batching over exact counts of rows and entries. See the module's docstring for protocol and rules."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.num_preemptions = 0
        self._rows = self._empty_rows()
        self._waiting: deque[Request] = deque()  # by arrival
        self._admitted: list[Request] = []  # by arrival, all older than those waiting
        self._requests: dict[str, Request] = {}  # unfinished
        self._arrivals = 0

    def _empty_rows(self) -> Rows | StoreRows:
        config = self.config
        return Rows(config) if config.store is None else StoreRows(config, config.store)

    @property
    def free_entries(self) -> EntryCount:
        """Entries free once all dispatched steps and the pending changes have run; of a `DeltaCache` of each pool."""
        return self._rows.free_entries

    @property
    def pool_entries(self) -> EntryCount:
        """Entries of the empty pool."""
        return self.config.num_free_entries if self.config.store is None else self.config.store.entries

    @property
    def available_entries(self) -> EntryCount:
        """Entries that no request holds: free, or only kept for reuse. What requests can count on."""
        return self._rows.unclaimed_entries if isinstance(self._rows, StoreRows) else self._rows.table.unclaimed_entries

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """What prefix caching did and holds; all zero if it is off."""
        rows = self._rows
        if isinstance(rows, StoreRows) or rows.cache is None:
            return PrefixCacheStats()
        return rows.cache.stats(rows.table.unclaimed_entries - rows.table.free_entries)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a row: prefilling or decoding."""
        return len(self._admitted)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or hold a row."""
        return len(self._requests)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def entries_for(self, num_tokens: int) -> int:
        """Entries that `num_tokens` tokens of one request hold, shared ones included; not for a `DeltaCache`."""
        assert isinstance(self._rows, Rows)
        return self._rows.table.entries_for(num_tokens)

    def check(self, request: Request, *, name: str | None = None) -> None:
        """Raises what `add` would raise, and changes nothing: to refuse a batch before any of it is taken.

        Args:
          name: what messages call the prompt. Default: by the request's id.

        Raises:
          EmptyPromptError, PromptTooLongError, InvalidArgumentError: as `limits.check_limits` says.
          DuplicateRequestError: an unfinished request has the same id.
        """
        self._check(request, name)

    def _check(self, request: Request, name: str | None = None) -> Footprint | None:
        if request.request_id in self._requests:
            raise DuplicateRequestError(f"request_id {request.request_id!r} is in use by an unfinished request.")
        return check_limits(request, self.config, name=name or f"prompt of request {request.request_id!r}")

    def add(self, request: Request) -> None:
        """Takes a request into the queue, and clips its `max_tokens` so that alone it always fits.

        Raises:
          InvalidArgumentError: as `check` says.
        """
        request.footprint = self._check(request)
        request.max_tokens = most_tokens(request, request.footprint, self.config)
        request.context_key = None if self._rows.cache is None else context_key(request)
        request.order = self._arrivals
        self._arrivals += 1
        if request.arrival_time is None:
            request.arrival_time = self.clock()
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends an unfinished request in any state and gives its row and entries back.

        Raises:
          SchedulingError: the request is not (or no longer) this scheduler's.
        """
        if reason not in FINISH_REASONS:
            raise InvalidArgumentError(f"reason must be one of {', '.join(FINISH_REASONS)}; got {reason!r}.")
        if self._requests.get(request.request_id) is not request:
            raise SchedulingError(f"request {request.request_id!r} is not unfinished here: it cannot finish (again).")
        waits = request.status is Status.WAITING
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.status = Status.FINISHED  # from here on a `restart` drops it, whatever the rest was interrupted at
        if waits:
            with contextlib.suppress(ValueError):  # an interrupt may have met it before it was in the queue
                self._waiting.remove(request)
        else:
            self._admitted.remove(request)
            self._rows.retire(request)
        del self._requests[request.request_id]

    def cancel(self, request_id: str) -> Request | None:
        """Ends a request with reason "abort". Returns it, or None if no unfinished request has this id."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def cached_texts(self) -> dict[int, Sequence[int]]:
        """The tokens that the next request could take over from each row, by the row's number."""
        return {} if self._rows.cache is None else self._rows.cache.texts()

    def reset_prefix_cache(self) -> None:
        """Releases all resident rows; on the device with the next plan."""
        self._rows.release_residents()

    def restart(self) -> None:
        """Makes every unfinished request wait, to be replayed: for a device whose cache was lost.

        All counts are made anew, so it does not matter where a call was interrupted. Tokens that have not been read are
        forgotten; the replays draw them again, the same ones. Residents are lost.
        """
        cache, self._rows = self._rows.cache, self._empty_rows()
        if cache is not None and self._rows.cache is not None:
            self._rows.cache.go_on_counting(cache)
        self._requests = {name: each for name, each in self._requests.items() if not each.finished}
        for request in self._requests.values():
            request.start_over()
        self._admitted.clear()
        self._waiting = deque(sorted(self._requests.values(), key=lambda each: each.order))

    def must_preempt(self) -> bool:
        """Whether the next plan does not fit, so that `schedule` would preempt. Read all results in flight first.

        What compressed rows hold is counted too high until it is read, so reading alone may answer it with no.
        """
        rows, prefilling = self._rows, self._prefilling
        if isinstance(rows, StoreRows):
            return False  # what a request can come to hold was reserved when it was admitted
        most = len(self._admitted) * self.config.entries_per_page_column
        most += 0 if prefilling is None else self.entries_for(self.config.max_num_batched_tokens)
        if most <= rows.unclaimed_entries:
            return False  # asked every step, so the common case must not cost a pass over all requests
        decode = [each for each in self._admitted if self._decodes(each)]
        growth = sum(self._growth(each, 1) for each in decode)
        if prefilling is not None:
            count = self._chunk_tokens(prefilling, self._budget(len(decode), admit=True))
            growth += rows.table.entries_to_grow(rows.of(prefilling), count)
        return growth > rows.unclaimed_entries

    def schedule(self) -> Plan:
        """Plans a step and counts it as dispatched.

        Raises:
          SchedulingError: a request would be preempted whose outputs have not all been read.
        """
        preempted = self._make_room()
        decode = [each for each in self._admitted if self._decodes(each)]
        forced = {}
        for request in decode:
            known = request.forced_token
            self._rows.extend(request, 1)
            if known is None:
                request.num_dispatched_outputs += 1
            else:
                forced[request] = known
        # After decode was chosen: what becomes RUNNING here decodes in the next plan. And nobody is admitted where
        # somebody was preempted: a victim that shares more the second time might come back at once.
        admit = not preempted
        prefill = self._plan_prefill(self._budget(len(decode), admit=admit), admit=admit)
        due = due_now([*decode, *(chunk.request for chunk in prefill)])
        snapshots = self._rows.compress(due)
        rings = [] if self.config.store is None else full_rings(decode, self.config.store)
        self._rows.advance(prefill)
        return Plan(
            changes=self._rows.take_changes(),
            preempted=preempted,
            prefill=prefill,
            decode=decode,
            forced=forced,
            compress=[each for each in due if not isinstance(each, Evict)],
            evict=[each for each in due if isinstance(each, Evict)],
            snapshots=snapshots,
            rings=rings,
            balance=self._rows.balance(),
        )

    def settle(self, balance: Balance, counts: RowCounts | None = None) -> EntryCount:
        """Takes over what the device measured when it had run a plan. To be called for every plan that did work.

        Args:
          balance: the plan's.
          counts: of all rows of the slot table, by number, after all of the plan; may be None if balance.rows is empty.

        Returns:
          The entries that the device must have had free then, exactly.
        """
        return self._rows.settle(balance, counts)

    def describe(self, request: Request, record: CompressionRecord) -> None:
        """Tells what compression did to a request's row, for those that take over its context."""
        if self._rows.cache is not None and request.context_key is not None:
            self._rows.cache.describe(request, record)

    def held_entries(self, request: Request) -> EntryCount:
        """Table entries that the request's row is counted to hold, shared ones included; 0 if it has no row."""
        return 0 if request.row is None else self._rows.of(request).weight

    def replayed_entries(self, request: Request) -> EntryCount:
        """Table entries of a request's row once its prompt and known outputs are computed, as a replay does."""
        if self.config.store is not None:
            known = len(request.prompt_token_ids) + max(len(request.output_token_ids) - 1, 0)
            return self.config.store.held(known, compressed=request.compression.compresses)
        return self.entries_for(request.prefill_target)

    @property
    def _prefilling(self) -> Request | None:
        """The request whose prefill is under way, if there is one. There is at most one: the latest admitted."""
        latest = self._admitted[-1] if self._admitted else None
        return latest if latest is not None and latest.status is Status.PREFILLING else None

    @staticmethod
    def _decodes(request: Request) -> bool:
        """Whether the next plan decodes an admitted request. One that has dispatched its last token only awaits it."""
        return request.status is Status.RUNNING and request.num_dispatched_outputs < request.max_tokens

    def _make_room(self) -> list[Request]:
        """Preempts the latest arrivals until what the others do next fits."""
        preempted = []
        while self.must_preempt():
            victim = self._admitted[-1]
            if victim.num_unread:
                raise SchedulingError(
                    f"request {victim.request_id!r} must be preempted while {victim.num_unread} of its tokens are in "
                    "flight: read all results before schedule() whenever must_preempt() is true."
                )
            if len(self._admitted) == 1:
                raise SchedulingError(
                    f"request {victim.request_id!r} alone holds more of the KV cache than it ever should. Please "
                    "report this."
                )
            self._admitted.pop()
            # Not kept as a resident: more entries are needed than all residents together would give.
            self._rows.take_back(victim)
            victim.status = Status.WAITING
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self._waiting.appendleft(victim)
            preempted.append(victim)
        return preempted

    def _budget(self, num_decodes: int, *, admit: bool) -> int:
        """Prompt tokens to compute in a step in which so many requests decode: its room, or fewer if that saves time.

        Chunks of requests that compress have ends of their own and are not trimmed.
        """
        config, room = self.config, self.config.prompt_room(num_decodes)
        prefilling = [] if self._prefilling is None else [self._prefilling]
        most = min(config.max_prefill_seqs, len(prefilling) + config.max_num_seqs - len(self._admitted))
        tokens = 0
        for request in itertools.islice(itertools.chain(prefilling, self._waiting if admit else ()), most):
            if request.compression.compresses or request.footprint is not None:
                return room
            tokens += request.prefill_target - request.num_computed
            if tokens >= room:
                break
        trimmed = trim(min(tokens, room), num_decodes, config.buckets(num_decodes))
        return trimmed if trimmed < tokens else room

    def _plan_prefill(self, budget: int, *, admit: bool) -> list[Chunk]:
        chunks: list[Chunk] = []
        if self._prefilling is not None:
            chunks.append(self._next_chunk(self._prefilling, budget))
            budget -= chunks[-1].count
        # Nobody is admitted behind a prefill that did not end, so at most one is under way.
        while admit and self._waiting and len(chunks) < self.config.max_prefill_seqs and self._prefilling is None:
            request = self._waiting[0]
            if chunks and (request.compression.compresses or chunks[-1].request.compression.compresses):
                break  # a chunk that is compressed is computed by itself
            if len(self._admitted) == self.config.max_num_seqs:
                break
            hit = self._rows.find(request)
            if not self._chunk_tokens(request, budget, start=hit.count):
                break
            saved, rest = hit.pending - hit.count, request.prefill_target - hit.count
            if saved > WORTH_WAITING * rest or not self._can_admit(request, hit, budget):
                break
            self._admit(self._waiting.popleft(), hit)
            chunks.append(self._next_chunk(request, budget))
            budget -= chunks[-1].count
        return chunks

    def _can_admit(self, request: Request, hit: Hit, budget: int) -> bool:
        """Whether the pool holds the request beside everyone's growth until, and one token beyond, its last chunk."""
        rows = self._rows
        if isinstance(rows, StoreRows):
            return rows.can_admit(request)
        # Of a uniform row only whole pages are certain: there may be no room for a copy.
        reused = hit.count if hit.compressed else hit.count // self.config.page_size * self.config.page_size
        # Nobody else is admitted meanwhile, so that at least this many of its tokens go into each further step.
        room = self.config.prompt_room(len(self._admitted))
        if request.footprint is None:
            rest = request.prefill_target - reused
            steps = 1 + -(-max(rest - budget, 0) // room)
            steps += most_trims(rest + len(self._admitted), self.config.buckets(len(self._admitted)))
        else:
            steps = 1 + request.footprint.schedule.max_chunks(reused, request.prefill_target, room)
        spare = self.config.page_size if request.num_preemptions else 0
        needed = self._entries_needed(request, reused, 1 + spare)
        if hit.source is not None:
            needed -= rows.table.claimed_entries(hit.source, reused)
        unclaimed = rows.unclaimed_entries
        # ceil(a + b) <= ceil(a) + ceil(b): with that much room there is no need to look at everyone.
        if needed + len(self._admitted) * self.entries_for(steps + spare) <= unclaimed:
            return True
        needed += sum(self._growth(other, steps + spare) for other in self._admitted)
        return needed <= unclaimed

    def _entries_needed(self, request: Request, reused: int, growth: int) -> int:
        """Most entries of a waiting request until it has decoded `growth` tokens behind what it did before."""
        if request.footprint is None:
            # Outputs that are decoded again count too, or it would be preempted once more on the way.
            known = len(request.prompt_token_ids) + len(request.output_token_ids) - 1
            return self.entries_for(min(max(request.prefill_target, known) + growth, request.peak_tokens))
        decoded = min(max(len(request.output_token_ids) - 1, 0) + growth, request.max_tokens - 1)
        return request.footprint.peak(start=reused, decoded=decoded) + request.transient_entries

    def _growth(self, request: Request, num_tokens: int) -> int:
        """Most entries that an admitted request takes while it decodes so many tokens."""
        assert isinstance(self._rows, Rows)
        most = max(request.peak_tokens - request.num_computed, 0)
        return self._rows.table.entries_to_grow(self._rows.of(request), min(num_tokens, most))

    def _admit(self, request: Request, hit: Hit) -> None:
        self._rows.give(request, hit)
        request.status = Status.PREFILLING
        request.context_record = hit.record
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self.clock()
            request.num_cached_tokens = request.num_reused
        self._admitted.append(request)

    def _chunk_tokens(self, request: Request, room: int, *, start: int | None = None) -> int:
        """Tokens of the request's next chunk in a step with room for so many; 0: none that may be cut there."""
        start, stop = request.num_computed if start is None else start, request.prefill_target
        if self.config.store is not None and request.compression.compresses:
            return self.config.store.chunk(start, stop, room)
        if request.footprint is None:
            return min(stop - start, room)
        return request.footprint.schedule.chunk(start, stop, room)

    def _next_chunk(self, request: Request, budget: int) -> Chunk:
        start, count = request.num_computed, self._chunk_tokens(request, budget)
        self._rows.extend(request, count)
        is_last = request.num_computed == request.prefill_target
        if is_last:
            request.status = Status.RUNNING
            if not request.is_replay:
                request.num_dispatched_outputs += 1
        recorded_for = None if request.footprint is None else request.footprint.schedule.recorded_for(start)
        return Chunk(request=request, start=start, count=count, is_last=is_last, compressed_at=recorded_for)
