"""Prefix caching: which rows of the slot table hold the beginning of a text, and which of them to give up first.

Every row whose tokens are on the device, or soon will be, is entered in a radix tree under its text: *running* rows
with the text that their prefill covers, *resident* rows (their request has ended) with all that is known of what they
hold. A new request is given the longest prefix that is ready by a fork of its row, and computes the rest.

A hit counts tokens, not blocks: the fork copies the partial last page, which the request needs as a page of its own
anyway, so the odd tokens cost nothing. But a hit shorter than one block is none: it would save less than its fork.

Exactness. Equal tokens mean equal K and V only if nothing else decides them, so only requests whose method keeps
everything take part. Three kinds of request need to compute tokens that a cached row holds, and reuse less:

* `prompt_logprobs` need the logits of the whole prompt: such a request reuses nothing.
* a repetition penalty counts every token of the prompt on the device, as it is computed: likewise.
* presence and frequency penalties count generated tokens: a replay reuses nothing beyond the prompt.

What they compute is cached for others all the same.

Requests that compress take no part in this: what their scorers record of a prefix's queries is not in its pages. What
they may take over is the whole row of a request that compressed the same context by itself (`contexts.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sparsejax.engine.requests.request import CompressionRecord, Request
from sparsejax.engine.scheduling.blocks import Row
from sparsejax.engine.scheduling.contexts import Contexts
from sparsejax.engine.scheduling.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Hit:
    """What the cache has of a request's text.

    Attributes:
      source: the row that holds most of it; None if no row holds a block of it.
      count: tokens to take over from `source`.
      pending: tokens that a row will hold once its prefill has gone on, if more than `count`; else 0.
      compressed: all that `source` holds is taken over; it is what is left of the first `count` tokens.
      record: what compression did to it then.
    """

    source: Row | None = None
    count: int = 0
    pending: int = 0
    compressed: bool = False
    record: CompressionRecord | None = None


@dataclass(frozen=True)
class PrefixCacheStats:
    """What prefix caching has done since the engine was built, and what it holds now.

    Attributes:
      queries: requests admitted, replays of preempted ones included.
      queried_tokens: tokens they needed in the cache.
      hits: those of them that found a prefix.
      hit_tokens: tokens they did not have to compute.
      evictions: how often a row or its end was given up because a request needed the row or its pages.
      resident_rows: rows kept although their requests have ended.
      resident_entries: table entries that only such rows hold.
    """

    queries: int = 0
    queried_tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    resident_rows: int = 0
    resident_entries: int = 0

    @property
    def hit_rate(self) -> float:
        """Fraction of the queried tokens that did not have to be computed."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0


def may_share(request: Request) -> bool:
    """Whether the K and V of the request's prompt follow from its tokens alone."""
    return not request.compression.evicts


def known_text(request: Request) -> Sequence[int]:
    """The tokens whose K and V follow from them alone: what is decoded by reading a part does not."""
    if request.compression.decodes_again:
        return request.prompt_token_ids[: request.prefill_target]
    return request.tokens


def most_reusable(request: Request) -> int:
    """Most tokens the request may take over; at least its last one is always computed, for logits or state."""
    params = request.params
    if params.prompt_logprobs is not None or params.repetition_penalty != 1:
        return 0
    most = request.prefill_target - 1
    if params.presence_penalty or params.frequency_penalty:
        most = min(most, len(request.prompt_token_ids))
    return most


