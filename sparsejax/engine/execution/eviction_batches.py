"""Host side of eviction: which rows go into one call of the compression or the evict program, as padded arrays."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import CacheLayout
from sparsejax.engine.programs.compression import CompressBatch, CompressSpec
from sparsejax.engine.programs.eviction import EvictBatch, EvictLane, EvictSpec
from sparsejax.engine.requests.blame import blaming
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.compression_schedule import CompressionSchedule
from sparsejax.engine.requests.footprint import Pool
from sparsejax.engine.scheduling import buckets
from sparsejax.engine.scheduling.plan import Compress, Evict
from sparsejax.methods import ObservedQueries

Members = tuple[Compress, ...]


@dataclass(frozen=True)
class EvictionShapes:
    """What the shapes of calls follow from.

    Attributes:
      layout: of the cache.
      num_query_heads: of the model.
      compress_rows: most rows of a compression.
      evict_rows: lane counts of evict steps.
      implementation: "triton", "xla" or None, handed to the kernels.
    """

    layout: CacheLayout
    num_query_heads: int
    compress_rows: int
    evict_rows: tuple[int, ...]
    implementation: Implementation | None

    @property
    def slots(self) -> tuple[int, ...]:
        """Bounds on the slots of a table."""
        return buckets.slot_buckets(self.layout.max_entries_per_row * self.layout.page_size)

    def compress_spec(
        self, params: CompressionParams, *, lanes: int, budget: int, held: int, first: bool
    ) -> CompressSpec:
        """Of rows that hold no more than `held` tokens in a table, and keep no more than `budget` in the mean.

        Args:
          first: nothing was ever evicted from the rows.
        """
        layout = self.layout
        # A rule that keeps whole pages may round every table up.
        kept = buckets.bucket(min(budget, self.slots[-1]), self.slots) + layout.page_size
        return CompressSpec(
            method=params.policy,
            rule=params.rule,
            max_slots=buckets.bucket(min(held, self.slots[-1]), self.slots),
            max_keep=lanes * kept * layout.table_layers * layout.table_heads,
            in_text_order=first,
            implementation=self.implementation,
        )

    def evict_spec(self, params: CompressionParams, *, bulk: bool, text_length: int, budget: int) -> EvictSpec:
        """Of rows with such a text and budget, or less of either."""

        def bound(tokens: int) -> int:
            return buckets.bucket(min(tokens, self.slots[-1]), self.slots)

        if bulk or params.evict_strategy in ("no_op", "free_block"):
            most = bound(text_length)  # dead slots included
        else:
            # What a table holds over its budget before each eviction comes on top: else a budget of a power of two
            # would need the next bound, which is twice as large.
            page = self.layout.page_size
            most = bound(min(text_length, budget)) + -(-params.evict_count // page) * page
        return EvictSpec(
            method=params.policy,
            strategy=params.evict_strategy,  # pyright: ignore[reportArgumentType]
            max_slots=most,
            num_query_heads=self.num_query_heads,
            num_per_evict=params.evict_count,
            bulk=bulk,
            implementation=self.implementation,
        )


def compress_calls(
    entries: Sequence[Compress], shapes: EvictionShapes, *, moment_slots: Mapping[str, int]
) -> list[tuple[Members, CompressSpec, CompressBatch]]:
    """Groups entries by method and budget rule; lane i of a batch belongs to entry i of its members.

    Args:
      moment_slots: where the query moments of requests are, by request id.
    """
    groups: dict[Hashable, list[Compress]] = defaultdict(list)
    for entry in entries:
        params = entry.request.compression
        groups[params.policy, params.rule].append(entry)
    calls = []
    for group in groups.values():
        for first in range(0, len(group), shapes.compress_rows):
            some = tuple(group[first : first + shapes.compress_rows])
            lanes = buckets.compress_rows(len(some), shapes.compress_rows)
            with blaming(entry.request for entry in some):
                spec = shapes.compress_spec(
                    some[0].request.compression,
                    lanes=lanes,
                    budget=max(entry.budget for entry in some),
                    held=max(entry.text_length for entry in some),
                    first=all(entry.is_first for entry in some),
                )
                calls.append((some, spec, compress_batch(some, lanes, moment_slots)))
    return calls


def idle_compress_calls(
    params: CompressionParams, shapes: EvictionShapes, *, texts: tuple[int, int] | None = None
) -> Iterator[tuple[CompressSpec, CompressBatch]]:
    """Calls of every shape that requests with these parameters can need, on the null row.

    Args:
      texts: tokens of the shortest and the longest text that is compressed; None: any.
    """
    layout = shapes.layout
    pool = Pool(layout.num_entries - 1, layout.table_layers * layout.table_heads, layout.page_size)
    longest = shapes.slots[-1] if texts is None else texts[1]
    between_chunks = params.policy.between_chunks and pool.uniform(longest) > pool.num_entries
    if between_chunks and texts is not None:
        texts = 1, longest  # they are compressed long before their ends
    if params.per_step and params.context_tokens is None and not between_chunks:
        return
    for lanes in dict.fromkeys((1, shapes.compress_rows)):
        specs = [
            shapes.compress_spec(params, lanes=lanes, budget=budget, held=held, first=first)
            for below, held in _bounds(shapes, texts)
            # Bounds double, so a budget that grows with the text passes at most one between these two.
            for budget in (params.budget(below + 1), params.budget(held))
            # A text is compressed a second time only between its chunks, or while its answer grows.
            for first in ((True,) if params.once and not between_chunks else (True, False))
            if held > budget
        ]
        for spec in dict.fromkeys(specs):
            yield spec, compress_batch((), lanes, {})


def compress_batch(entries: Sequence[Compress], size: int, moment_slots: Mapping[str, int]) -> CompressBatch:
    """The arrays of a call, padded to `size` lanes."""
    requests = [entry.request for entry in entries]
    return CompressBatch(
        rows=_lanes((request.row or 0 for request in requests), size),
        budget=_lanes((entry.budget for entry in entries), size),
        sinks=_lanes((request.compression.sinks for request in requests), size),
        recent=_lanes((entry.request.compression.recent(entry.text_length) for entry in entries), size),
        window=_lanes((min(entry.request.compression.window, entry.text_length) for entry in entries), size),
        text_length=_lanes((entry.text_length for entry in entries), size),
        prompt_length=_lanes((len(request.prompt_token_ids) for request in requests), size),
        recorded=_lanes((_recorded(entry) for entry in entries), size),
        seed=_lanes((request.seed for request in requests), size, np.uint32),
        moment_slot=_lanes((moment_slots.get(request.request_id, 0) for request in requests), size),
        observed=_observed([_schedule(entry) for entry in entries], size),
    )


def evict_calls(
    entries: Sequence[Evict], shapes: EvictionShapes
) -> list[tuple[tuple[Evict, ...], EvictSpec, EvictBatch]]:
    """Groups entries by what is fixed in an evict step; lane i of a batch belongs to entry i of its members."""
    # Most share their parameters, whose hash takes longer than anything else here.
    alike: dict[Hashable, list[Evict]] = defaultdict(list)
    for entry in entries:
        alike[id(entry.request.compression), entry.bulk].append(entry)
    groups: dict[Hashable, list[Evict]] = defaultdict(list)
    for some in alike.values():
        params = some[0].request.compression
        groups[params.policy, params.evict_strategy, params.evict_count, some[0].bulk] += some
    calls = []
    for some in groups.values():
        with blaming(entry.request for entry in some):
            spec = shapes.evict_spec(
                some[0].request.compression,
                bulk=some[0].bulk,
                text_length=max(entry.text_length for entry in some),
                budget=max(entry.budget for entry in some),
            )
            calls.append((tuple(some), spec, evict_batch(some, buckets.bucket(len(some), shapes.evict_rows))))
    return calls


def idle_evict_calls(
    params: CompressionParams, shapes: EvictionShapes, *, texts: tuple[int, int] | None = None
) -> Iterator[tuple[EvictSpec, EvictBatch]]:
    """The same for per-step evictions."""
    if not params.per_step:
        return
    specs = [
        shapes.evict_spec(params, bulk=bulk, text_length=text, budget=params.budget(text))
        for bulk in (False, True)
        for _, text in _bounds(shapes, texts)
    ]
    for spec in dict.fromkeys(specs):
        for lanes in shapes.evict_rows:
            yield spec, evict_batch((), lanes)


def evict_batch(entries: Sequence[Evict], size: int) -> EvictBatch:
    """The array of a call, padded to `size` lanes."""
    return EvictBatch.of([_evict_lane(entry) for entry in entries], size)


def _evict_lane(entry: Evict) -> EvictLane:
    request, text = entry.request, entry.text_length
    params = request.compression
    return EvictLane(
        row=request.row or 0,
        budget=entry.budget,
        text_length=text,
        sink_tokens=params.sinks,
        recent_tokens=params.recent(text),
        recorded=_recorded(entry),
        seed=request.seed,
    )


def _bounds(shapes: EvictionShapes, texts: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """(the bound below, the bound) on the slots of texts between these lengths."""
    bounds = shapes.slots
    low, high = bounds[0], bounds[-1]
    if texts is not None:
        low, high = (buckets.bucket(min(length, bounds[-1]), bounds) for length in texts)
    for below, bound in itertools.pairwise((0, *bounds)):
        if low <= bound <= high:
            yield below, bound


def _recorded(entry: Compress) -> int:
    """Queries of the text whose attention the scores sum up."""
    return _schedule(entry).recorded(entry.text_length)


def _observed(schedules: Sequence[CompressionSchedule], size: int) -> ObservedQueries:
    """Where these queries stand, in `size` lanes."""
    return ObservedQueries(
        stride=_lanes((each.stride or each.context for each in schedules), size),
        width=_lanes((each.observed_width for each in schedules), size),
        context=_lanes((each.context for each in schedules), size),
        prompt=_lanes((each.prompt_length for each in schedules), size),
    )


def _schedule(entry: Compress) -> CompressionSchedule:
    footprint = entry.request.footprint
    assert footprint is not None, "only requests that evict are compressed"
    return footprint.schedule


def _lanes(values: Iterable[int], size: int, dtype: type = np.int32) -> Any:
    """The values, then zeros: a numpy array, which a program takes for an array of its own."""
    lanes = np.zeros(size, dtype)
    given = list(values)
    lanes[: len(given)] = given
    return lanes
