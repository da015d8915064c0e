"""How many table entries a request that compresses can ever hold: what admission and refusal look at.

All bounds hold for a request alone, once the device's figures have been read; until then it is counted as if nothing
had been evicted (`blocks.py`), and whoever finds too little room reads first.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from sparsejax.engine.requests.compression_schedule import CompressionSchedule


@dataclass(frozen=True)
class Pool:
    """The empty pool.

    Attributes:
      num_entries: its table entries.
      tables: entries of a page column (table layers times table heads).
      page_size: tokens of a page.
    """

    num_entries: int
    tables: int
    page_size: int

    def uniform(self, num_tokens: int) -> int:
        """Entries of a row whose tables hold so many tokens each."""
        return self.tables * -(-num_tokens // self.page_size)


class Held(NamedTuple):
    """What a row holds, in tokens of a table (the mean over its tables).

    Attributes:
      kept: what the last compression left of the text, as the schedule counts it.
      grown: tokens since; all, if nothing was compressed.
    """

    kept: int
    grown: int

    @property
    def tokens(self) -> int:
        return self.kept + self.grown

    def after(self, more: int) -> Held:
        """When so many more tokens have come."""
        return Held(self.kept, self.grown + more)


_NOTHING = Held(0, 0)


@dataclass(frozen=True)
class Footprint:
    """Bounds of what one request holds.

    Attributes:
      schedule: when it is compressed.
      pool: where.
    """

    schedule: CompressionSchedule
    pool: Pool

    def transient(self, decoded: int) -> int:
        """Entries that a step needs while it evicts, beside what is held before and after: copies before they replace.

        The strategy "sparse_copy" takes fresh pages for all survivors before it gives the old ones back.

        Args:
          decoded: tokens decoded by then, at most.
        """
        return self._copies(decoded) if self.schedule.params.evict_strategy == "sparse_copy" else 0

    def _copies(self, decoded: int) -> int:
        """Entries of copies of all survivors."""
        params = self.schedule.params
        return self.pool.uniform(params.budget(self.schedule.prompt_length + decoded)) if params.per_step else 0

    def prompt_peak(self, start: int = 0) -> int:
        """Most entries while the prompt is computed, from its place `start` on."""
        peak, at, held = 0, 0, _NOTHING
        for place, before, after in self._stages:
            if place > start:
                # Growth by many tokens at once is only known up to a page a table.
                spare = 0 if held.tokens == at else self.pool.tables
                peak = max(peak, self._entries(before, place) + spare)
            at, held = place, after
        return peak

    def decode_peak(self, num_tokens: int) -> int:
        """Most entries while so many tokens are decoded behind the prompt."""
        params, prompt = self.schedule.params, self.schedule.prompt_length
        *_, (_, before, held) = self._stages
        if params.per_step:
            return self._evicting_peak(before, num_tokens)
        if params.interval is None:
            # A replay computes outputs many at once: see prompt_peak.
            spare = self.pool.tables if held.tokens < prompt and num_tokens > 2 else 0
            return self._entries(held.after(num_tokens), prompt + num_tokens) + spare
        # It holds most just before a compression, and budgets never fall: the last two stages and the first decide.
        whole, rest = divmod(num_tokens, params.interval)
        peak = 0
        for stage in {0, max(whole - 1, 0), whole}:
            start = prompt + stage * params.interval
            grown = rest if stage == whole else params.interval
            kept = Held(min(params.budget(start), start), 0) if stage else held
            peak = max(peak, self._entries(kept.after(grown), start + grown))
        return peak

    @cached_property
    def _stages(self) -> tuple[tuple[int, Held, Held], ...]:
        """The schedule's stages: (length at the end, what is held there before, and after compression)."""
        stages, at, held = [], 0, _NOTHING
        for place, before, after in self.schedule.stages:
            grown, at = held.after(place - at), place
            held = Held(after, 0) if after < before else grown
            stages.append((place, grown, held))
        return tuple(stages)

    def peak(self, *, start: int = 0, decoded: int = 0) -> int:
        """Most entries from the prompt's place `start` on, until so many tokens are decoded."""
        return max(self.prompt_peak(start), self.decode_peak(decoded))

    def fits(self, decoded: int = 0) -> bool:
        """Whether the empty pool holds it until so many tokens are decoded."""
        return self.peak(decoded=decoded) + self.transient(decoded) <= self.pool.num_entries

    def fits_with_copies(self) -> bool:
        """Whether the empty pool holds the prompt, and beside it what "sparse_copy" needs, whatever the strategy is."""
        return self.prompt_peak() + self._copies(0) <= self.pool.num_entries and self.fits()

    def most_decoded(self, limit: int) -> int:
        """Most tokens, up to `limit`, that it can decode in the empty pool; its prompt must fit."""
        return bisect.bisect_left(range(1, limit + 1), True, key=lambda decoded: not self.fits(decoded))

    def _entries(self, held: Held, length: int) -> int:
        """Most entries of a row that holds so much of a text of `length`."""
        pool, rule = self.pool, self.schedule.params.rule
        if held.tokens >= length:
            return pool.uniform(length)
        most = rule.most_kept(held.kept, page_size=pool.page_size) + held.grown
        pooled = rule.max_entries(most, length, num_layers=1, num_kv_heads=pool.tables, page_size=pool.page_size)
        return min(pooled, pool.uniform(length))

    def _evicting_peak(self, before: Held, num_tokens: int) -> int:
        """Most entries of a row that evicts per step, from when it held the `before` tokens of the prompt."""
        params, pool = self.schedule.params, self.pool
        length = self.schedule.prompt_length + num_tokens
        # As if nothing were ever given back.
        everything = self._entries(before.after(num_tokens), length)
        if params.evict_strategy == "no_op":
            return everything
        most = params.budget(length) + 1
        if params.evict_strategy == "free_block":
            # One live token keeps a page.
            return min(everything, pool.tables * most)
        # One page a table to spare: how many tables take the next token into a hole is not always known.
        return min(everything, pool.uniform(most) + pool.tables)


def footprint_of(schedule: CompressionSchedule, pool: Pool, *, max_chunk: int) -> Footprint | None:
    """The footprint of a request, compressed between chunks if it does not fit otherwise; None if it cannot fit.

    Args:
      max_chunk: tokens of a step that only prefills: the largest distance between two points.
    """
    footprint = Footprint(schedule, pool)
    if pool.uniform(schedule.context) <= pool.num_entries or not schedule.params.policy.between_chunks:
        return footprint if footprint.fits() else None
    alignment = schedule.params.policy.chunk_alignment
    # Fewer compressions see more of the text at once, so the largest distance that fits: one for all strategies, which
    # are to keep the same tokens, unless that of the hungriest does not fit at all.
    steps = range(alignment, min(max_chunk, schedule.context - 1) + 1, alignment)
    for fits in (Footprint.fits_with_copies, Footprint.fits):
        count = bisect.bisect_left(
            steps, True, key=lambda stride: not fits(Footprint(schedule.with_stride(stride), pool))
        )
        if count:
            return Footprint(schedule.with_stride(steps[count - 1]), pool)
    return None