class PrefixCache:
    """Rows by text. It decides, and moves nothing: the scheduler forks and releases what it is told.

    Args:
      block: tokens of a block; shorter prefixes are not found.
    """

    def __init__(self, block: int) -> None:
        self._queries = self._queried_tokens = self._hits = self._hit_tokens = self._evictions = 0
        self._tree: PrefixTree[Row] = PrefixTree(block)
        self._ready: dict[Row, int] = {}  # tokens of each row that a fork may take over now
        self._residents: OrderedDict[Row, None] = OrderedDict()  # least recently used first
        self._contexts = Contexts()
        self._found: tuple[Request, Hit] | None = None  # the last answer, until anything changes

    def go_on_counting(self, before: PrefixCache) -> None:
        """Takes over the counts of a cache whose rows were lost."""
        self._queries, self._queried_tokens = before._queries, before._queried_tokens
        self._hits, self._hit_tokens, self._evictions = before._hits, before._hit_tokens, before._evictions

    def stats(self, resident_entries: int) -> PrefixCacheStats:
        """The counts so far. resident_entries: table entries that only resident rows hold."""
        return PrefixCacheStats(
            queries=self._queries,
            queried_tokens=self._queried_tokens,
            hits=self._hits,
            hit_tokens=self._hit_tokens,
            evictions=self._evictions,
            resident_rows=len(self._residents),
            resident_entries=resident_entries,
        )

    def find(self, request: Request) -> Hit:
        """The longest prefix that the request may reuse. Asked again in every step while the request waits."""
        if self._found is None or self._found[0] is not request:
            self._found = request, self._find(request)
        return self._found[1]

    def _find_context(self, request: Request) -> Hit:
        assert request.footprint is not None
        length = request.footprint.schedule.context
        if length > most_reusable(request):
            return Hit()
        row, pending = self._contexts.find(request)
        if row is None:
            return Hit(pending=length if pending else 0)
        return Hit(row, length, compressed=True, record=self._contexts.record_of(row))

    def _find(self, request: Request) -> Hit:
        if request.context_key is not None:
            return self._find_context(request)
        most = most_reusable(request) if may_share(request) else 0
        block, best = self._tree.block, Hit()
        if most < block or not self._ready:
            return best
        pending = 0
        for depth, rows in self._tree.sharing(request.tokens if request.is_replay else list(request.prompt_token_ids)):
            if best.count >= min(most, depth + block - 1):
                break
            for row, shared in rows:
                shared = min(shared, most)
                ready = min(shared, self._ready[row])
                if ready > best.count and ready >= block:
                    best = Hit(row, ready)
                if ready < shared:
                    pending = max(pending, shared)
        return Hit(best.source, best.count, pending) if pending > best.count else best

    def use(self, request: Request, hit: Hit, count: int) -> None:
        """Counts an admission that was given `count` tokens of a hit, and marks the hit's row as used."""
        self._queries += 1
        self._queried_tokens += request.prefill_target
        self._hits += count > 0
        self._hit_tokens += count
        if hit.source in self._residents:
            self._residents.move_to_end(hit.source)

    def enter(self, row: Row, request: Request) -> None:
        """Enters a row whose request has been admitted. Nothing of it is ready before `advance`, `keep` or `settle`."""
        if request.context_key is not None and not request.num_reused:
            self._contexts.begin(request)
            self._found = None
        if may_share(request):
            self._insert(row, list(known_text(request)[: request.prefill_target]), ready=0)

    def advance(self, row: Row, request: Request) -> None:
        """Tells that what is counted as computed of the row's prefill is dispatched before the next fork."""
        if row in self._ready:
            self._ready[row] = min(request.num_computed, request.prefill_target)
            self._found = None

    def awaits_copy(self, request: Request, length: int) -> bool:
        """Whether others could use a copy of the request's row, which is compressed when its text has `length`."""
        awaited = request.footprint is not None and length == request.footprint.schedule.context
        return awaited and self._contexts.awaits(request)

    def abandon(self, request: Request) -> None:
        """Tells that an admitted request loses its row, or that its row is not copied."""
        self._contexts.abandon(request)
        self._found = None

    def keep(self, row: Row, request: Request) -> None:
        """Enters a resident copy of the row of a request whose context has just been compressed."""
        self._contexts.keep(row, request)
        self._residents[row] = None
        self._found = None

    def settle(self, row: Row) -> None:
        """Tells that a resident copy has been measured: it can be forked."""
        self._contexts.settle(row)
        self._found = None

    def describe(self, request: Request, record: CompressionRecord) -> None:
        """Tells what compression did to a request's row, for those that take over its context."""
        self._contexts.describe(request, record)
        self._found = None

    def forget(self, row: Row) -> None:
        """Takes a row out: it is about to be released."""
        if row in self._contexts:
            self._contexts.forget(row)
            self._residents.pop(row)
            self._found = None
        if row in self._ready:
            self._tree.remove(row)
            del self._ready[row]
            self._residents.pop(row, None)
            self._found = None

    def retire(self, row: Row, request: Request) -> list[Row]:
        """Makes the row of an ended request resident, if it is worth it.

        Returns:
          Rows to be released now, forgotten already: residents whose text is a prefix of this row's, or this row
          itself, if nothing is known of it or a resident row holds its text.
        """
        entered = row in self._ready
        self.forget(row)
        text = list(known_text(request)[: row.length])  # surplus tokens behind them stay unknown
        if not entered or len(text) < self._tree.block:
            return [row]
        prefixes = []
        for _, rows in self._tree.sharing(text):
            for other, shared in rows:
                if other not in self._residents:
                    continue
                if shared == len(text):
                    self._residents.move_to_end(other)
                    return [row]
                if shared == len(self._tree.text(other)):
                    prefixes.append(other)
        for other in prefixes:
            self.forget(other)
        self._insert(row, text, ready=len(text))
        self._residents[row] = None
        return prefixes

    def _insert(self, row: Row, text: Sequence[int], *, ready: int) -> None:
        self._tree.insert(row, text)
        self._ready[row] = ready
        self._found = None

    def oldest(self, *, but: Row | None = None) -> Row | None:
        """The resident row that was least recently used, `but` excepted. None: there is none."""
        return next((row for row in self._residents if row is not but), None)

    def evict(self, row: Row) -> None:
        """Forgets a resident row."""
        self.forget(row)
        self._evictions += 1

    def known_tokens(self, row: Row) -> int:
        """How many tokens of a resident row can be taken over one by one; 0 of a compressed row."""
        return self._ready.get(row, 0)

    def is_covered(self, row: Row, count: int) -> bool:
        """Whether another row holds the first `count` tokens of a resident row."""
        sharing = self._tree.sharing(self._tree.text(row)[:count])
        return any(shared == count for _, rows in sharing for other, shared in rows if other is not row)

    def cut(self, row: Row, into: Row, count: int) -> None:
        """Enters `into` in the place of a resident row, of which it holds the first `count` tokens."""
        text = self._tree.text(row)[:count]
        self.evict(row)
        self._insert(into, text, ready=count)
        self._residents[into] = None
        self._residents.move_to_end(into, last=False)

    def clear(self) -> list[Row]:
        """Forgets all resident rows."""
        rows = list(self._residents)
        for row in rows:
            self.forget(row)
        return rows

    def texts(self) -> dict[int, Sequence[int]]:
        """What the next request could take over, by number of the row."""
        return {row.number: self._tree.text(row)[:ready] for row, ready in self._ready.items()}
