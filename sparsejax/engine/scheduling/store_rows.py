"""Rows of an engine that stores requests compressed: the counterpart of `rows.Rows` over a `DeltaCache`.

A row reserves all that its request can come to hold when it is admitted, so nothing that has begun ever lacks a page,
and nobody is preempted. What rows hold is exact arithmetic. Nothing stays resident and nothing is shared.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from sparsejax.cache import Entries
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk, Compress, Fork, Release
from sparsejax.engine.scheduling.prefix_cache import Hit
from sparsejax.engine.scheduling.scheduler_config import SchedulerConfig
from sparsejax.engine.scheduling.store_limits import StoreLimits, minus, plus, within
from sparsejax.engine.scheduling.usage import Balance, RowCounts

_NONE = Entries(0, 0, 0)


@dataclass(eq=False)
class StoreRow:
    """A row in use.

    Attributes:
      number: its index in the tables.
      reserved: entries that it holds at most.
      compressed: its request is stored compressed.
      length: tokens it was given once all planned operations have run.
      weight: entries that it holds then.
    """

    number: int
    reserved: Entries
    compressed: bool
    length: int = 0
    weight: Entries = _NONE


class StoreRows:
    """Gives requests rows and takes them back."""

    # Prefix caching: no row stays for its tokens to be reused.
    cache = None

    def __init__(self, config: SchedulerConfig, limits: StoreLimits) -> None:
        self.limits = limits
        self._free_rows = list(range(1, config.max_num_seqs + 1))  # a heap: low rows first
        self._rows: dict[int, StoreRow] = {}
        self._changes: list[Release | Fork] = []
        self._held = self._reserved = _NONE

    @property
    def free_entries(self) -> Entries:
        """Entries that no row holds."""
        return minus(self.limits.entries, self._held)

    @property
    def unclaimed_entries(self) -> Entries:
        """Entries that no row holds or may come to hold."""
        return minus(self.limits.entries, self._reserved)

    def peak(self, request: Request) -> Entries:
        """Entries that a request holds at most."""
        return self.limits.held(request.peak_tokens, compressed=request.compression.compresses)

    def can_admit(self, request: Request) -> bool:
        """Whether a row and all that the request can come to hold are unclaimed."""
        return bool(self._free_rows) and within(self.peak(request), self.unclaimed_entries)

    def of(self, request: Request) -> StoreRow:
        """The row of an admitted request."""
        assert request.row is not None, "only admitted requests have a row"
        return self._rows[request.row]

    def find(self, request: Request) -> Hit:
        """What a waiting request may take over: nothing."""
        del request
        return Hit()

    def give(self, request: Request, hit: Hit) -> None:
        """Gives a request an empty row, for which it was admitted."""
        del hit
        row = StoreRow(heapq.heappop(self._free_rows), self.peak(request), request.compression.compresses)
        self._rows[row.number] = row
        self._reserved = plus(self._reserved, row.reserved)
        request.row = row.number
        request.num_reused = request.num_computed = request.num_held = 0

    def extend(self, request: Request, num_tokens: int) -> None:
        """Adds tokens to a request's row, and compresses what they make due."""
        row = self.of(request)
        row.length += num_tokens
        weight = self.limits.held(row.length, compressed=row.compressed)
        assert within(weight, row.reserved), "admission reserves every entry before it is used"
        self._held = plus(self._held, minus(weight, row.weight))
        row.weight = weight
        request.num_computed += num_tokens
        request.num_held += num_tokens

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Tells that chunks are dispatched: nobody takes them over."""

    def compress(self, due: Iterable[Compress]) -> list[Fork]:
        """Tells what is evicted at the end of a plan: nothing is."""
        assert not list(due), "requests that evict are refused by an engine that stores compressed"
        return []

    def balance(self) -> Balance:
        """What is counted now."""
        return Balance(free_entries=self.free_entries)

    def settle(self, balance: Balance, counts: RowCounts | None) -> Entries:
        """The entries that were free when a plan had run."""
        del counts
        assert isinstance(balance.free_entries, Entries)
        return balance.free_entries

    def retire(self, request: Request) -> None:
        """Takes the row of a request that has ended, and releases it."""
        self.take_back(request)

    def take_back(self, request: Request) -> None:
        """Takes the row of a request, and releases it."""
        row = self.of(request)
        del self._rows[row.number]
        self._held, self._reserved = minus(self._held, row.weight), minus(self._reserved, row.reserved)
        request.row = None
        request.num_computed = request.num_held = 0
        heapq.heappush(self._free_rows, row.number)
        self._changes.append(Release(row.number))

    def release_residents(self) -> None:
        """Releases all resident rows: there are none."""

    def take_changes(self) -> list[Release | Fork]:
        """What has happened to the tables since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes
