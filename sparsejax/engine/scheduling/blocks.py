"""The host's mirror of the slot table: which rows hold how many entries, and which they share. No page ids.

A row is *uniform* as long as all its tables (one a layer and head) hold the same tokens: a *block* is then one column
of it, the table entries of `page_size` tokens in all layers and heads. Rows share blocks after a `fork`, exactly as
they share entries on the device, so `free_entries` here is what the device reports once it has run the same operations
in the same order.

A row is *ragged* once it has been compressed: its tables differ in length, and only the device knows by how much. It
has a block that it shares (the *trunk*) or none, and one of its own. Their weights are bounds: what the device last
measured (`Usage`) plus the most that the tokens since can take. Eviction only ever makes tables shorter, so a bound
stays one whatever was evicted since, and a row that was compressed counts as if it had not been until it is measured.

A row is *running* while a request uses it, and *resident* when it only stays for its tokens to be reused. What resident
rows hold alone can be had at any time by releasing them, so two counts matter:

* `free_entries`: entries nobody holds. An operation may take no more than these.
* `unclaimed_entries`: entries no running row holds. Admission and preemption look at these alone, so resident rows
  never make a request wait.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from sparsejax.engine.scheduling.usage import Balance, RowCounts, Unmeasured, Usage, usages_of
from sparsejax.errors import SchedulingError


class Block:
    """Entries that rows hold together: a page column, or a part of a ragged row.

    `weight`: its entries. `references`: rows that hold it. `claims`: those of them that are running.
    """

    __slots__ = ("claims", "references", "weight")

    def __init__(self, weight: int, *, claims: int = 1) -> None:
        self.weight = weight
        self.references = 1
        self.claims = claims


@dataclass(eq=False)
class Row:
    """A row of the slot table that holds, or is about to hold, tokens.

    Attributes:
      number: its index in the table.
      length: tokens of the text it was given once all planned operations have run, evicted ones included.
      blocks: ceil(length / page_size) blocks of a uniform row; of a ragged one the trunk, if it has one, and its own.
      running: a request uses it.
      usage: None for a uniform row.
      bound: entries that a ragged row holds at most: those of its usage, and what the tokens since can have taken.
    """

    number: int
    length: int = 0
    blocks: list[Block] = field(default_factory=list)
    running: bool = True
    usage: Usage | None = None
    bound: int = 0

    @property
    def trunk(self) -> Block | None:
        """What a ragged row shares, or could."""
        return self.blocks[0] if self.usage is not None and len(self.blocks) > 1 else None

    @property
    def weight(self) -> int:
        """Entries that are counted for it, shared ones included; exact for a uniform row."""
        return sum(block.weight for block in self.blocks)


class BlockTable:
    """Counts of rows and entries under take, grow, compress, fork, snapshot, rest and release.

    Args:
      num_rows: rows that can be taken, numbered from 1.
      num_entries: table entries of the empty pool.
      entries_per_block: entries of one page column (table layers times table heads).
      page_size: tokens of a page.
    """

    def __init__(self, *, num_rows: int, num_entries: int, entries_per_block: int, page_size: int) -> None:
        self.page_size = page_size
        self._entries_per_block = entries_per_block
        self._num_entries = num_entries
        self._held = 0  # entries of blocks with a reference
        self._claimed = 0  # entries of blocks with a claim
        self._free_rows = list(range(1, num_rows + 1))  # a heap: low rows first
        self._measured: dict[Row, None] = {}  # ragged rows whose usage has to be read, in order of taking

    @property
    def free_entries(self) -> int:
        """Entries that no row holds; with ragged rows, at least so many."""
        return self._num_entries - self._held

    @property
    def unclaimed_entries(self) -> int:
        """Entries that no running row holds; with ragged rows, at least so many."""
        return self._num_entries - self._claimed

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def entries_for(self, num_tokens: int) -> int:
        """Entries that `num_tokens` tokens of one uniform row take if it shares none."""
        return self._entries_per_block * -(-num_tokens // self.page_size)

    def entries_to_grow(self, row: Row, num_tokens: int) -> int:
        """Entries that `num_tokens` more tokens of the row take, at most; exact for a uniform row."""
        if row.usage is None:
            return self.entries_for(row.length + num_tokens) - self._entries_per_block * len(row.blocks)
        return self._bound(row.usage, row.length + num_tokens) - row.bound

    def claimed_entries(self, row: Row, num_tokens: int) -> int:
        """Entries of the row's first `num_tokens` tokens (whole blocks) that running rows hold already.

        Of a ragged row, those of its trunk, whatever num_tokens is.
        """
        if row.usage is not None:
            return row.trunk.weight if row.trunk is not None and row.trunk.claims else 0
        return self._entries_per_block * sum(block.claims > 0 for block in row.blocks[: num_tokens // self.page_size])

    def take(self) -> Row:
        """An empty running row."""
        return Row(heapq.heappop(self._free_rows))

    def grow(self, row: Row, num_tokens: int) -> None:
        """Adds tokens at the end of a running row."""
        row.length += num_tokens
        if row.usage is not None:
            self._refresh(row)
            return
        for _ in range(-(-row.length // self.page_size) - len(row.blocks)):
            row.blocks.append(self._new_block(self._entries_per_block))
        assert self.free_entries >= 0, "admission and preemption reserve every entry before it is used"

    def compress(self, row: Row) -> None:
        """Tells that some of a running row's tokens are evicted: it is ragged from now on."""
        if row.usage is not None:
            return
        assert all(block.references == 1 for block in row.blocks), "requests that compress share no uniform blocks"
        size, tables = self.page_size, self._entries_per_block
        row.bound = row.weight
        row.usage = Usage(
            length=row.length,
            held=row.bound,
            next_growth=tables if row.length % size == 0 else 0,
            second_growth=tables if (row.length + 1) % size == 0 else 0,
        )
        row.blocks = [Block(row.bound)]
        self._measured[row] = None

    def fork(self, source: Row, target: Row, num_tokens: int) -> None:
        """Gives an empty running row the first tokens of another, both uniform.

        Whole blocks are shared, a partial one is copied.
        """
        assert not target.length
        assert source.usage is None
        assert num_tokens <= source.length
        target.blocks = source.blocks[: num_tokens // self.page_size]
        for block in target.blocks:
            block.references += 1
            self._claim(block)
        target.length = len(target.blocks) * self.page_size
        self.grow(target, num_tokens - target.length)

    def snapshot(self, source: Row, target: Row) -> None:
        """Makes an empty row a resident copy of all that a row holds that has just been compressed."""
        assert source.usage is not None
        assert source.trunk is None
        (trunk,) = source.blocks
        trunk.references += 1
        source.blocks = [trunk, self._new_block(0)]
        # One partial page a table is copied, at most.
        own = self._new_block(self._entries_per_block)
        target.blocks, target.length, target.running = [trunk, own], source.length, False
        self._unclaim(own)
        target.bound = trunk.weight + own.weight
        target.usage = Usage(length=target.length, held=target.bound, next_growth=0, second_growth=0)
        self._measured[target] = None

    def copied_by_fork(self, source: Row) -> int:
        """Entries that forking all of a ragged resident row takes: those of its partial pages."""
        assert source.usage is not None
        return self._entries_per_block - source.usage.next_growth

    def fork_all(self, source: Row, target: Row) -> None:
        """Gives an empty running row all that a ragged resident row holds, which has been measured."""
        assert source.usage is not None
        assert source not in self._measured
        assert not target.length
        if source.trunk is None:
            (own,) = source.blocks
            self._weigh(own, self.copied_by_fork(source))
            trunk = self._new_block(source.usage.held - own.weight)
            self._unclaim(trunk)
            source.blocks = [trunk, own]
        trunk = source.blocks[0]
        trunk.references += 1
        self._claim(trunk)
        target.blocks = [trunk, self._new_block(source.blocks[1].weight)]
        target.length, target.usage, target.bound = source.length, source.usage, source.bound
        self._measured[target] = None
        assert self.free_entries >= 0, "admission reserves every entry before it is used"

    def rest(self, row: Row) -> None:
        """Makes a running row resident."""
        row.running = False
        for block in row.blocks:
            self._unclaim(block)

    def release(self, row: Row) -> None:
        """Empties a row, running or resident, and makes its number free."""
        if row.running:
            self.rest(row)
        for block in row.blocks:
            self._drop(block)
        row.blocks = []
        row.length = 0
        row.usage = None
        self._measured.pop(row, None)
        heapq.heappush(self._free_rows, row.number)

    def balance(self) -> Balance:
        """What is counted now, to be settled when the device has measured it."""
        return Balance(free_entries=self.free_entries, rows=tuple(map(self._unmeasured, self._measured)))

    def settle(self, balance: Balance, counts: RowCounts | None) -> tuple[int, list[Row]]:
        """Takes over what the device measured when it had run the plan of a balance.

        Args:
          counts: of all rows, by number; may be None if the balance has no rows.

        Returns:
          The entries that were free then, exactly, and resident rows that are measured from now on.
        """
        if not balance.rows:
            return balance.free_entries, []
        if counts is None:
            raise SchedulingError("compressed rows have to be measured: settle needs the counts of all rows.")
        usages = usages_of(balance, counts)
        free = balance.free_entries
        sharing = []
        for each, usage in zip(balance.rows, usages, strict=True):
            free += each.weight - usage.held
            if each.trunk is not None:
                sharing.append((each, usage))
        # A resident copy shows what is shared: all of its pages but the partial ones, which were copied.
        trunks = {
            each.trunk: usage.held - (self._entries_per_block - usage.next_growth)
            for each, usage in sharing
            if not each.running
        }
        seen = set()
        for each, _ in sharing:
            # What rows share is counted with each of them above, but was counted once.
            if each.trunk in trunks:
                free -= each.trunk_weight - trunks[each.trunk] if each.trunk in seen else 0
                seen.add(each.trunk)
        for trunk, weight in trunks.items():
            if trunk is not None and trunk.references:
                self._weigh(trunk, weight)
        settled = []
        for each, usage in zip(balance.rows, usages, strict=True):
            row = each.row
            if row in self._measured:
                row.usage = usage
                # For many tokens at once the newer figures may bound it less tightly; the older bound holds, too.
                self._refresh(row, most=row.bound)
                if not row.running:
                    del self._measured[row]
                    settled.append(row)
        return free, settled

    @staticmethod
    def _unmeasured(row: Row) -> Unmeasured:
        trunk = row.trunk
        if trunk is None or trunk.references == 1:
            return Unmeasured(row, row.number, row.length, row.weight, None, 0, row.running)
        return Unmeasured(row, row.number, row.length, row.weight, trunk, trunk.weight, row.running)

    def _bound(self, usage: Usage, length: int) -> int:
        """Most entries of a ragged row once it has been given `length` tokens."""
        return usage.held + usage.growth(
            length - usage.length, tables=self._entries_per_block, page_size=self.page_size
        )

    def _refresh(self, row: Row, *, most: int | None = None) -> None:
        """Makes a ragged row's own block weigh what its usage and its length say, at most `most` with the trunk."""
        assert row.usage is not None
        bound = self._bound(row.usage, row.length)
        row.bound = weight = bound if most is None else min(bound, most)
        trunk = row.trunk
        if trunk is not None and trunk.references == 1:
            # Nobody shares it any more.
            row.blocks = row.blocks[1:]
            if row.running:
                self._unclaim(trunk)
            self._drop(trunk)
        elif trunk is not None:
            # What was measured before a snapshot was taken may come after it, and say that all of the row is less than
            # its trunk was counted with.
            self._weigh(trunk, min(trunk.weight, weight))
            weight -= trunk.weight
        assert weight >= 0, "a row holds what it shares"
        self._weigh(row.blocks[-1], weight)
        assert self._held <= self._num_entries, "admission and preemption reserve every entry before it is used"

    def _new_block(self, weight: int) -> Block:
        """A block of one running row."""
        self._held += weight
        self._claimed += weight
        return Block(weight)

    def _weigh(self, block: Block, weight: int) -> None:
        change = weight - block.weight
        if change:
            self._held += change
            self._claimed += change if block.claims else 0
            block.weight = weight

    def _claim(self, block: Block) -> None:
        self._claimed += block.weight * (block.claims == 0)
        block.claims += 1

    def _unclaim(self, block: Block) -> None:
        block.claims -= 1
        self._claimed -= block.weight * (block.claims == 0)

    def _drop(self, block: Block) -> None:
        block.references -= 1
        self._held -= block.weight * (block.references == 0)
