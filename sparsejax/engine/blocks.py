"""The host's mirror of the slot table: which rows hold how many blocks, and which blocks they share. No page ids.

A *block* is one column of a row: the table entries of `page_size` of its tokens in all layers and heads. Rows share
blocks after a `fork`, exactly as they share entries on the device, so `free_entries` here is what the device reports
once it has run the same operations in the same order.

A row is *running* while a request uses it, and *resident* when it only stays for its tokens to be reused. What resident
rows hold alone can be had at any time by releasing them, so two counts matter:

* `free_entries`: entries nobody holds. An operation may take no more than these.
* `unclaimed_entries`: entries no running row holds. Admission and preemption look at these alone, so resident rows
  never make a request wait.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


class Block:
    """One page column. `references`: rows that hold it. `claims`: those of them that are running."""

    __slots__ = ("claims", "references")

    def __init__(self) -> None:
        self.references = 1
        self.claims = 1


@dataclass(eq=False)
class Row:
    """A row of the slot table that holds, or is about to hold, tokens.

    Attributes:
      number: its index in the table.
      length: tokens it holds once all planned operations have run.
      blocks: ceil(length / page_size) blocks.
      running: a request uses it.
    """

    number: int
    length: int = 0
    blocks: list[Block] = field(default_factory=list)
    running: bool = True


class BlockTable:
    """Exact counts of rows and entries under take, grow, fork, rest and release.

    Args:
      num_rows: rows that can be taken, numbered from 1.
      num_entries: table entries of the empty pool.
      entries_per_block: entries of one block (table layers times table heads).
      page_size: tokens of a block.
    """

    def __init__(self, *, num_rows: int, num_entries: int, entries_per_block: int, page_size: int) -> None:
        self.page_size = page_size
        self._entries_per_block = entries_per_block
        self._num_entries = num_entries
        self._held = 0  # blocks with a reference
        self._claimed = 0  # blocks with a claim
        self._free_rows = list(range(1, num_rows + 1))  # a heap: low rows first

    @property
    def free_entries(self) -> int:
        """Entries that no row holds."""
        return self._num_entries - self._held * self._entries_per_block

    @property
    def unclaimed_entries(self) -> int:
        """Entries that no running row holds."""
        return self._num_entries - self._claimed * self._entries_per_block

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def entries_for(self, num_tokens: int) -> int:
        """Entries that `num_tokens` tokens of one row take if it shares none."""
        return self._entries_per_block * -(-num_tokens // self.page_size)

    def entries_to_grow(self, row: Row, num_tokens: int) -> int:
        """Entries that `num_tokens` more tokens of the row take."""
        return self.entries_for(row.length + num_tokens) - self._entries_per_block * len(row.blocks)

    def claimed_entries(self, row: Row, num_tokens: int) -> int:
        """Entries of the row's first `num_tokens` tokens (whole blocks) that running rows hold already."""
        return self._entries_per_block * sum(block.claims > 0 for block in row.blocks[: num_tokens // self.page_size])

    def take(self) -> Row:
        """An empty running row."""
        return Row(heapq.heappop(self._free_rows))

    def grow(self, row: Row, num_tokens: int) -> None:
        """Adds tokens at the end of a running row."""
        row.length += num_tokens
        new = -(-row.length // self.page_size) - len(row.blocks)
        if new:
            row.blocks += [Block() for _ in range(new)]
            self._held += new
            self._claimed += new
            assert self.free_entries >= 0, "admission and preemption reserve every entry before it is used"

    def fork(self, source: Row, target: Row, num_tokens: int) -> None:
        """Gives an empty running row the first tokens of another: whole blocks are shared, a partial one is copied."""
        assert not target.length
        assert num_tokens <= source.length
        target.blocks = source.blocks[: num_tokens // self.page_size]
        for block in target.blocks:
            block.references += 1
            self._claimed += block.claims == 0
            block.claims += 1
        target.length = len(target.blocks) * self.page_size
        self.grow(target, num_tokens - target.length)

    def rest(self, row: Row) -> None:
        """Makes a running row resident."""
        row.running = False
        for block in row.blocks:
            block.claims -= 1
            self._claimed -= block.claims == 0

    def release(self, row: Row) -> None:
        """Empties a row, running or resident, and makes its number free."""
        if row.running:
            self.rest(row)
        for block in row.blocks:
            block.references -= 1
            self._held -= block.references == 0
        row.blocks = []
        row.length = 0
        heapq.heappush(self._free_rows, row.number)
