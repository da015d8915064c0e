"""Which slots a decode-time eviction takes: the lowest few of each table, found page by page, or any number of them.

A table is one layer and KV head of one row. Arrays here are [L, K, H, ...]: C pages of P slots each, S = C * P. Lower
priority goes first; of equal priorities, the older token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp

from pallas_kernels import PageScan
from pallas_kernels.page_scan import LAST, lowest_slot, ranked
from sparsejax.cache import KVCache
from sparsejax.cache.dead import drop_few_pages, drop_pages
from sparsejax.methods.select import top_slots
from sparsejax.methods.slots import Slots

MOST_FEW = 32
"""Victims of a table up to which naming them is cheaper than marking; what names them grows with their number."""


@dataclass(frozen=True)
class PageCounts:
    """What the pages of each table hold.

    Attributes:
      live: i32[L, K, H, C], live slots.
      dead: i32[L, K, H, C], the lowest in-page slot that is used and dead; P or more if there is none.
    """

    live: jax.Array
    dead: jax.Array


@dataclass(frozen=True)
class Victims:
    """A few victims of each table, named by slot.

    Attributes:
      slot: i32[L, K, H, n], logical slots; -1 for none.
      page_size: P.
    """

    slot: jax.Array
    page_size: int

    def among(self, rows: jax.Array) -> Self:
        """Only those of the rows that bool[K] marks."""
        return replace(self, slot=jnp.where(rows[:, None, None], self.slot, -1))

    def mask(self, num_slots: int) -> jax.Array:
        """bool[L, K, H, S]: the victims."""
        return _mentioned(self.slot, num_slots)

    def count(self) -> jax.Array:
        """i32[L, K, H]: how many."""
        return jnp.sum(self.slot >= 0, axis=-1, dtype=jnp.int32)

    def pages(self, num_pages: int) -> jax.Array:
        """bool[L, K, H, C]: the pages that they are in."""
        return _mentioned(jnp.where(self.slot >= 0, self.slot // self.page_size, -1), num_pages)

    def counts_after(self, before: PageCounts) -> PageCounts:
        """What the pages hold without them."""
        column = jnp.arange(before.live.shape[-1], dtype=jnp.int32)
        live, dead = before.live, before.dead
        for index in range(self.slot.shape[-1]):
            slot = self.slot[..., index, None]
            here = (slot >= 0) & (column == slot // self.page_size)
            live = live - here
            dead = jnp.where(here, jnp.minimum(dead, slot % self.page_size), dead)
        return PageCounts(live=live, dead=dead)

    def emptied(self, after: PageCounts) -> jax.Array:
        """i32[L, K, H, n]: the columns of the pages that hold nothing without them, each once; -1 for none."""
        column = jnp.where(self.slot >= 0, self.slot // self.page_size, -1)
        live = jnp.take_along_axis(after.live, jnp.maximum(column, 0), axis=-1, mode="clip")
        column = jnp.where(live == 0, column, -1)
        repeated = jnp.any(jnp.tril(column[..., :, None] == column[..., None, :], k=-1), axis=-1)
        return jnp.where(repeated, -1, column)

    def moves(self, after: PageCounts) -> tuple[jax.Array, jax.Array]:
        """(bool, i32)[L, K, H, C]: the pages that `drop_emptied` takes out, and by how many columns others move up."""
        dropped, column = self.emptied(after), jnp.arange(after.live.shape[-1], dtype=jnp.int32)
        before = (dropped[..., None, :] >= 0) & (dropped[..., None, :] < column[:, None])
        return _mentioned(dropped, len(column)), jnp.sum(before, axis=-1, dtype=jnp.int32)

    def drop_emptied(self, cache: KVCache, rows: jax.Array, after: PageCounts) -> KVCache:
        """The cache without the pages that they leave empty: all that are, for such pages never stay."""
        return drop_few_pages(cache, rows, self.emptied(after), num_columns=after.live.shape[-1])

    def mark(self, position: jax.Array, entries: jax.Array) -> jax.Array:
        """`position` i32[N, P] with -1 at the victims; entries i32[L, K, H, C] are the pages of the tables."""
        page = jnp.take_along_axis(entries, jnp.maximum(self.slot, 0) // self.page_size, axis=-1, mode="clip")
        page = jnp.where(self.slot >= 0, page, position.shape[0])
        return position.at[page, self.slot % self.page_size].set(-1, mode="drop")


@dataclass(frozen=True)
class ManyVictims:
    """Any number of victims of each table, as a mask; the same interface as `Victims`.

    Attributes:
      marks: bool[L, K, H, S], the victims.
      live: bool[L, K, H, S], the live slots, victims included.
      used: bool[L, K, H, S], the slots below the lengths.
      page_size: P.
    """

    marks: jax.Array
    live: jax.Array
    used: jax.Array
    page_size: int

    def among(self, rows: jax.Array) -> Self:
        """Only those of the rows that bool[K] marks."""
        return replace(self, marks=self.marks & rows[:, None, None])

    def mask(self, num_slots: int) -> jax.Array:
        """bool[L, K, H, S]: the victims."""
        return self.marks[..., :num_slots]

    def count(self) -> jax.Array:
        """i32[L, K, H]: how many."""
        return jnp.sum(self.marks, axis=-1, dtype=jnp.int32)

    def pages(self, num_pages: int) -> jax.Array:
        """bool[L, K, H, C]: the pages that they are in."""
        return jnp.any(_paged(self.marks, self.page_size), axis=-1)[..., :num_pages]

    def counts_after(self, before: PageCounts) -> PageCounts:
        """What the pages hold without them."""
        del before
        return count_pages(self.live & ~self.marks, self.used, self.page_size)

    def moves(self, after: PageCounts) -> tuple[jax.Array, jax.Array]:
        """(bool, i32)[L, K, H, C]: the pages that `drop_emptied` takes out, and by how many columns others move up."""
        gone = after.live == 0
        return gone, jnp.cumsum(gone, axis=-1, dtype=jnp.int32) - gone

    def drop_emptied(self, cache: KVCache, rows: jax.Array, after: PageCounts) -> KVCache:
        """The cache without pages that hold nothing without them."""
        return drop_pages(cache, rows, after.live == 0)

    def mark(self, position: jax.Array, entries: jax.Array) -> jax.Array:
        """`position` i32[N, P] with -1 at the victims; entries i32[L, K, H, C] are the pages of the tables."""
        marks = _paged(self.marks, self.page_size)
        page = jnp.where(jnp.any(marks, axis=-1), entries, position.shape[0])
        return position.at[page].set(jnp.where(marks, -1, position[entries]), mode="drop")


def count_pages(live: jax.Array, used: jax.Array, page_size: int) -> PageCounts:
    """live, used: bool[L, K, H, S], the live slots and those below the lengths."""
    live, used = _paged(live, page_size), _paged(used, page_size)
    in_page = jnp.arange(page_size, dtype=jnp.int32)
    return PageCounts(
        live=jnp.sum(live, axis=-1, dtype=jnp.int32),
        dead=jnp.min(jnp.where(used & ~live, in_page, page_size), axis=-1),
    )


def evict_few(pages: PageScan, score: jax.Array, slots: Slots, excess: jax.Array, *, most: int) -> Victims:
    """The `min(excess, most)` slots of lowest score of each table, protected ones never.

    One pass over all slots has found the lowest of each page; then each victim costs a pass over the pages and one over
    the slots of its page.

    Args:
      pages: of the tables.
      score: [L, K, H, S], those of the scan; looked at again for further victims only.
      slots: the view that the scores belong to.
      excess: i32[L, K, H], victims wanted.
      most: n, static.
    """
    lowest = (pages.key, pages.position, pages.slot)  # of each page: [L, K, H, C]
    best = lowest_slot(*lowest, axis=3)  # of each table: [L, K, H]

    def take(turn, best):
        key, _, slot = best
        return jnp.where((turn < excess) & (key < jnp.inf), slot, -1)

    taken = jnp.full((most, *excess.shape), -1, jnp.int32).at[0].set(take(0, best))
    if most > 1:
        next_turn = _next_turn(score, slots)

        def visit(turn, carry):
            lowest, best, taken = carry
            lowest = next_turn(lowest, best)
            best = lowest_slot(*lowest, axis=3)
            return lowest, best, taken.at[turn].set(take(turn, best))

        _, _, taken = jax.lax.fori_loop(1, most, visit, (lowest, best, taken))
    return Victims(slot=jnp.moveaxis(taken, 0, -1), page_size=slots.page_size)


def _next_turn(score: jax.Array, slots: Slots) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of the lowest slots of the pages, and the last victims: the lowest that are left without these."""
    evictable = _paged(slots.live & ~slots.protected, slots.page_size)
    key = jnp.where(evictable, ranked(_paged(score.astype(jnp.float32), slots.page_size)), jnp.inf)
    position = jnp.where(evictable, _paged(slots.position, slots.page_size), LAST)
    slot = jnp.arange(key.shape[3] * key.shape[4], dtype=jnp.int32).reshape(key.shape[3:])
    column = jnp.arange(key.shape[3], dtype=jnp.int32)

    def next_turn(lowest, victim):
        # What is left of the victim's page is what comes after the victim: all before it went in earlier turns.
        key_before, position_before, slot_before = victim
        page = slot_before // slots.page_size
        key_here, position_here, slot_here = (
            jnp.take_along_axis(jnp.broadcast_to(x, key.shape), page[..., None, None], axis=3)[..., 0, :]
            for x in (key, position, slot)
        )
        tied = (key_here == key_before[..., None]) & (position_here > position_before[..., None])
        left = (key_here > key_before[..., None]) | tied
        new = lowest_slot(jnp.where(left, key_here, jnp.inf), jnp.where(left, position_here, LAST), slot_here, axis=3)
        here = column == page[..., None]
        return tuple(jnp.where(here, there[..., None], old) for there, old in zip(new, lowest, strict=True))

    return next_turn


