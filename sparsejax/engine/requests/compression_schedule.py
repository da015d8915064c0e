"""When a request's cache is compressed. It follows from the request and the pool alone, never from the load.

The points of a request whose method evicts:

* At the end of its prompt; or, with `context_tokens`, behind that many prompt tokens: the rest is then computed over
  what was kept, and stays whole.
* If the text up to there does not fit into the empty pool, and the method may compress between chunks: at regular
  distances before, too. Only then, for otherwise results would depend on how a prompt is cut into chunks.
* Unless it compresses once, or evicts per step: whenever `interval` more tokens have been decoded.
* A method that evicts per step evicts from the end of the prompt on, with every step.

At each point, a row that holds no more than its budget is left alone. What a row holds is counted in tokens, the mean
over its tables: a compression leaves the budget, every token adds one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from sparsejax.engine.requests.compression_params import CompressionParams


@dataclass(frozen=True)
class CompressionSchedule:
    """The schedule of one request.

    Attributes:
      params: how it compresses.
      prompt_length: tokens of its prompt.
      stride: tokens between two points of a text that does not fit into the pool; None if it fits.
    """

    params: CompressionParams
    prompt_length: int
    stride: int | None = None

    @cached_property
    def context(self) -> int:
        """Prompt tokens that are compressed; less than the prompt only with `context_tokens`."""
        given = self.params.context_tokens
        return self.prompt_length if given is None else min(given, self.prompt_length)

    @property
    def changes_while_decoding(self) -> bool:
        """Whether its outputs, too, are evicted, so that a replay has to decode them one by one."""
        return not self.params.once

    def with_stride(self, stride: int) -> CompressionSchedule:
        """The same, for a text that does not fit into the pool."""
        return replace(self, stride=stride)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Lengths of the prompt at which its row may be compressed, in order; here its chunks end."""
        between = [] if self.stride is None else range(self.stride, self.context, self.stride)
        last = [self.prompt_length] if self.params.per_step else []
        return tuple(dict.fromkeys([*between, self.context, *last]))

    @cached_property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """The prompt between its places: (length at the end, tokens held there before, and after compression).

        What lies behind the last place is the last stage. There always is one.
        """
        stages, held, at = [], 0, 0
        for place in dict.fromkeys([*self.places, self.prompt_length]):
            before = held + place - at
            held = self.kept(before, place) if place in self.places else before
            at = place
            stages.append((place, before, held))
        return tuple(stages)

    @property
    def longest_stage(self) -> int:
        """Most prompt tokens between two places; what lies behind the last counts where its queries are recorded."""
        last = [self.prompt_length] if self.changes_while_decoding else []
        return max(end - begin for begin, end in pairwise((0, *self.places, *last)))

    def compresses(self, place: int) -> bool:
        """Whether the row is over its budget at a place of the prompt."""
        return any(at == place and after < before for at, before, after in self.stages)

    def held_at(self, length: int) -> int:
        """Tokens held when `length` tokens of the prompt, a place, have been computed and compressed."""
        return next(after for place, _, after in self.stages if place == length)

    def kept(self, held: int, length: int) -> int:
        """Tokens left of `held` by a compression when the text has `length`."""
        budget = self.params.budget(length)
        if held <= budget:
            return held
        # Who evicts several at once does so when there is one too many.
        return budget - self.params.evict_count + 1 if self.evicts(length) else budget

    def due(self, held: int, length: int) -> bool:
        """Whether a row that holds `held` tokens of a text of `length` is compressed now."""
        return self._may_be_due(length) and held > self.params.budget(length)

    def _may_be_due(self, length: int) -> bool:
        if self.evicts(length):
            return True
        decoded, interval = length - self.prompt_length, self.params.interval
        if decoded <= 0:
            return length in self.places
        return interval is not None and decoded % interval == 0

    def recorded(self, length: int) -> int:
        """Queries of a text of `length`, at which it is compressed, whose attention the scores sum up."""
        if length < self.prompt_length:
            return self._recorded_until(length)
        decoded = length - self.prompt_length if "decode" in self.params.policy.records and not self.params.once else 0
        return self._recorded_of_prompt + decoded

    @cached_property
    def _recorded_of_prompt(self) -> int:
        return self._recorded_until(self.prompt_length)

    def _recorded_until(self, length: int) -> int:
        """Before each place, and before the prompt's end if there is more to come, the last queries since the place
        before."""
        ends = [place for place in self.places if place <= length]
        if self.changes_while_decoding and length == self.prompt_length:
            ends.append(length)
        return sum(max(end - max(self.params.record_from(end), begin), 0) for begin, end in pairwise((0, *ends)))

    @property
    def observed_width(self) -> int:
        """Queries that are recorded before a place, as far as they lie behind the place before."""
        return self.prompt_length - self.params.record_from(self.prompt_length)

    def evicts(self, length: int) -> bool:
        """Whether it is the per-step eviction that acts on a text of `length`, not a compression."""
        return self.params.per_step and length >= self.prompt_length

    def next_place(self, length: int) -> int | None:
        """The next place behind `length` tokens of the prompt; None: there is none."""
        return next((place for place in self.places if place > length), None)

    def recorded_for(self, start: int) -> int | None:
        """Length of the text at the compression that the tokens behind `start` prompt tokens are recorded for.

        None: it is not compressed any more.
        """
        place = self.next_place(start)
        if place is not None and (
            self.changes_while_decoding or any(self.compresses(p) for p in self.places if p > start)
        ):
            return place
        return self.prompt_length if self.changes_while_decoding and start < self.prompt_length else None

    def chunk(self, start: int, stop: int, room: int) -> int:
        """Tokens of the next chunk: of a prefill from `start` to `stop`, in a step with room for so many.

        A chunk ends at a place at the latest. Before, its length is a multiple of the method's `chunk_alignment`; 0 if
        there is not that much room.
        """
        place = self.next_place(start)
        rest = (stop if place is None else min(place, stop)) - start
        if rest <= room:
            return rest
        return room - room % self._alignment(start)

    def _alignment(self, start: int) -> int:
        return 1 if self.recorded_for(start) is None else self.params.policy.chunk_alignment

    def max_chunks(self, start: int, stop: int, room: int) -> int:
        """Most chunks of a prefill, if each step has room for at least so many tokens."""
        # With less room than that, what is computed between two places fits into one chunk: see limits.check_limits.
        room = room - room % self.params.policy.chunk_alignment or room
        ends = [start, *(place for place in self.places if start < place < stop), stop]
        return sum(-(-(end - begin) // room) for begin, end in pairwise(ends))
