"""Decides what the next step computes. Pure host logic over counts: no arrays, no page ids, and the clock is injected.

The caller's protocol, once a step:

    if scheduler.must_preempt():
        ...                          # read every result in flight: record tokens, finish() what has ended
    plan = scheduler.schedule()      # the counters already include this plan: dispatch it before any other call
    ...                              # on the device: plan.changes in order, then plan.decode, then plan.prefill
    ...                              # read the results of the step BEFORE this one: record tokens, finish() what ended

`finish` and `cancel` may come while a token of the request is in flight. Its row and entries are then free at once on
the host; on the device they become free by the next plan's changes, which run behind the step that still uses them.
The surplus token is discarded (`Request.record` returns False).

An empty plan with unfinished requests means: results in flight must be read before anything can go on.

The rules:

* First come, first served: the oldest waiting request is never overtaken, so every running request is older than every
  waiting one, and a preempted request is at the front of the queue by itself.
* A request is admitted with its first chunk, and only if the pool holds its whole prompt, the decodes of all running
  requests while that prompt is computed, and one token more for everyone. Once begun, a prefill is never stalled.
* Decodes come first in a step, and take what they need; prompts get the rest of its tokens, at least half of them.
* Pages, too, go to decodes first; if they do not fit, the latest arrival gives its entries back and later replays its
  prompt and outputs. The oldest request is never preempted, so something always finishes.
* A preempted request comes back only when everyone has a page more to grow, or it would soon be preempted again.

With `max_resident_rows`, the row of a request that ends stays resident for its tokens to be reused (`prefix_cache.py`):

* An admitted request is given the longest cached prefix of its text by a fork, and prefills the rest.
* Resident rows never make a request wait or be preempted: every rule above counts the entries that no running row
  holds, and resident rows are evicted, least recently used first, when what is taken is not free. A row is evicted
  whole; blocks that others share with it stay, so of a tree of texts the leaves go first.
* A request that shares more with one whose prefill is under way waits for it, if that saves a good part of its own
  prefill. Prefills once begun are never stalled, so this ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from sparsejax.engine.blocks import BlockTable, Row
from sparsejax.engine.buckets import prompt_room
from sparsejax.engine.plan import Chunk, Fork, Plan, Release
from sparsejax.engine.prefix_cache import Hit, PrefixCache, PrefixCacheStats
from sparsejax.engine.request import Request, Status
from sparsejax.errors import (
    DuplicateRequestError,
    EmptyPromptError,
    InvalidArgumentError,
    PromptTooLongError,
    SchedulingError,
)

FINISH_REASONS = ("stop", "length", "abort")
WORTH_WAITING = 0.25  # wait for another's prefill if it saves this fraction of the tokens still to compute


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of the engine.

    Attributes:
      max_num_seqs: requests that hold a row at once.
      max_num_batched_tokens: tokens of a step that only prefills.
      max_mixed_tokens: tokens of a step in which requests decode, at most as many. Decodes count, but leave half of it
        to prompts (`buckets.prompt_room`).
      max_prefill_seqs: requests with a chunk in one prefill step.
      page_size: tokens of a page.
      num_free_entries: table entries of the empty pool.
      entries_per_page_column: entries that `page_size` tokens of a request take (table layers times table heads).
      max_model_len: most tokens of prompt and answer.
      max_resident_rows: rows beyond max_num_seqs, so that at least as many can stay resident; 0 turns prefix caching
        off. Rows are numbered 1 to max_num_seqs + max_resident_rows.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_mixed_tokens: int
    max_prefill_seqs: int
    page_size: int
    num_free_entries: int
    entries_per_page_column: int
    max_model_len: int
    max_resident_rows: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            least = 0 if each.name == "max_resident_rows" else 1
            if getattr(self, each.name) < least:
                raise InvalidArgumentError(f"{each.name} must be at least {least}, got {getattr(self, each.name)!r}.")

    @property
    def max_tokens_in_pool(self) -> int:
        """Tokens of a single request that fill the pool."""
        return self.num_free_entries // self.entries_per_page_column * self.page_size


class Scheduler:
    """Continuous batching over exact counts of rows and entries. See the module's docstring for protocol and rules."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.num_preemptions = 0
        self._table = BlockTable(
            num_rows=config.max_num_seqs + config.max_resident_rows,
            num_entries=config.num_free_entries,
            entries_per_block=config.entries_per_page_column,
            page_size=config.page_size,
        )
        self._cache = PrefixCache(config.page_size) if config.max_resident_rows else None
        self._rows: dict[int, Row] = {}  # of admitted requests, by number
        self._waiting: deque[Request] = deque()  # by arrival
        self._admitted: list[Request] = []  # by arrival, all older than those waiting
        self._requests: dict[str, Request] = {}  # unfinished
        self._changes: list[Release | Fork] = []
        self._arrivals = 0

    @property
    def free_entries(self) -> int:
        """Entries free once all dispatched steps and the pending changes have run."""
        return self._table.free_entries

    @property
    def available_entries(self) -> int:
        """Entries that no request holds: free, or only kept for reuse. What requests can count on."""
        return self._table.unclaimed_entries

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """What prefix caching did and holds; all zero if it is off."""
        resident_entries = self.available_entries - self.free_entries
        return PrefixCacheStats() if self._cache is None else self._cache.stats(resident_entries)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a row: prefilling or decoding."""
        return len(self._admitted)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def entries_for(self, num_tokens: int) -> int:
        """Entries that `num_tokens` tokens of one request hold, shared ones included."""
        return self._table.entries_for(num_tokens)

    def check(self, request: Request, *, name: str | None = None) -> None:
        """Raises what `add` would raise, and changes nothing: to refuse a batch before any of it is taken.

        Args:
          name: what messages call the prompt. Default: by the request's id.

        Raises:
          EmptyPromptError: no tokens.
          PromptTooLongError: the prompt plus one token exceeds max_model_len, or its K/V the whole pool.
          DuplicateRequestError: an unfinished request has the same id.
        """
        length, config = len(request.prompt_token_ids), self.config
        name = name or f"prompt of request {request.request_id!r}"
        if request.request_id in self._requests:
            raise DuplicateRequestError(f"request_id {request.request_id!r} is in use by an unfinished request.")
        if length == 0:
            raise EmptyPromptError(f"{name} is empty: give at least one token.")
        if length + 1 > config.max_model_len:
            raise PromptTooLongError(
                f"{name} has {length} tokens; with at least one generated token it "
                f"must fit into max_model_len={config.max_model_len}. Shorten the prompt or raise max_model_len."
            )
        if length > config.max_tokens_in_pool:
            raise PromptTooLongError(
                f"{name} has {length} tokens, but the whole KV cache holds "
                f"{config.max_tokens_in_pool}. Shorten the prompt, or give the cache more pages (num_pages, "
                "gpu_memory_utilization)."
            )

    def add(self, request: Request) -> None:
        """Takes a request into the queue, and clips its `max_tokens` so that alone it always fits.

        Raises:
          InvalidArgumentError: as `check` says.
        """
        self.check(request)
        length = len(request.prompt_token_ids)
        # The last generated token never enters the cache, hence the + 1.
        room = min(self.config.max_model_len - length, self.config.max_tokens_in_pool - length + 1)
        request.max_tokens = min(request.max_tokens, room)
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
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        else:
            self._admitted.remove(request)
            self._retire(request)
        del self._requests[request.request_id]
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def cancel(self, request_id: str) -> Request | None:
        """Ends a request with reason "abort". Returns it, or None if no unfinished request has this id."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def cached_texts(self) -> dict[int, Sequence[int]]:
        """The tokens that the next request could take over from each row, by the row's number."""
        return {} if self._cache is None else self._cache.texts()

    def reset_prefix_cache(self) -> None:
        """Releases all resident rows; on the device with the next plan."""
        for row in [] if self._cache is None else self._cache.clear():
            self._release(row)

    def restart(self) -> None:
        """Makes every request that holds a row wait again, to be replayed: for a device whose cache was lost.

        Tokens that have not been read are forgotten; the replays draw them again, the same ones. Residents are lost.
        """
        self.reset_prefix_cache()
        for request in reversed(self._admitted):
            self._release(self._detach(request))
            request.status = Status.WAITING
            request.num_dispatched_outputs = len(request.output_token_ids)
            request.num_preemptions += 1
            self._waiting.appendleft(request)
        self._admitted.clear()
        self._changes.clear()

    def must_preempt(self) -> bool:
        """Whether the next decode does not fit, so that `schedule` would preempt. Read all results in flight first."""
        unclaimed = self._table.unclaimed_entries
        if len(self._admitted) * self.config.entries_per_page_column <= unclaimed:
            return False  # asked every step, so the common case must not cost a pass over all requests
        growth = sum(self._decode_growth(each) for each in self._admitted if self._decodes(each))
        return growth > unclaimed

    def schedule(self) -> Plan:
        """Plans a step and counts it as dispatched.

        Raises:
          SchedulingError: a request would be preempted whose outputs have not all been read.
        """
        preempted = self._make_room_for_decode()
        decode = [each for each in self._admitted if self._decodes(each)]
        for request in decode:
            self._extend(request, 1)
            request.num_dispatched_outputs += 1
        # After decode was chosen: what becomes RUNNING here decodes in the next plan. And nobody is admitted where
        # somebody was preempted: a victim that shares more the second time might come back at once.
        prefill = self._plan_prefill(self._prompt_room(len(decode)), admit=not preempted)
        if self._cache is not None:
            for chunk in prefill:
                self._cache.advance(self._row(chunk.request), chunk.request)
        changes, self._changes = self._changes, []
        return Plan(changes=changes, preempted=preempted, prefill=prefill, decode=decode)

    @staticmethod
    def _decodes(request: Request) -> bool:
        """Whether the next plan decodes an admitted request. One that has dispatched its last token only awaits it."""
        return request.status is Status.RUNNING and request.num_dispatched_outputs < request.max_tokens

    def _decode_growth(self, request: Request) -> int:
        """Entries that one more token takes: a new page's, whenever the last one is full."""
        return 0 if request.num_computed % self.config.page_size else self.config.entries_per_page_column

    def _make_room_for_decode(self) -> list[Request]:
        """Preempts the latest arrivals until the decodes of the others fit."""
        preempted = []
        while self.must_preempt():
            victim = self._admitted[-1]
            if victim.num_unread:
                raise SchedulingError(
                    f"request {victim.request_id!r} must be preempted while {victim.num_unread} of its tokens are in "
                    "flight: read all results before schedule() whenever must_preempt() is true."
                )
            self._admitted.pop()
            # Not kept as a resident: more entries are needed than all residents together would give.
            self._release(self._detach(victim))
            victim.status = Status.WAITING
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self._waiting.appendleft(victim)
            preempted.append(victim)
        return preempted

    def _prompt_room(self, num_decodes: int) -> int:
        """Prompt tokens of a step in which so many requests decode; with more of them it never grows."""
        config = self.config
        return prompt_room(config.max_mixed_tokens, num_decodes) if num_decodes else config.max_num_batched_tokens

    def _plan_prefill(self, budget: int, *, admit: bool) -> list[Chunk]:
        chunks: list[Chunk] = []
        # A prefill that did not end took its step's whole budget, so at most one is under way: the latest admitted.
        if self._admitted and self._admitted[-1].status is Status.PREFILLING:
            chunks.append(self._next_chunk(self._admitted[-1], budget))
            budget -= chunks[-1].count
        while admit and self._waiting and budget and len(chunks) < self.config.max_prefill_seqs:
            request = self._waiting[0]
            if len(self._admitted) == self.config.max_num_seqs:
                break
            hit = Hit() if self._cache is None else self._cache.find(request)
            saved, rest = hit.pending - hit.count, request.prefill_target - hit.count
            if saved > WORTH_WAITING * rest or not self._can_admit(request, hit, budget):
                break
            self._admit(self._waiting.popleft(), hit)
            chunks.append(self._next_chunk(request, budget))
            budget -= chunks[-1].count
        return chunks

    def _can_admit(self, request: Request, hit: Hit, budget: int) -> bool:
        """Whether the pool holds the request beside everyone's growth until, and one token beyond, its last chunk."""
        reused = hit.count // self.config.page_size * self.config.page_size  # certain: see _fork
        rest = max(request.prefill_target - reused - budget, 0)
        # Nobody else is admitted meanwhile, so that at least this many of its tokens go into each further step.
        steps = 1 + -(-rest // self._prompt_room(len(self._admitted)))
        spare = self.config.page_size if request.num_preemptions else 0
        needed = self._entries_at(request, 1 + spare)
        if hit.source is not None:
            needed -= self._table.claimed_entries(hit.source, reused)
        unclaimed = self._table.unclaimed_entries
        # ceil(a + b) <= ceil(a) + ceil(b): with that much room there is no need to look at everyone.
        if needed + len(self._admitted) * self.entries_for(steps + spare) <= unclaimed:
            return True
        for other in self._admitted:
            needed += self._entries_at(other, steps + spare) - self.entries_for(other.num_computed)
        return needed <= unclaimed

    def _entries_at(self, request: Request, growth: int) -> int:
        """Entries of the request when it has decoded `growth` tokens from now, or from the end of its prefill."""
        start = max(request.num_computed, request.prefill_target)
        return self.entries_for(min(start + growth, request.peak_tokens))

    def _admit(self, request: Request, hit: Hit) -> None:
        if not self._table.num_free_rows:
            self._evict(but=hit.source)
        row = self._table.take()
        self._rows[row.number] = row
        request.row = row.number
        request.status = Status.PREFILLING
        reused = self._fork(hit, row)
        request.num_reused = request.num_computed = reused
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self.clock()
            request.num_cached_tokens = reused
        self._admitted.append(request)
        if self._cache is not None:
            self._cache.use(request, hit, reused)
            self._cache.enter(row, request)

    def _fork(self, hit: Hit, row: Row) -> int:
        """Gives the row what was found, and returns how many tokens that is."""
        count, source = hit.count, hit.source
        if source is None:
            return 0
        # The copy of a partial page needs room before the source could be evicted; else only whole pages are shared.
        if count % self.config.page_size and not self._make_free(self.config.entries_per_page_column, but=source):
            count -= count % self.config.page_size
        self._table.fork(source, row, count)
        self._changes.append(Fork(source.number, row.number, count))
        return count

    def _next_chunk(self, request: Request, budget: int) -> Chunk:
        start = request.num_computed
        count = min(request.prefill_target - start, budget)
        self._extend(request, count)
        is_last = request.num_computed == request.prefill_target
        if is_last:
            request.status = Status.RUNNING
            if not request.is_replay:
                request.num_dispatched_outputs += 1
        return Chunk(request=request, start=start, count=count, is_last=is_last)

    def _extend(self, request: Request, num_tokens: int) -> None:
        row = self._row(request)
        self._make_free(self._table.entries_to_grow(row, num_tokens))
        self._table.grow(row, num_tokens)
        request.num_computed += num_tokens

    def _row(self, request: Request) -> Row:
        assert request.row is not None, "only admitted requests have a row"
        return self._rows[request.row]

    def _make_free(self, num_entries: int, *, but: Row | None = None) -> bool:
        """Evicts resident rows until so many entries are free. Returns whether they are."""
        while self._table.free_entries < num_entries:
            if not self._evict(but=but):
                return False
        return True

    def _evict(self, *, but: Row | None = None) -> bool:
        """Releases the resident row that was least recently used, `but` excepted, if there is one."""
        row = None if self._cache is None else self._cache.evict(but=but)
        if row is not None:
            self._release(row)
        return row is not None

    def _retire(self, request: Request) -> None:
        """Takes the row of a request that has ended, to keep it or to release it."""
        row = self._row(request)
        superfluous = [row] if self._cache is None else self._cache.retire(row, request)
        self._detach(request)
        if row not in superfluous:
            self._table.rest(row)
        for each in superfluous:
            self._release(each)

    def _detach(self, request: Request) -> Row:
        """Parts a request from its row."""
        row = self._row(request)
        del self._rows[row.number]
        request.row = None
        request.num_computed = 0
        return row

    def _release(self, row: Row) -> None:
        if self._cache is not None:
            self._cache.forget(row)
        self._table.release(row)
        self._changes.append(Release(row.number))