def evict_many(priority: jax.Array, slots: Slots, used: jax.Array, excess: jax.Array) -> ManyVictims:
    """The `excess` slots of lowest priority of each table, protected ones never.

    Args:
      priority: f32[L, K, H, S], as `protection.priorities` gives it: +inf for the protected, -inf for no slot.
      slots: the view that the priorities belong to.
      used: bool[L, K, H, S], the slots below the lengths.
      excess: i32[L, K, H], victims wanted.
    """
    active = jnp.sum(slots.live, axis=-1, dtype=jnp.int32)
    protected = jnp.sum(slots.protected, axis=-1, dtype=jnp.int32)
    keep = top_slots(priority, slots.position, jnp.maximum(active - excess, protected))
    return ManyVictims(marks=slots.live & ~keep, live=slots.live, used=used, page_size=slots.page_size)


def _paged(values: jax.Array, page_size: int) -> jax.Array:
    """[..., S] -> [..., C, P]."""
    return values.reshape(*values.shape[:-1], -1, page_size)


def _mentioned(index: jax.Array, size: int) -> jax.Array:
    """bool[..., size]: which numbers index [..., n] contains."""
    number = jnp.arange(size, dtype=jnp.int32)
    found = jnp.zeros((*index.shape[:-1], size), bool)
    for place in range(index.shape[-1]):
        found |= index[..., place, None] == number
    return found
