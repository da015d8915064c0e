"""What compressed rows hold, as the device measures it and as the host counts it until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from sparsejax.engine.scheduling.blocks import Block, Row


class Usage(NamedTuple):
    """A row when it had been given `length` tokens.

    Attributes:
      length: tokens of the text, evicted ones included.
      held: entries it held, shared ones included.
      next_growth: entries that the next token took: tables whose last page was full.
      second_growth: entries that the token after that one took.
    """

    length: int
    held: int
    next_growth: int
    second_growth: int

    def growth(self, num_tokens: int, *, tables: int, page_size: int) -> int:
        """Most entries that the next `num_tokens` tokens take; exact for two of them, if nothing is evicted."""
        if num_tokens <= 1:
            return self.next_growth if num_tokens else 0
        if page_size == 1:
            return self.next_growth + (num_tokens - 1) * tables
        # A table grows with the first token, with the second or later, and then with every page_size-th.
        rest = tables - self.next_growth - self.second_growth
        first, second, later = (
            -(-num_tokens // page_size),
            -((1 - num_tokens) // page_size),
            -((2 - num_tokens) // page_size),
        )
        return self.next_growth * first + self.second_growth * second + rest * later


class RowCounts(Protocol):
    """Counts by table row, as `sparsejax.cache.row_usage` gives them for all rows."""

    @property
    def held(self) -> Sequence[int]: ...

    @property
    def next_growth(self) -> Sequence[int]: ...

    @property
    def second_growth(self) -> Sequence[int]: ...


def usages_of(balance: Balance, counts: RowCounts) -> list[Usage]:
    """What was measured of the rows of a balance, in their order."""
    held, first, second = (np.asarray(x).tolist() for x in (counts.held, counts.next_growth, counts.second_growth))
    return [Usage(each.length, held[each.number], first[each.number], second[each.number]) for each in balance.rows]


class Unmeasured(NamedTuple):
    """A row to be measured after a plan.

    Attributes:
      row: the row.
      number: its index in the slot table.
      length: tokens it has been given.
      weight: entries it is counted to hold, at most.
      trunk: the block that it shares with other rows, or None.
      trunk_weight: what that is counted to weigh.
      running: a request uses it.
    """

    row: Row
    number: int
    length: int
    weight: int
    trunk: Block | None
    trunk_weight: int
    running: bool


class Balance(NamedTuple):
    """What the host counts once a plan has run.

    Attributes:
      free_entries: entries that are free at least, and exactly if `rows` is empty; in a `DeltaCache`, by pool.
      rows: rows whose usage has to be read.
    """

    free_entries: Any
    rows: tuple[Unmeasured, ...] = ()
