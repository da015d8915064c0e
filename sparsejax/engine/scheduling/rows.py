"""Rows of the slot table in use: who has which, what is shared, kept and given up, and how the device is told."""

from __future__ import annotations

from collections.abc import Iterable

from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.blocks import BlockTable, Row
from sparsejax.engine.scheduling.plan import ALL, Chunk, Compress, Fork, Release
from sparsejax.engine.scheduling.prefix_cache import Hit, PrefixCache
from sparsejax.engine.scheduling.scheduler_config import SchedulerConfig
from sparsejax.engine.scheduling.usage import Balance, RowCounts


class Rows:
    """Gives requests rows and takes them back; resident rows give way when entries or rows are short.

    Attributes:
      table: counts of rows and entries.
      cache: resident rows by what they hold; None: nothing stays.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.table = BlockTable(
            num_rows=config.max_num_seqs + config.max_resident_rows,
            num_entries=config.num_free_entries,
            entries_per_block=config.entries_per_page_column,
            page_size=config.page_size,
        )
        self.cache = PrefixCache(config.page_size) if config.max_resident_rows else None
        self._column = config.entries_per_page_column
        self._rows: dict[int, Row] = {}  # of admitted requests, by number
        self._changes: list[Release | Fork] = []
        self._transient = 0

    @property
    def free_entries(self) -> int:
        """Entries that no row holds."""
        return self.table.free_entries

    def balance(self) -> Balance:
        """What is counted now."""
        return self.table.balance()

    @property
    def unclaimed_entries(self) -> int:
        """Entries that requests can count on: not held by one, nor needed by evictions while they run."""
        return self.table.unclaimed_entries - self._transient

    def of(self, request: Request) -> Row:
        """The row of an admitted request."""
        assert request.row is not None, "only admitted requests have a row"
        return self._rows[request.row]

    def find(self, request: Request) -> Hit:
        """What a waiting request may take over."""
        return Hit() if self.cache is None else self.cache.find(request)

    def give(self, request: Request, hit: Hit) -> None:
        """Gives a request a row that holds what was found."""
        row, reused = self._take(hit)
        self._rows[row.number] = row
        request.row = row.number
        request.num_reused = request.num_computed = request.num_held = reused
        self._transient += request.transient_entries
        if request.footprint is not None:
            request.num_held = request.footprint.schedule.held_at(reused) if reused else 0
        if self.cache is not None:
            self.cache.use(request, hit, reused)
            self.cache.enter(row, request)

    def _take(self, hit: Hit) -> tuple[Row, int]:
        source = hit.source
        if hit.compressed and source is not None:
            return self._take_compressed(source), hit.count
        row = self._take_empty(but=source)
        return row, 0 if source is None else self._fork(source, row, hit.count)

    def _take_empty(self, *, but: Row | None) -> Row:
        if not self.table.num_free_rows:
            self._evict(but=but)
        return self.table.take()

    def _take_compressed(self, source: Row) -> Row:
        """A row that holds all that a resident copy of a compressed row holds."""
        # Admission has left a page a table to spare, as for all ragged rows.
        has_room = self._make_free(self.table.copied_by_fork(source), but=source)
        assert has_room, "an admitted request can be given what was found"
        row = self._take_empty(but=source)
        self.table.fork_all(source, row)
        self._changes.append(Fork(source.number, row.number, ALL))
        return row

    def _fork(self, source: Row, row: Row, count: int) -> int:
        """Gives the row tokens of another, and returns how many."""
        # The copy of a partial page needs room before the source could be evicted; else only whole pages are shared.
        if count % self.table.page_size and not self._make_free(self._column, but=source):
            count -= count % self.table.page_size
        self.table.fork(source, row, count)
        self._changes.append(Fork(source.number, row.number, count))
        return count

    def extend(self, request: Request, num_tokens: int) -> None:
        """Adds tokens to a request's row."""
        row = self.of(request)
        growth = self.table.entries_to_grow(row, num_tokens)
        if growth:
            self._make_free(growth)
        self.table.grow(row, num_tokens)
        request.num_computed += num_tokens
        request.num_held += num_tokens

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Tells that these chunks are dispatched before the next fork."""
        if self.cache is not None:
            for chunk in chunks:
                self.cache.advance(self.of(chunk.request), chunk.request)

    def compress(self, due: Iterable[Compress]) -> list[Fork]:
        """Tells what is evicted at the end of a plan. Returns the copies to keep for others, where there is room."""
        snapshots = []
        if self._transient:
            self._make_free(0)
        for each in due:
            request, row = each.request, self.of(each.request)
            self.table.compress(row)
            if self.cache is not None and self.cache.awaits_copy(request, each.text_length):
                copy = self._copy(row)
                if copy is None:
                    self.cache.abandon(request)
                else:
                    self.cache.keep(copy, request)
                    snapshots.append(Fork(row.number, copy.number, ALL))
        return snapshots

    def _copy(self, row: Row) -> Row | None:
        """A resident copy of a row that is compressed in this plan; None: there is no room."""
        if not self._make_free(self._column) or not (self.table.num_free_rows or self._evict()):
            return None
        copy = self.table.take()
        self.table.snapshot(row, copy)
        return copy

    def settle(self, balance: Balance, counts: RowCounts | None) -> int:
        """Takes over what the device measured; see `Scheduler.settle`."""
        free, residents = self.table.settle(balance, counts)
        for row in residents:
            assert self.cache is not None
            self.cache.settle(row)
        return free

    def retire(self, request: Request) -> None:
        """Takes the row of a request that has ended, to keep it or to release it."""
        row = self.of(request)
        superfluous = [row] if self.cache is None else self.cache.retire(row, request)
        self._detach(request)
        if row not in superfluous:
            self.table.rest(row)
        for each in superfluous:
            self._release(each)

    def take_back(self, request: Request) -> None:
        """Takes the row of a request that will start over, and releases it."""
        self._release(self._detach(request))

    def release_residents(self) -> None:
        """Releases all resident rows."""
        for row in [] if self.cache is None else self.cache.clear():
            self._release(row)

    def take_changes(self) -> list[Release | Fork]:
        """What has happened to the table since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def _make_free(self, num_entries: int, *, but: Row | None = None) -> bool:
        """Gives up what was least recently used until so many entries are free. Returns whether they are."""
        while (missing := num_entries + self._transient - self.table.free_entries) > 0:
            if not self._cut(missing, but=but) and not self._evict(but=but):
                return False
        return True

    def _evict(self, *, but: Row | None = None) -> bool:
        """Releases the resident row that was least recently used, `but` excepted, if there is one."""
        row = None if self.cache is None else self.cache.oldest(but=but)
        if row is None or self.cache is None:
            return False
        self.cache.evict(row)
        self._release(row)
        return True

    def _cut(self, missing: int, *, but: Row | None = None) -> bool:
        """Gives up the end of the resident row that was least recently used, if what is left is of use.

        At least half of its pages: a row is forked for it, and few forks are to do.

        Args:
          missing: entries that are wanted.
        """
        row = None if self.cache is None else self.cache.oldest(but=but)
        if row is None or self.cache is None or not self.table.num_free_rows:
            return False
        size = self.table.page_size
        pages = self.cache.known_tokens(row) // size
        count = size * min(pages // 2, pages - -(-missing // self._column))
        if count <= 0 or self.cache.is_covered(row, count):
            return False
        rest = self.table.take()
        self.table.fork(row, rest, count)
        self.table.rest(rest)
        self._changes.append(Fork(row.number, rest.number, count))
        self.cache.cut(row, rest, count)
        self._release(row)
        return True

    def _detach(self, request: Request) -> Row:
        """Parts a request from its row."""
        row = self.of(request)
        del self._rows[row.number]
        request.row = None
        request.num_computed = request.num_held = 0
        request.is_evicting = False
        self._transient -= request.transient_entries
        if self.cache is not None:
            self.cache.abandon(request)
        return row

    def _release(self, row: Row) -> None:
        if self.cache is not None:
            self.cache.forget(row)
        self.table.release(row)
        self._changes.append(Release(row.number))
