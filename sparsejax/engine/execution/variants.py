"""Which variants of the steps there are, and which one a batch needs: what is fixed when a step is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels import Implementation
from sparsejax.engine.execution.selection_plan import Selections
from sparsejax.engine.programs.delta_ops import StoreSpec
from sparsejax.engine.programs.delta_parts import StoreOptions
from sparsejax.engine.programs.recording import recording_for, watched
from sparsejax.engine.programs.selection import Selecting
from sparsejax.engine.programs.steps import StepOptions, options_for
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.methods import DeltaKV

SMALLEST_TOP = 256  # bound on the tokens that a decode selects; larger ones are powers of two


@dataclass(frozen=True)
class StepVariants:
    """The step variants of one engine.

    Attributes:
      max_slots: tokens that a row may hold.
      implementation: handed to the kernels.
      can_evict: the cache is one that methods may evict from.
      records: what chunks may record for them.
      may_watch: decodes may record attention, or have dead slots.
      selecting: methods that select what decoding reads, which requests may use.
      selections: how they do; None if there are none.
      store: how requests are stored compressed; None if they are not.
    """

    max_slots: int
    implementation: Implementation | None = None
    can_evict: bool = False
    records: frozenset[str] = frozenset()
    may_watch: bool = False
    selecting: tuple[str, ...] = ()
    selections: Selections | None = None
    store: StoreSpec | None = None

    def needed(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> StepOptions:
        """The cheapest variant for a step with these chunks and decodes."""
        recording = self.can_evict and any(recording_for(chunk.request.compression).any_of_chunk for chunk in chunks)
        return options_for(
            [each.params for each in (*(chunk.request for chunk in chunks), *requests)],
            implementation=self.implementation,
            prompt_logprobs=any(chunk.request.params.prompt_logprobs is not None for chunk in chunks),
            # One variant for all that methods may ask for: lanes that do not ask cost next to nothing.
            records=self.records if recording else frozenset(),
            watch=self.can_evict and any(watched(request.compression) for request in requests),
            store=self._stored([chunk.request.compression for chunk in chunks], requests),
            select=None if self.selections is None else self.selections.step_options(requests, mixed=bool(chunks)),
        )

    def every(
        self, *, with_chunk: bool, with_decode: bool, asked: CompressionParams, uniform: bool
    ) -> list[StepOptions]:
        """All variants of a kind of step that requests may need.

        Args:
          with_chunk, with_decode: what the step does.
          asked: what requests ask for.
          uniform: all of them do; else some may ask for anything.
        """
        details: list[dict[str, Any]] = [{"plain": True}, {"plain": False}, {"plain": False, "logprobs": True}]
        if with_chunk:
            details.append({"plain": False, "logprobs": True, "prompt_logprobs": True})
        records = [frozenset(), self.records] if with_chunk and self.records else [frozenset()]
        watch = [False, True] if with_decode and self.may_watch else [False]
        if uniform:
            records = records[-1:] if recording_for(asked).any_of_chunk else records[:1]
            watch = watch[-1:] if watched(asked) else watch[:1]
        select = self._every_select(with_chunk, asked, uniform) if with_decode else [None]
        return [
            StepOptions(implementation=self.implementation, **detail, records=r, watch=w, select=s, store=kind)
            for detail in details
            for r in records
            for w in watch
            for s in select
            for kind in self._every_store(with_chunk, with_decode, asked, uniform)
        ]

    def _stored(self, chunks: Sequence[CompressionParams], requests: Sequence[Request]) -> StoreOptions | None:
        """Whom a step over a `DeltaCache` serves. chunks: what the requests of its chunk ask for."""
        if self.store is None:
            return None
        decodes = [request.compression for request in requests]
        return StoreOptions(
            spec=self.store,
            chunk=any(each.compresses for each in chunks),
            dense=not decodes or not all(each.compresses for each in decodes),
            compressed=any(each.compresses for each in decodes),
            top=max((self._top(each) for each in decodes if each.compresses), default=0),
        )

    def _top(self, compression: CompressionParams) -> int:
        method = compression.policy
        assert isinstance(method, DeltaKV)
        return most_read(method, self.max_slots)

    def _every_select(self, mixed: bool, asked: CompressionParams, uniform: bool) -> list[Selecting | None]:
        """How the decodes of steps may select, with these parameters or with the defaults of the other methods."""
        if self.selections is None or (uniform and not asked.selects):
            return [None]
        names = [] if uniform else [name for name in self.selecting if name != asked.method]
        wanted = [*([asked] if asked.selects else []), *self.selections.defaults(names)]
        variants = self.selections.warm_options(wanted, mixed=mixed, uniform=uniform)
        return variants if uniform else [None, *variants]

    def _every_store(
        self, with_chunk: bool, with_decode: bool, asked: CompressionParams, uniform: bool
    ) -> list[StoreOptions | None]:
        """Whom steps over a `DeltaCache` may serve; see `every`."""
        if self.store is None:
            return [None]
        store = asked if asked.compresses else CompressionParams(method="deltakv")
        kinds = [(True, False), (False, True), (True, True)] if with_decode else [(True, False)]
        chunks = [False, True] if with_chunk else [False]
        if uniform:
            kinds = [(not asked.compresses, asked.compresses)] if with_decode else kinds
            chunks = [asked.compresses] if with_chunk else chunks
        return [
            StoreOptions(self.store, chunk, dense, compressed, self._top(store) if compressed else 0)
            for chunk in chunks
            for dense, compressed in kinds
        ]


def most_read(method: DeltaKV, max_slots: int) -> int:
    """Bound on the history tokens that a decode reads, whatever its text of up to `max_slots` tokens: one of few."""
    most = max(method.wanted(max_slots), SMALLEST_TOP)
    return 1 << (most - 1).bit_length()
